"""Tables that the stages write: identity and CV. The law's table is `law_table` in `law_tables`.

Rows that cannot be estimated are there once, with NaN and a verdict that says why; columns beside the common ones:
    n_needed    responses that would settle the verdict
    left_out    responses left out of this row because they are unverified
    silent      prompts of this row whose rewards are all equal
    estimand    "these prompts" or, for pooled rows that come twice, "prompts like these"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.aggregation import Rule, check_rule_arguments, find_rule
from gradvar.estimators.cv import (
    SILENT,
    UNRESOLVED,
    cv_from_rho,
    cv_ratio,
    n_to_resolve,
    pooled_cv_ratio,
    pooled_rho,
    resolution,
    rho_estimate,
)
from gradvar.estimators.groups import (
    PERMUTATIONS,
    draw_groups,
    group_coefficients,
    group_moments,
    loud_groups,
    silent_share,
)
from gradvar.estimators.identity import IdentityCheck, identity_from_parts, identity_parts
from gradvar.estimators.inputs import arrange, generator, is_silent
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE, THESE_PROMPTS, check_level
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table

RULES_COMPARED = ("grpo", "dapo", "dr_grpo", "vl_norm")
ALPHAS = (0.5, 0.75, 1.0, 2.0)


def identity_table(
    groups: Sequence[PromptScores],
    *,
    group_size: int = 8,
    margin: float = 0.1,
    level: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Check E s = 0 for every prompt and target, and over all prompts together.

    Quantities: "identity_signal" (n ||E s||^2 / E||s||^2, verdict and n_needed) and "identity_p_value".

    Raises:
        GradvarError: As `score_identity` and `arrange` do.
    """
    rows: list[TableRow] = []
    for target, prompts in arrange(groups).items():
        parts = {
            name: identity_parts(scores.gram, rng=generator(seed, name, "identity")) for name, scores in prompts.items()
        }
        for name, part in parts.items():
            check = identity_from_parts([part], group_size=group_size, margin=margin, level=level)
            rows += _identity_rows(check, target, name, group_size, seed)
        if len(parts) > 1:
            check = identity_from_parts(list(parts.values()), group_size=group_size, margin=margin, level=level)
            rows += _identity_rows(check, target, None, group_size, seed)
    return estimate_table(rows)


def _identity_rows(
    check: IdentityCheck, target: str, prompt_id: str | None, group_size: int, seed: int
) -> list[TableRow]:
    return [
        TableRow(
            quantity=quantity,
            estimate=replace(estimate, seed=seed),
            target=target,
            prompt_id=prompt_id,
            advantage="score",
            group_size=group_size,
            verdict=check.verdict if quantity == "identity_signal" else None,
            extra={"n_needed": check.n_needed if quantity == "identity_signal" else math.nan},
        )
        for quantity, estimate in (("identity_signal", check.signal), ("identity_p_value", check.p_value))
    ]


def expand_rules(rules: Sequence[str], alphas: Sequence[float]) -> list[tuple[Rule, float | None]]:
    """Return each rule once, and once per alpha where it takes one.

    Raises:
        GradvarError: Unknown rule, an alpha that is not a finite number, or no alpha for a rule that takes one.
    """
    variants: list[tuple[Rule, float | None]] = []
    for name in rules:
        rule = find_rule(name)
        if rule.takes_alpha and not alphas:
            raise GradvarError(f"rule {rule.name!r} needs at least one alpha, for example 1.0")
        for alpha in alphas if rule.takes_alpha else (None,):
            check_rule_arguments(rule, alpha=alpha, max_length=1.0)
            variants.append((rule, None if alpha is None else float(alpha)))
    return variants


def cv_table(
    groups: Sequence[PromptScores],
    *,
    rules: Sequence[str] = RULES_COMPARED,
    alphas: Sequence[float] = ALPHAS,
    group_size: int = 8,
    advantage: str = "grpo",
    reference: str = "grpo",
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    overlong_filtering: bool = False,
    dynamic_sampling: bool = False,
    seed: int,
) -> pd.DataFrame:
    """Total CV of the aggregation rules, per prompt and pooled, with paired ratios against a reference rule.

    Quantities, for every target:
        "rho", "cv"     per prompt; pooled over prompts for both estimands (`method` says which), verdict "resolved",
                        "unresolved" or "silent: all rewards equal"
        "cv_ratio"      CV over the reference rule's on the same permutations; verdict "lower", "higher",
                        "undetermined" or "unresolved"; `paper` says what the paper's order asks of it ("at least 1",
                        "equal", "nothing") and `holds` whether it does ("holds", "violated", "undetermined",
                        "not claimed")
        "silent_share"  share of groups of this size whose rewards are all equal
    A prompt whose rewards are all equal, or with fewer than two groups of verified responses, gets one "cv" row
    without rule that says so. Silent prompts count in the pooled rows with their zeros; too small ones do not.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rules: Names for `aggregation_weights`.
        alphas: Exponents for rules that take one.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`, computed inside each group.
        reference: Rule the ratios are taken against (its first alpha where it takes one).
        level: Nominal coverage.
        permutations: Random permutations a prompt.
        overlong_filtering: Take truncated responses out of the loss, as DAPO does; their reward stays in the baseline.
        dynamic_sampling: Estimate given that a group's rewards differ, as DAPO's resampling makes them; pooled rows
            then leave silent prompts out.
        seed: Of the permutations; each prompt's are its own.

    Returns:
        The table, `n_needed` in responses a prompt.

    Raises:
        GradvarError: Unknown rule, advantage or alpha, or a group size too large for every prompt.
    """
    check_level(level)
    check_advantage(advantage)
    variants = expand_rules(rules, alphas)
    compared = expand_rules([reference], alphas)[0]
    targets = arrange(groups)
    rows: list[TableRow] = []
    everyone = {name: scores for prompts in targets.values() for name, scores in prompts.items()}
    usable = {name: s if advantage == "score" else s.verified() for name, s in everyone.items()}
    largest = max(len(s.lengths) for s in usable.values())
    if 0 < largest < 2 * group_size:
        raise GradvarError(
            f"group size {group_size} needs at least {2 * group_size} verified responses to a prompt (two disjoint "
            f"groups), the most any prompt has is {largest}: sample more, or ask for a smaller group"
        )
    left_out = {name: len(everyone[name].lengths) - len(s.lengths) for name, s in usable.items()}
    silent = {name for name, s in everyone.items() if advantage not in ("score", "raw") and is_silent(s)}
    drawn: dict[str, NDArray[np.intp]] = {}
    coefficients: dict[tuple[str, str, float | None], NDArray[np.float64]] = {}
    kept: dict[str, NDArray[np.bool_]] = {}
    for name, scores in usable.items():
        n = len(scores.lengths)
        if n < 2 * group_size:
            continue
        drawn[name] = draw_groups(n, group_size, permutations, rng=generator(seed, name, "groups"))
        limit = float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max())
        for rule, alpha in {*variants, compared}:
            coefficients[name, rule.name, alpha] = group_coefficients(
                drawn[name],
                np.zeros(n) if advantage == "score" else scores.rewards,
                scores.lengths,
                rule,
                advantage=advantage,
                alpha=alpha,
                max_length=limit,
                masked=scores.truncated if overlong_filtering else None,
            )
        if dynamic_sampling and advantage != "score":
            kept[name] = loud_groups(drawn[name], scores.rewards)
    for target, prompts in targets.items():
        rows += _rows_of_target(
            _Study(
                target=target,
                prompts={n: s if advantage == "score" else s.verified() for n, s in prompts.items()},
                left_out={n: left_out[n] for n in prompts},
                silent=silent & set(prompts),
                drawn=drawn,
                coefficients=coefficients,
                kept=kept,
                extras=", ".join(
                    word
                    for word, on in (
                        ("overlong filtering", overlong_filtering),
                        ("dynamic sampling", dynamic_sampling),
                    )
                    if on
                ),
                advantage=advantage,
                group_size=group_size,
                level=level,
                seed=seed,
            ),
            variants,
            compared,
        )
    return estimate_table(rows)


@dataclass(frozen=True, kw_only=True)
class _Study:
    """One target's prompts with what was drawn for them."""

    target: str
    prompts: dict[str, PromptScores]
    left_out: dict[str, int]
    silent: set[str]
    drawn: dict[str, NDArray[np.intp]]
    coefficients: dict[tuple[str, str, float | None], NDArray[np.float64]]
    kept: dict[str, NDArray[np.bool_]]
    extras: str
    advantage: str
    group_size: int
    level: float
    seed: int

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
        estimand: str = THESE_PROMPTS,
        paper: str | None = None,
        holds: str | None = None,
    ) -> TableRow:
        rule, alpha = variant if variant is not None else (None, None)
        return TableRow(
            quantity=quantity,
            estimate=replace(
                estimate,
                seed=self.seed,
                method=f"{estimate.method}; with {self.extras}" if self.extras else estimate.method,
            ),
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
                "left_out": sum(self.left_out[name] for name in prompts),
                "silent": sum(name in self.silent for name in prompts),
                "estimand": estimand,
                "paper": paper,
                "holds": holds,
            },
        )

    def plain(self, value: float, method: str, prompt_id: str) -> Estimate:
        return Estimate(
            value=value,
            low=math.nan,
            high=math.nan,
            level=self.level,
            method=method,
            n=len(self.prompts[prompt_id].lengths),
            clusters=1,
            seed=None,
        )


def _rows_of_target(
    study: _Study, variants: list[tuple[Rule, float | None]], compared: tuple[Rule, float | None]
) -> list[TableRow]:
    rows: list[TableRow] = []
    spoken: list[str] = []
    for name, scores in study.prompts.items():
        n = len(scores.lengths)
        if study.advantage != "score" and study.group_size <= n:
            share = silent_share(scores.rewards, study.group_size)
            method = "exact over groups drawn without replacement, no interval"
            rows.append(study.row("silent_share", study.plain(share, method, name), [name]))
        if name not in study.drawn:
            method = f"fewer than {2 * study.group_size} verified responses: two disjoint groups are needed"
            estimate = study.plain(math.nan, method, name)
            needed = float(3 * study.group_size)
            rows.append(study.row("cv", estimate, [name], verdict=UNRESOLVED, n_needed=needed))
            continue
        spoken.append(name)
        if name in study.silent:
            estimate = study.plain(math.nan, f"not estimated; {SILENT}", name)
            rows.append(study.row("cv", estimate, [name], verdict=SILENT, n_needed=math.inf))
    loud = [name for name in spoken if name not in study.silent]
    if study.kept:
        spoken = loud
    moments = {
        (name, rule.name, alpha): group_moments(
            study.prompts[name].gram,
            study.drawn[name],
            study.coefficients[name, rule.name, alpha],
            study.kept.get(name),
        )
        for name in spoken
        for rule, alpha in {*variants, compared}
    }
    references = [moments[name, compared[0].name, compared[1]] for name in spoken]
    for variant in variants:
        mine = [moments[name, variant[0].name, variant[1]] for name in spoken]
        for name, own, reference in zip(spoken, mine, references, strict=True):
            if name not in loud:
                continue
            rows += _rho_and_cv(
                study, variant, rho_estimate(own, group_size=study.group_size, level=study.level), [name]
            )
            if variant != compared:
                ratio = cv_ratio(own, reference, group_size=study.group_size, level=study.level)
                rows.append(_ratio_row(study, variant, compared, ratio, [name]))
        if len(study.prompts) < 2 or not loud:
            continue
        both = pooled_rho(mine, group_size=study.group_size, level=study.level)
        for rho, estimand in zip(both, (THESE_PROMPTS, PROMPTS_LIKE_THESE), strict=True):
            rows += _rho_and_cv(study, variant, rho, spoken, pooled=True, estimand=estimand)
        if variant != compared:
            ratio = pooled_cv_ratio(mine, references, group_size=study.group_size, level=study.level)
            rows.append(_ratio_row(study, variant, compared, ratio, spoken, pooled=True))
    return rows


def _rho_and_cv(
    study: _Study,
    variant: tuple[Rule, float | None],
    rho: Estimate,
    prompts: Sequence[str],
    *,
    pooled: bool = False,
    estimand: str = THESE_PROMPTS,
) -> list[TableRow]:
    verdict, needed = resolution(rho), n_to_resolve(rho, study.group_size)
    return [
        study.row(
            quantity,
            estimate,
            prompts,
            pooled=pooled,
            variant=variant,
            verdict=verdict,
            n_needed=needed,
            estimand=estimand,
        )
        for quantity, estimate in (("rho", rho), ("cv", cv_from_rho(rho)))
    ]


def _ratio_row(
    study: _Study,
    variant: tuple[Rule, float | None],
    compared: tuple[Rule, float | None],
    ratio: Estimate,
    prompts: Sequence[str],
    *,
    pooled: bool = False,
) -> TableRow:
    per_prompt = ratio.n / max(ratio.clusters, 1)
    if not math.isfinite(ratio.value):
        verdict, needed = UNRESOLVED, math.nan
    elif ratio.high < 1.0 or ratio.low > 1.0:
        verdict, needed = ("lower" if ratio.high < 1.0 else "higher"), float(math.ceil(per_prompt))
    else:
        verdict, distance = "undetermined", abs(math.log(ratio.value))
        half = math.log(ratio.high / ratio.value)
        needed = float(math.ceil(per_prompt * (half / distance) ** 2)) if distance > 0 else math.inf
    paper, holds = _order_on_the_total(variant, compared, verdict)
    return study.row(
        "cv_ratio",
        ratio,
        prompts,
        pooled=pooled,
        variant=variant,
        verdict=verdict,
        n_needed=needed,
        paper=paper,
        holds=holds,
    )


def _order_on_the_total(
    variant: tuple[Rule, float | None], compared: tuple[Rule, float | None], verdict: str
) -> tuple[str, str]:
    """What the paper's order asks of this ratio, and whether the total CV (form 3) agrees.

    The paper has vl_norm(1) equal to grpo and vl_norm(alpha), 0 <= alpha < 1, dapo and dr_grpo at least it. It proves
    that with lengths given; on the total CV equality can only be refuted.
    """
    rule, alpha = variant
    if compared[0].name != "grpo":
        return "nothing", "not claimed"
    if rule.name == "vl_norm" and alpha == 1.0:
        return "equal", "violated" if verdict in ("lower", "higher") else "undetermined"
    if rule.name in ("dapo", "dr_grpo") or (rule.name == "vl_norm" and alpha is not None and 0.0 <= alpha < 1.0):
        return "at least 1", {"higher": "holds", "lower": "violated"}.get(verdict, "undetermined")
    return "nothing", "not claimed"
