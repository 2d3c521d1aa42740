"""What can be measured in a model: its modules looked at without weights."""

from __future__ import annotations

from collections.abc import Sequence

from gradvar.gradients import TargetListing, survey_targets
from gradvar.models import find_model, load_skeleton


def targets(
    model: str, specs: Sequence[str] = (), *, revision: str | None = None, trust_remote_code: bool = False
) -> TargetListing:
    """Return what can be measured in a model, from its configuration alone: no weights are loaded or fetched.

    Args:
        model: A folder with config.json, or a hub id.
        specs: Only what these name; none means all.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that the model's repository ships.

    Raises:
        GradvarError: No such model, not a causal LM, or a spec that matches nothing.
    """
    folder = find_model(model, revision, needs_weights=False)
    return survey_targets(load_skeleton(folder, trust_remote_code=trust_remote_code), specs)
