"""Stages fit and cv: score Grams to tables of estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators import cv_table, identity_table, law_table
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run
from gradvar.stages.identity import agreed_config
from gradvar.stages.listener import Listener, Silent


def fit(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> dict[str, pd.DataFrame]:
    """Fit the variance law and check the score identity; write and return the tables `law` and `identity`.

    Args:
        run: A run with Grams.
        given: Settings of `EstimateConfig` given now.
        listener: Who is told.

    Raises:
        GradvarError: Nothing was measured.
    """
    listener = listener or Silent()
    config = agreed_config(run, EstimateConfig, given)
    groups = estimated_groups(run)
    run.begin("fit", config)
    with listener.task("fit", 2) as advance:
        studied = list(dict.fromkeys(["score", config.advantage]))
        law = law_table(groups, advantages_studied=studied, level=config.level, margin=config.margin, seed=config.seed)
        advance(1)
        identity = identity_table(groups, seed=config.seed, level=config.level)
        advance(1)
    tables = {"law": law, "identity": identity}
    for name, table in tables.items():
        run.write_estimates(name, table)
    run.finish("fit")
    return tables


def cv(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> pd.DataFrame:
    """Estimate every aggregator's total CV; write and return the table `cv`.

    Args:
        run: A run with Grams and rewards.
        given: Settings of `EstimateConfig` given now.
        listener: Who is told.

    Raises:
        GradvarError: Nothing was measured, or the group is larger than the rollouts.
    """
    listener = listener or Silent()
    config = agreed_config(run, EstimateConfig, given)
    groups = estimated_groups(run)
    fewest = min(groups, key=lambda group: len(group.lengths))
    if config.group_size > len(fewest.lengths):
        raise GradvarError(
            f"--group-size: expected at most the {len(fewest.lengths)} rollouts of prompt {fewest.prompt_id!r}, "
            f"received {config.group_size}"
        )
    run.begin("cv", config)
    with listener.task("cv", 1) as advance:
        table = cv_table(
            groups,
            rules=config.rules,
            alphas=config.alphas,
            group_size=config.group_size,
            advantage=config.advantage,
            level=config.level,
            seed=config.seed,
        )
        advance(1)
    run.write_estimates("cv", table)
    run.finish("cv")
    return table


def estimated_groups(run: Run) -> list[PromptScores]:
    """Return every measured prompt for every target, and for their sum where there are several."""
    names = [*run.targets, SUM] if len(run.targets) > 1 else run.targets or [SUM]
    return [group for name in names for group in run.scores(name)]
