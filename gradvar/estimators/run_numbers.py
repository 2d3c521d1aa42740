"""One run's numbers, as `compare_table` sets them beside another's: which prompts have one, and all of them pooled.

A run's numbers are those of `law_table`, `cv_table` and `alpha_table` at the same options. They are made by family, so
that what is taken over fewer prompts is made anew for its family alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators.alpha_tables import alpha_table
from gradvar.estimators.cv_tables import cv_table
from gradvar.estimators.intervals import THESE_PROMPTS
from gradvar.estimators.law_samples import ALL_RESPONSES
from gradvar.estimators.law_tables import law_table
from gradvar.runs.records import Estimate, PromptScores

FAMILIES: dict[str, tuple[str, ...]] = {
    "law": ("deviation_exponent", "within_exponent"),
    "cv": ("cv", "noise_scale"),
    "alpha": ("eta", "alpha_star_eta", "alpha_star_cv"),
}
"""What one table gives."""
COMPARED = tuple(quantity for family in FAMILIES.values() for quantity in family)

Found = dict[tuple[str | None, str], Estimate]
"""(prompt_id or None for all prompts, quantity) to the estimate, of one target."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How every run's numbers are made."""

    rule: str
    alpha: float | None
    group_size: int
    advantage: str
    grid: tuple[float, ...]
    level: float
    permutations: int
    seed: int

    def estimates(self, family: str, prompts: Sequence[PromptScores], run: str) -> Found:
        """Return the family's quantities of one run and target, per prompt and over all `prompts`.

        Where there is one prompt, or one that has an estimate, its number stands for all.

        Raises:
            GradvarError: As the tables; the message names the run.
        """
        try:
            tables = self._tables(family, prompts)
        except GradvarError as error:
            raise GradvarError(f"run {run!r}: {error}") from error
        found: Found = {}
        for quantity, table in tables.items():
            for row in table[table["estimand"].isna() | (table["estimand"] == THESE_PROMPTS)].to_dict("records"):
                name = row["prompt_id"] if isinstance(row["prompt_id"], str) else None
                found[name, quantity] = _estimate(row, self.seed)
            alone = [found[p.prompt_id, quantity] for p in prompts if (p.prompt_id, quantity) in found]
            usable = [one for one in alone if not math.isnan(one.value)] or alone
            if usable and (None, quantity) not in found:
                found[None, quantity] = usable[0]
        for (name, quantity), estimate in list(found.items()):
            if quantity == "cv":
                found[name, "noise_scale"] = replace(
                    estimate,
                    value=self.group_size * estimate.value**2,
                    low=self.group_size * estimate.low**2,
                    high=self.group_size * estimate.high**2,
                    method=f"n CV^2, responses; {estimate.method}",
                )
        return found

    def _tables(self, family: str, prompts: Sequence[PromptScores]) -> dict[str, pd.DataFrame]:
        common: dict[str, Any] = {"level": self.level, "seed": self.seed}
        drawn: dict[str, Any] = {
            **common,
            "advantage": self.advantage,
            "group_size": self.group_size,
            "permutations": self.permutations,
        }
        if family == "law":
            law = law_table(prompts, advantages_studied=(self.advantage,), subsets=False, exponents_only=True, **common)
            law = law[law["scope"] == ALL_RESPONSES]
            return {quantity: law[law["quantity"] == quantity] for quantity in FAMILIES["law"]}
        if family == "cv":
            alphas = (1.0,) if self.alpha is None else (self.alpha,)
            cv = cv_table(prompts, rules=(self.rule,), alphas=alphas, reference=self.rule, **drawn)
            return {"cv": cv[cv["quantity"] == "cv"]}
        rules = () if self.rule == "vl_norm" else (self.rule,)
        # An alpha off the grid has its own rows; the argmax stays that of the grid, the same in every comparison.
        further = () if self.alpha is None else (self.alpha,)
        alpha = alpha_table(prompts, rules=rules, grid=self.grid, further=further, **drawn)
        tables = {quantity: alpha[alpha["quantity"] == quantity] for quantity in FAMILIES["alpha"]}
        eta = tables["eta"]
        eta = eta[(eta["rule"] == self.rule) | eta["rule"].isna()]
        if self.alpha is not None:
            eta = eta[(eta["alpha"] == self.alpha) | eta["alpha"].isna()]
        return {**tables, "eta": eta}


def has_estimate(quantity: str, found: Found, prompt: str) -> bool:
    """Whether a prompt can take part in a pooled number of this quantity.

    An exponent that was fitted; a CV with a bound, resolved or not; efficiency and best alpha where the prompt's
    groups were drawn. Silent prompts, and those too small for an interval, have none. What is unresolved counts: to
    leave it out would be to choose prompts by their noise.
    """
    if quantity in FAMILIES["alpha"]:
        return (prompt, "alpha_star_eta") in found
    estimate = found.get((prompt, quantity))
    return estimate is not None and not math.isnan(estimate.value if quantity in FAMILIES["law"] else estimate.low)


def _estimate(row: Mapping[Any, Any], seed: int) -> Estimate:
    return Estimate(
        value=float(row["value"]),
        low=float(row["low"]),
        high=float(row["high"]),
        level=float(row["level"]),
        method=str(row["method"]),
        n=int(row["n"]),
        clusters=int(row["clusters"]),
        seed=seed,
    )
