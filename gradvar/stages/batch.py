"""Batches of several prompts: the run's products between prompts to the table `batches`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gradvar.estimators.batch_tables import batch_table
from gradvar.estimators.cross_products import (
    CrossProducts,
    ExactProducts,
    SketchError,
    SketchProducts,
    SummedProducts,
    sketch_error,
)
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run
from gradvar.runs.records import counted
from gradvar.stages.listener import Listener

TABLE = "batches"


def write_batches(
    run: Run, groups: Sequence[PromptScores], config: EstimateConfig, listener: Listener
) -> pd.DataFrame | None:
    """Estimate the update of batches of several prompts; write and return the table `batches`, or remove an old one.

    Args:
        run: A run with Grams and rewards.
        groups: From `estimated_groups`.
        config: How to estimate.
        listener: Who is told.

    Returns:
        The table; None where the run holds no products between prompts, or fewer than two prompts.

    Raises:
        GradvarError: Too few verified responses for two groups.
    """
    products, without = cross_products(run, groups)
    named = {name for name, one in products.items() if one}
    run.remove_estimates(TABLE)  # of products that may no longer be there
    if not named:
        return None
    if without:
        listener.warn(
            f"{counted(len(without), 'prompt')} (first: {without[0]}) without sketches like the others', in no batch: "
            f"run `gradvar measure {run.path} --cross sketch`"
        )
    inside = [group for group in groups if group.target in named and group.prompt_id not in without]
    if len({group.prompt_id for group in inside}) < 2:
        return None
    table = batch_table(
        inside,
        products,
        rules=config.rules,
        alphas=config.alphas,
        group_size=config.group_size,
        batch_prompts=config.batch_prompts,
        advantage=config.advantage,
        level=config.level,
        seed=config.seed,
    )
    run.write_estimates(TABLE, table)
    return table


def cross_products(run: Run, groups: Sequence[PromptScores]) -> tuple[dict[str, CrossProducts], list[str]]:
    """Return the run's products between prompts by target, and the prompts that have none.

    Rows are those of `groups`. Exact products are taken where they are there for every prompt and target. Where
    sketches differ in seed or dimension, those that most prompts share are taken.
    """
    exact = _exact_products(run, groups)
    if exact:
        return exact, []
    scores: dict[str, dict[str, PromptScores]] = {}
    for group in groups:
        scores.setdefault(group.target, {})[group.prompt_id] = group
    targets = [name for name in scores if name != SUM]
    held = {name: run.sketches(name) for name in next(iter(scores.values()), {})}
    labels = {
        name: {(one.dimension, one.seed, one.parts) for key, one in sketches.items() if key in targets}
        for name, sketches in held.items()
        if set(targets) <= set(sketches)
    }
    common = Counter(next(iter(label)) for label in labels.values() if len(label) == 1).most_common(1)
    if not common:
        return {}, []
    chosen = [name for name in held if labels.get(name) == {common[0][0]}]
    found: dict[str, CrossProducts] = {
        target: SketchProducts(
            sketches={name: held[name][target].rows(scores[target][name].rollout_ids) for name in chosen},
            parts=common[0][0][2],
        )
        for target in targets
    }
    if SUM in scores:
        found[SUM] = SummedProducts(targets=list(found.values()))
    return found, [name for name in held if name not in chosen]


def _exact_products(run: Run, groups: Sequence[PromptScores]) -> dict[str, CrossProducts]:
    """Return the run's exact products by target; empty where a response or target in `groups` has none."""
    grams = run.cross_grams()
    targets = list(dict.fromkeys(group.target for group in groups if group.target != SUM))
    if grams is None or not set(targets) <= set(grams.matrices):
        return {}
    try:
        rows = {group.prompt_id: grams.rows(group.prompt_id, group.rollout_ids) for group in groups}
    except KeyError:
        return {}
    found: dict[str, CrossProducts] = {
        target: ExactProducts(matrix=grams.matrices[target], rows=rows) for target in targets
    }
    if any(group.target == SUM for group in groups):
        found[SUM] = SummedProducts(targets=list(found.values()))
    return found


def sketch_errors(run: Run) -> dict[str, SketchError]:
    """Compare every sketch of the run with its prompt's exact Gram: by target, over all prompts."""
    found: dict[str, list[SketchError]] = {}
    for name in run.measured_prompt_ids():
        sketches = run.sketches(name)
        grams = run.grams(name) if sketches else {}
        for target, one in sketches.items():
            if target in grams and grams[target].rollout_ids == one.rollout_ids:
                found.setdefault(target, []).append(sketch_error(one.matrix, grams[target].matrix))
    return {
        target: SketchError(
            measured=float(np.sqrt(np.mean([e.measured**2 for e in errors]))),
            stated=float(np.sqrt(np.mean([e.stated**2 for e in errors]))),
            largest=max(e.largest for e in errors),
        )
        for target, errors in found.items()
    }


def sketch_error_line(errors: Mapping[str, SketchError]) -> str:
    """Return one line on how far the sketches' inner products are off."""
    if not errors:
        return "no sketch could be checked: the responses of sketches and Grams differ"
    worst = max(errors.values(), key=lambda error: error.measured)
    return (
        f"sketches checked against the exact Grams within prompts: an inner product is off by {worst.measured:.2%} of "
        f"the norms' product (root mean square, the worst of {len(errors)} targets; {worst.stated:.2%} expected; "
        f"largest {worst.largest:.1%})"
    )
