"""Commands that judge: audit (the theory's assumptions), compare (runs side by side)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(audit)
    app.command()(compare)


def audit(
    run: o.RunPath,
    group_size: o.GroupSize = None,
    advantage: o.Advantage = None,
    rule: o.Rule = None,
    alpha: o.Alpha = None,
    level: o.Level = None,
    margin: o.Margin = None,
    identity_margin: o.IdentityMargin = None,
    token_margin: o.TokenMargin = None,
    baseline_margin: o.BaselineMargin = None,
    length_margin: o.LengthMargin = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    as_json: o.Json = False,
) -> None:
    """Judge what the paper's theory takes for granted, assumptions 0 to 4, each with interval, margin and verdict.

    Supported only where the interval lies inside the margin, rejected only where it lies wholly outside, else
    undetermined, with the responses that would decide. Token covariance needs `gradvar measure --probes K`.
    """
    settings = o.given(
        config,
        group_size=group_size,
        advantage=advantage,
        level=level,
        margin=margin,
        identity_margin=identity_margin,
        token_margin=token_margin,
        baseline_margin=baseline_margin,
        length_margin=length_margin,
        seed=seed,
    )

    from gradvar.runs import open_run
    from gradvar.stages import audit as stage

    from . import audits, console

    target = open_run(run)
    with target.locked():
        tables = stage(target, settings, console.Terminal(), rule=rule or "grpo", alpha=alpha)
    audits.show_audit(target, tables, as_json=as_json)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN ...", help="Run directories, the one compared with first.", show_default=False),
    ],
    group_size: o.GroupSize = None,
    advantage: o.Advantage = None,
    rule: o.Rule = None,
    alpha: o.Alpha = None,
    level: o.Level = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    as_json: o.Json = False,
) -> None:
    """Compare runs, checkpoints of one training or models: exponent, CV, noise scale, efficiency, best alpha.

    Every run has its own numbers; differences to the first come with intervals where prompts are shared. Prompts are
    the same where their texts are, whatever their ids. The table is written in the first run.
    """
    settings = o.given(config, group_size=group_size, advantage=advantage, level=level, seed=seed)

    from gradvar.runs import open_run
    from gradvar.stages import compare as stage

    from . import comparisons, console

    targets = [open_run(run) for run in runs]
    with targets[0].locked():
        found = stage(targets, settings, console.Terminal(), rule=rule or "grpo", alpha=alpha)
    comparisons.show_comparison(targets[0], found, as_json=as_json)
