"""The assumption audit: what the paper's theory takes for granted, each with figure, interval, margin and verdict.

    0  the rollouts come from this policy at this temperature   `identity`
    1  token gradients are uncorrelated                         `token_covariance`
    2  Var(g_i) = V L_i                                         `law_tables`
    3  responses are independent given the group's baseline     `baselines`
    4  E[g | L] = grad J                                        `length_bins`

"supported" only where the interval lies inside the margin, "rejected" only where it lies wholly outside, else
"undetermined" with the responses it would take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators.additive import Sums
from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.aggregation import Rule, expand_rules
from gradvar.estimators.audit_rows import (
    Audit,
    Taus,
    baseline_rows,
    identity_rows,
    law_rows,
    length_rows,
    taus_of,
    token_rows,
)
from gradvar.estimators.baselines import Baselines
from gradvar.estimators.cv import SILENT
from gradvar.estimators.groups import PERMUTATIONS, draw_groups
from gradvar.estimators.inputs import arrange, generator, why_nothing
from gradvar.estimators.intervals import check_level
from gradvar.runs.records import PromptScores, estimate_table


def audit_table(
    groups: Sequence[PromptScores],
    *,
    group_size: int = 8,
    advantage: str = "grpo",
    rule: str = "grpo",
    alpha: float | None = None,
    level: float = 0.95,
    identity_margin: float = 0.1,
    token_margin: float = 0.1,
    exponent_margin: float = 0.25,
    baseline_margin: float = 0.1,
    length_margin: float = 0.25,
    permutations: int = PERMUTATIONS,
    taus: Taus | None = None,
    tau_errors: Taus | None = None,
    seed: int,
) -> pd.DataFrame:
    """Assumptions 0 to 4 for every prompt and target, and over prompts for both estimands.

    Quantities by `assumption`:
        0  "identity_signal" (judged), "identity_p_value"            the score
        1  "token_covariance_share" (judged), `scope` says which responses; "not measured" where taus are absent, the
           command in `method`                                       the score
        2  "deviation_exponent", "within_exponent" (judged)          the advantage-weighted gradient
        3  "baseline_ratio" (judged): variance with the group's baseline over that with the baseline of all N, both in
           units of sum_i ||c_i s_i||^2, beside "baseline_variance_ratio" and "baseline_norm_ratio", its two factors
        4  "between_length_share" (judged): sum_b p_b ||m_b - m||^2 / ||m||^2 with Fieller's set; "bin_square"
           ||m_b||^2, which may come out negative, and "bin_cosine" of every two bins, `scope` says which
           (NaN, "unresolved" in `method`, where either square is not told apart from 0)

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`.
        rule: Aggregation of assumption 3.
        alpha: Exponent of vl_norm.
        level: Nominal coverage.
        identity_margin: n ||E s||^2 / E||s||^2 below it.
        token_margin: Absolute share below it.
        exponent_margin: Exponent within it of 1.
        baseline_margin: Ratio within it of 1.
        length_margin: Share below it.
        permutations: Random permutations a prompt for assumption 3.
        taus: tau of every response by (prompt_id, target), where it was measured.
        tau_errors: Their standard errors over probes likewise, for `probe_part`.
        seed: Of permutations, sign flips and ties.

    Returns:
        The table with `assumption`, `margin_low`, `margin_high`, `n_needed` (responses of all prompts of the row, where
        `n_needed_at_least` a lower bound), `estimand`, `length_low`, `length_high` (tokens), `probe_part` (the part of
        assumption 1's squared error that more probes would lower) and `silent` (prompts of the row with equal rewards).
        Silent prompts have their verdict in 2 to 4 where the advantage has a baseline; they do not count in pooled
        rows.

    Raises:
        GradvarError: Unknown advantage or rule, a margin that is not positive, or as `arrange`.
    """
    check_level(level)
    check_advantage(advantage)
    margins = (identity_margin, token_margin, exponent_margin, baseline_margin, length_margin)
    if not all(margin > 0 for margin in margins):
        raise GradvarError(f"margins must be positive, received {margins}")
    found, a = expand_rules((rule,), () if alpha is None else (alpha,))[0]
    audit = Audit(advantage=advantage, group_size=group_size, level=level, seed=seed)
    targets = arrange(groups)
    baselines = _baseline_sums(audit, targets, found, a, permutations)
    for target, prompts in targets.items():
        identity_rows(audit, target, prompts, identity_margin)
        token_rows(audit, target, prompts, taus_of(target, targets, taus), token_margin, tau_errors or {})
        usable: dict[str, PromptScores] = {}
        for name, raw in prompts.items():
            scores = audit.studied(raw)
            if (why := why_nothing(raw, advantage)) is not None:
                for assumption, quantity in ((3, "baseline_ratio"), (4, "between_length_share")):
                    audit.nothing(
                        assumption,
                        quantity,
                        f"not estimated; {why}",
                        why,
                        len(scores.lengths),
                        target=target,
                        prompt_id=name,
                        silent=int(why == SILENT),
                    )
            else:
                usable[name] = scores
        baseline_rows(audit, target, usable, baselines[target], baseline_margin, found, a)
        length_rows(audit, target, usable, length_margin)
    law_rows(audit, groups, exponent_margin)
    table = estimate_table(audit.rows)
    return table.sort_values("assumption", kind="stable", ignore_index=True).astype({"assumption": "Int64"})


def _baseline_sums(
    audit: Audit,
    targets: Mapping[str, Mapping[str, PromptScores]],
    rule: Rule,
    alpha: float | None,
    permutations: int,
) -> dict[str, dict[str, Sums]]:
    """Sums of assumption 3 by target and prompt, of prompts with three groups and an advantage.

    All targets of a prompt at once, so that only one prompt's groups are held at a time.
    """
    found: dict[str, dict[str, Sums]] = {target: {} for target in targets}
    everyone = {name: scores for prompts in targets.values() for name, scores in prompts.items()}
    for name, raw in everyone.items():
        one = audit.studied(raw)
        n = len(one.lengths)
        mine = {target: prompts[name] for target, prompts in targets.items() if name in prompts}
        mine = {target: scores for target, scores in mine.items() if why_nothing(scores, audit.advantage) is None}
        if n < 3 * audit.group_size or not mine:
            continue
        baselines = Baselines.of(
            draw_groups(n, audit.group_size, permutations, rng=generator(audit.seed, name, "groups")),
            np.zeros(n) if audit.advantage == "score" else one.rewards,
            one.lengths,
            rule,
            advantage=audit.advantage,
            alpha=alpha,
            max_length=float(one.max_length) if one.max_length > 0 else float(one.lengths.max()),
        )
        for target, scores in mine.items():
            found[target][name] = baselines.sums(audit.studied(scores).gram)
    return found
