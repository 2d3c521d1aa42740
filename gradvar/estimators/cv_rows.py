"""The rows of the table of total CVs, and the labels they share. The table is `cv_table` in `cv_tables`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gradvar.estimators.aggregation import Rule
from gradvar.estimators.cv import (
    SILENT,
    UNRESOLVED,
    Needed,
    cv_from_rho,
    n_to_resolve,
    resolution,
)
from gradvar.estimators.groups import GroupMoments
from gradvar.estimators.intervals import THESE_PROMPTS
from gradvar.estimators.paper_order import EQUAL, UNDETERMINED, claim, judge, needed_to_judge, side
from gradvar.runs.config import EQUALITY_MARGIN
from gradvar.runs.records import Estimate, PromptScores, TableRow, no_estimate

MomentsKey = tuple[str, str, float | None]
"""Prompt, rule and alpha."""


@dataclass(frozen=True, kw_only=True)
class CvStudy:
    """One target's prompts with what was drawn for them."""

    target: str
    prompts: dict[str, PromptScores]
    left_out: dict[str, int]
    nothing: dict[str, str]
    """Prompts without any update, with the verdict that says why."""
    moments: Mapping[MomentsKey, GroupMoments]
    """Of the prompts that hold two groups."""
    advantage: str
    group_size: int
    level: float
    seed: int
    equality_margin: float = EQUALITY_MARGIN
    """How far a ratio of CVs may lie from 1 where the paper's order has them equal."""

    def row(
        self,
        quantity: str,
        estimate: Estimate,
        prompts: Sequence[str],
        *,
        pooled: bool = False,
        variant: tuple[Rule, float | None] | None = None,
        verdict: str | None = None,
        n_needed: float = math.nan,
        at_least: bool = False,
        estimand: str = THESE_PROMPTS,
        paper: str | None = None,
        holds: str | None = None,
        holds_needs: float = math.nan,
        against: str | None = None,
    ) -> TableRow:
        """Return one row with the study's labels."""
        rule, alpha = variant if variant is not None else (None, None)
        return TableRow(
            quantity=quantity,
            estimate=replace(estimate, seed=self.seed),
            target=self.target,
            prompt_id=None if pooled else prompts[0],
            rule=None if rule is None else rule.name,
            alpha=alpha,
            advantage=self.advantage,
            scope="prompt group",
            group_size=self.group_size,
            verdict=verdict,
            extra={
                "n_needed": n_needed,
                "n_needed_at_least": at_least,
                "left_out": sum(self.left_out[name] for name in prompts),
                "silent": sum(self.nothing.get(name) == SILENT for name in prompts),
                "estimand": estimand,
                "paper": paper,
                "holds": holds,
                "holds_needs": holds_needs,
                "against": against,
            },
        )

    def plain(self, value: float, method: str, prompt_id: str) -> Estimate:
        """Return a number of one prompt that has no interval."""
        n = len(self.prompts[prompt_id].lengths)
        return no_estimate(method, n=n, level=self.level, value=value)


def rho_and_cv_rows(
    study: CvStudy,
    variant: tuple[Rule, float | None],
    rho: Estimate,
    prompts: Sequence[str],
    *,
    pooled: bool = False,
    estimand: str = THESE_PROMPTS,
) -> list[TableRow]:
    """Return rho's row and its CV's."""
    verdict = resolution(rho)
    # More responses a prompt do not settle what differs between prompts.
    here = estimand == THESE_PROMPTS
    needed = n_to_resolve(rho, study.group_size) if here else Needed(n=math.nan, at_least=False)
    return [
        study.row(
            quantity,
            estimate,
            prompts,
            pooled=pooled,
            variant=variant,
            verdict=verdict,
            n_needed=needed.n,
            at_least=needed.at_least,
            estimand=estimand,
        )
        for quantity, estimate in (("rho", rho), ("cv", cv_from_rho(rho)))
    ]


def ratio_row(
    study: CvStudy,
    variant: tuple[Rule, float | None],
    compared: tuple[Rule, float | None],
    ratio: Estimate,
    prompts: Sequence[str],
    *,
    pooled: bool = False,
    estimand: str = THESE_PROMPTS,
) -> TableRow:
    """Return the row of a paired ratio, with what the paper's order asks of it."""
    per_prompt = ratio.n / max(ratio.clusters, 1)
    if not math.isfinite(ratio.value):
        verdict, needed = UNRESOLVED, math.nan
    elif (verdict := side(ratio.low, ratio.high)) != UNDETERMINED:
        needed = math.nan if verdict == EQUAL else float(math.ceil(per_prompt))
    else:
        distance = abs(math.log(ratio.value))
        # The side that has to leave 1.
        below = math.log(ratio.value / max(ratio.low, 1e-300))
        half = math.log(ratio.high / ratio.value) if ratio.value < 1.0 else below
        needed = float(math.ceil(per_prompt * (half / distance) ** 2)) if distance > 0 else math.inf
    paper = claim(variant, compared)
    return study.row(
        "cv_ratio",
        ratio,
        prompts,
        pooled=pooled,
        variant=variant,
        verdict=verdict,
        n_needed=needed,
        estimand=estimand,
        paper=paper,
        holds=judge(paper, ratio.low, ratio.high, margin=study.equality_margin),
        holds_needs=needed_to_judge(paper, ratio, margin=study.equality_margin),
        against=compared[0].name,
    )
