"""The total CV of every rule, prompt and target, and over prompts.

Rows that cannot be estimated are there once, with NaN and a verdict that says why; columns beside the common ones:
    n_needed    responses a prompt that would settle the verdict, not said for prompts like these; a lower bound only
                where n_needed_at_least is true: rho is not positive, or there are too few responses for an interval
    left_out    responses left out of this row because they are unverified
    silent      prompts of this row whose rewards are all equal
    estimand    "these prompts" or, for pooled rows that come twice, "prompts like these"
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.aggregation import Rule, expand_rules
from gradvar.estimators.cv import (
    UNRESOLVED,
    pooled_rho,
    rho_estimate,
)
from gradvar.estimators.cv_rows import CvStudy, MomentsKey, ratio_row, rho_and_cv_rows
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import (
    PERMUTATIONS,
    GroupMoments,
    draw_groups,
    moments_of_kinds,
    variant_coefficients,
)
from gradvar.estimators.inputs import arrange, generator, why_nothing
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE, THESE_PROMPTS, check_level
from gradvar.estimators.ratios import cv_ratio, cv_ratio_across, pooled_cv_ratio
from gradvar.estimators.silent_shares import silent_estimate
from gradvar.estimators.tails import PromptTails
from gradvar.runs.config import ALPHAS, EQUALITY_MARGIN, RULES
from gradvar.runs.records import PromptScores, TableRow, estimate_table


def cv_table(
    groups: Sequence[PromptScores],
    *,
    rules: Sequence[str] = RULES,
    alphas: Sequence[float] = ALPHAS,
    group_size: int = 8,
    advantage: str = "grpo",
    reference: str = "grpo",
    further_references: Sequence[str] = (),
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    equality_margin: float = EQUALITY_MARGIN,
    seed: int,
) -> pd.DataFrame:
    """Total CV of the aggregation rules, per prompt and pooled, with paired ratios against a reference rule.

    Quantities, for every target:
        "rho", "cv"     per prompt; pooled over prompts for both estimands (`method` says which), verdict "resolved",
                        "unresolved" or "silent: all rewards equal"
        "cv_ratio"      CV over the reference rule's on the same permutations; verdict "lower", "higher", "equal" (1
                        up to rounding), "undetermined" or "unresolved"; `against` names the reference, `paper` says
                        what the paper's order asks of the ratio ("at least 1", "at most 1", "equal", "nothing") and
                        `holds` whether it does ("holds", "violated", "undetermined", "not claimed"), `holds_needs` how
                        many responses a prompt would decide that
        "silent_share"  share of groups of this size whose rewards are all equal
    A prompt whose rewards are all equal, whose gradients are all 0 ("no gradient"), or with fewer than two groups of
    verified responses, gets one "cv" row without rule that says so. The first two count in the pooled rows with their
    zeros; too small ones do not.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rules: Names for `aggregation_weights`.
        alphas: Exponents for rules that take one.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`, computed inside each group.
        reference: Rule the ratios are taken against (its first alpha where it takes one).
        further_references: Further rules likewise.
        level: Nominal coverage.
        permutations: Random permutations a prompt.
        equality_margin: CVs count as equal where their ratio's interval lies within [1 / (1 + margin), 1 + margin].
        seed: Of the permutations; each prompt's are its own.

    Returns:
        The table, `n_needed` in responses a prompt.

    Raises:
        GradvarError: Unknown rule, advantage or alpha, or a group size too large for every prompt.
    """
    check_level(level)
    check_advantage(advantage)
    variants = expand_rules(rules, alphas)
    references = [expand_rules([name], alphas)[0] for name in (reference, *further_references)]
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
    studied = list(dict.fromkeys([*variants, *references]))
    moments: dict[str, dict[MomentsKey, GroupMoments]] = {target: {} for target in targets}
    for name, scores in usable.items():
        n = len(scores.lengths)
        if n < 2 * group_size:
            continue
        drawn = draw_groups(n, group_size, permutations, rng=generator(seed, name, "groups"))
        limit = float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max())
        rewards = np.zeros(n) if advantage == "score" else scores.rewards
        kinds = variant_coefficients(drawn, rewards, scores.lengths, studied, advantage=advantage, max_length=limit)
        layout = Layout(groups=drawn, kinds=kinds, n_responses=n)
        # All targets of a prompt at once, so that only one prompt's groups are held at a time.
        for target, prompts in targets.items():
            if name in prompts:
                gram = prompts[name].gram if advantage == "score" else prompts[name].verified().gram
                found = moments_of_kinds(gram, layout)
                for (rule, alpha), own in zip(studied, found, strict=True):
                    moments[target][name, rule.name, alpha] = own
    for target, prompts in targets.items():
        rows += _rows_of_target(
            CvStudy(
                target=target,
                prompts={n: s if advantage == "score" else s.verified() for n, s in prompts.items()},
                left_out={n: left_out[n] for n in prompts},
                nothing={n: why for n, s in prompts.items() if (why := why_nothing(s, advantage)) is not None},
                moments=moments[target],
                advantage=advantage,
                group_size=group_size,
                level=level,
                seed=seed,
                equality_margin=equality_margin,
            ),
            variants,
            references,
        )
    return estimate_table(rows)


def _rows_of_target(
    study: CvStudy, variants: list[tuple[Rule, float | None]], compared_with: list[tuple[Rule, float | None]]
) -> list[TableRow]:
    rows: list[TableRow] = []
    spoken: list[str] = []
    for name, scores in study.prompts.items():
        n = len(scores.lengths)
        if study.advantage != "score" and study.group_size <= n:
            share = silent_estimate(scores.rewards, study.group_size, level=study.level, seed=study.seed)
            rows.append(study.row("silent_share", share, [name]))
        if not any(key[0] == name for key in study.moments):
            method = f"fewer than {2 * study.group_size} verified responses: two disjoint groups are needed"
            estimate = study.plain(math.nan, method, name)
            needed = float(3 * study.group_size)
            rows.append(study.row("cv", estimate, [name], verdict=UNRESOLVED, n_needed=needed, at_least=True))
            continue
        spoken.append(name)
        if name in study.nothing:
            why = study.nothing[name]
            estimate = study.plain(math.nan, f"not estimated; {why}", name)
            rows.append(study.row("cv", estimate, [name], verdict=why, n_needed=math.inf))
    loud = [name for name in spoken if name not in study.nothing]
    references = [
        (compared, [study.moments[name, compared[0].name, compared[1]] for name in spoken])
        for compared in compared_with
    ]
    tails = {name: _tails(study, name) for name in spoken}
    for variant in variants:
        mine = [study.moments[name, variant[0].name, variant[1]] for name in spoken]
        for k, (name, own) in enumerate(zip(spoken, mine, strict=True)):
            if name not in loud:
                continue
            alone = tails[name].alone(variant)
            rho = rho_estimate(own, group_size=study.group_size, level=study.level, tails=alone)
            rows += rho_and_cv_rows(study, variant, rho, [name])
            for compared, theirs in references:
                if variant != compared:
                    beside = tails[name].beside(variant, compared)
                    ratio = cv_ratio(own, theirs[k], group_size=study.group_size, level=study.level, tails=beside)
                    rows.append(ratio_row(study, variant, compared, ratio, [name]))
        if len(study.prompts) < 2 or not loud:
            continue
        # A prompt without interval would leave all together without one.
        held = [k for k, name in enumerate(spoken) if len(study.prompts[name].lengths) >= 3 * study.group_size]
        held = held or list(range(len(spoken)))
        pool, mine = [spoken[k] for k in held], [mine[k] for k in held]
        ends = [tails[name].alone(variant) for name in pool]
        both = pooled_rho(mine, group_size=study.group_size, level=study.level, tails=ends)
        for rho, estimand in zip(both, (THESE_PROMPTS, PROMPTS_LIKE_THESE), strict=True):
            rows += rho_and_cv_rows(study, variant, rho, pool, pooled=True, estimand=estimand)
        for compared, theirs in references:
            if variant != compared:
                other = [theirs[k] for k in held]
                ends = [tails[name].beside(variant, compared) for name in pool]
                ratio = pooled_cv_ratio(mine, other, group_size=study.group_size, level=study.level, tails=ends)
                across = cv_ratio_across(mine, other, ratio, level=study.level)
                for one, estimand in ((ratio, THESE_PROMPTS), (across, PROMPTS_LIKE_THESE)):
                    rows.append(ratio_row(study, variant, compared, one, pool, pooled=True, estimand=estimand))
    return rows


def _tails(study: CvStudy, name: str) -> PromptTails:
    scores = study.prompts[name]
    return PromptTails.of(
        scores.gram, scores.rewards, scores.lengths, advantage=study.advantage, max_length=scores.max_length
    )
