"""The audit's rows, one function an assumption. The table and the verdicts' meaning are in `audit`.

Shape letters: N responses of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gradvar.estimators.additive import Sums, of_prompts_like_these, of_these_prompts, ratio_of_signals
from gradvar.estimators.aggregation import Rule
from gradvar.estimators.baselines import (
    log_independence_ratio,
    log_norm_ratio,
    log_variance_ratio,
)
from gradvar.estimators.bias import gated
from gradvar.estimators.cosines import within_one
from gradvar.estimators.cv import NO_GRADIENT
from gradvar.estimators.identity import (
    REJECTED,
    SUPPORTED,
    UNDETERMINED,
    VERDICTS,
    IdentityParts,
    identity_from_parts,
    identity_parts,
)
from gradvar.estimators.identity_tables import why_no_identity
from gradvar.estimators.inputs import SUM_TARGET, generator, has_gradient
from gradvar.estimators.intervals import (
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    decide_from_margin,
    n_to_decide,
)
from gradvar.estimators.law import NOT_PROPORTIONAL, PROPORTIONAL
from gradvar.estimators.law_samples import ALL_RESPONSES
from gradvar.estimators.law_tables import law_table
from gradvar.estimators.length_bins import SMALLEST_BIN, BinProducts, bin_products, cosine_of_pair, length_bins
from gradvar.estimators.token_covariance import METHOD as SHARE_METHOD
from gradvar.estimators.token_covariance import probe_part, share_estimate, share_statistic, share_sums
from gradvar.runs.records import Estimate, PromptScores, TableRow, no_estimate

NOT_MEASURED = "not measured"
MEASURE_TAUS = "gradvar measure RUN --probes 4"
"""The command that measures tau."""

Taus = Mapping[tuple[str, str], Any]
"""(prompt_id, target) to (N,) taus of all its responses, NaN where not measured."""

_GROUPS = "permutation groups, delete-one jackknife of the log, t"
_BINS = "cross products of length bins, delete-one jackknife, Fieller"
_MEANS = "cross products of length bins, delete-one jackknife, t"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Options, and the rows written so far."""

    advantage: str
    group_size: int
    level: float
    seed: int
    rows: list[TableRow] = field(default_factory=list)

    def studied(self, scores: PromptScores) -> PromptScores:
        """The responses that an advantage is defined for."""
        return scores if self.advantage == "score" else scores.verified()

    def add(
        self,
        assumption: int,
        quantity: str,
        estimate: Estimate,
        *,
        target: str,
        prompt_id: str | None,
        margin: tuple[float, float] = (math.nan, math.nan),
        verdict: str | None = None,
        n_needed: float = math.nan,
        at_least: bool = False,
        estimand: str = THESE_PROMPTS,
        advantage: str | None = None,
        scope: str = ALL_RESPONSES,
        group_size: int | None = None,
        rule: str | None = None,
        alpha: float | None = None,
        lengths: tuple[float, float] = (math.nan, math.nan),
        silent: int = 0,
        probe_part: float = math.nan,
    ) -> None:
        """Write one row."""
        self.rows.append(
            TableRow(
                quantity=quantity,
                estimate=replace(estimate, seed=self.seed),
                target=target,
                prompt_id=prompt_id,
                advantage=advantage or self.advantage,
                scope=scope,
                rule=rule,
                alpha=alpha,
                group_size=group_size,
                verdict=verdict,
                extra={
                    "assumption": assumption,
                    "margin_low": margin[0],
                    "margin_high": margin[1],
                    "n_needed": n_needed,
                    "n_needed_at_least": at_least,
                    "estimand": estimand,
                    "length_low": lengths[0],
                    "length_high": lengths[1],
                    "silent": silent,
                    "probe_part": probe_part,
                },
            )
        )

    def judged(
        self, assumption: int, quantity: str, estimate: Estimate, margin: tuple[float, float], **more: Any
    ) -> None:
        """Write a row whose verdict follows from its interval and margin."""
        where = (estimate.value, estimate.low, estimate.high, *margin)
        verdict = VERDICTS[decide_from_margin(*where)]
        needed = n_to_decide(estimate.n, *where)
        self.add(assumption, quantity, estimate, margin=margin, verdict=verdict, n_needed=needed, **more)

    def nothing(self, assumption: int, quantity: str, why: str, verdict: str, n: int, **more: Any) -> None:
        """Write a row without a number."""
        self.add(assumption, quantity, no_estimate(why, n=n, level=self.level), verdict=verdict, **more)


def identity_rows(audit: Audit, target: str, prompts: Mapping[str, PromptScores], margin: float) -> None:
    """Assumption 0."""
    common: dict[str, Any] = {"target": target, "advantage": "score", "group_size": audit.group_size}
    parts: dict[str, IdentityParts] = {}
    for name, scores in prompts.items():
        missing = why_no_identity(scores)
        if missing is None:
            parts[name] = identity_parts(scores.gram, rng=generator(audit.seed, name, "identity"))
        else:
            why, n = f"not estimated; {missing[0]}", len(scores.lengths)
            audit.nothing(0, "identity_signal", why, missing[1], n, prompt_id=name, **common)
    pools: list[tuple[str | None, list[IdentityParts]]] = [(name, [part]) for name, part in parts.items()]
    if len(parts) > 1:
        pools.append((None, list(parts.values())))
    for label, pool in pools:
        check = identity_from_parts(pool, group_size=audit.group_size, margin=margin, level=audit.level)
        audit.add(
            0,
            "identity_signal",
            check.signal,
            prompt_id=label,
            margin=(-math.inf, margin),
            verdict=check.verdict,
            n_needed=check.n_needed,
            **common,
        )
        audit.add(0, "identity_p_value", check.p_value, prompt_id=label, **common)
    if len(parts) > 1:
        sums = [
            Sums(
                value=np.array([p.off_diagonal, p.diagonal]),
                without=np.stack([p.off_diagonal_without, p.diagonal_without], axis=1),
            )
            for p in parts.values()
        ]
        across = of_prompts_like_these(
            sums,
            lambda p: np.asarray(audit.group_size * p[..., 0] / p[..., 1]),
            level=audit.level,
            method="mean inner product of different responses, delete-one jackknife, t",
        )
        audit.judged(
            0, "identity_signal", across, (-math.inf, margin), prompt_id=None, estimand=PROMPTS_LIKE_THESE, **common
        )


def taus_of(target: str, targets: Mapping[str, Mapping[str, PromptScores]], taus: Taus | None) -> dict[str, Any]:
    """Taus of one target by prompt; those of the sum add up, since its parameters are disjoint."""
    found: dict[str, Any] = {}
    for name in targets[target] if taus else ():
        if (name, target) in taus:  # type: ignore[operator]
            found[name] = taus[name, target]  # type: ignore[index]
        elif target == SUM_TARGET:
            parts = [taus.get((name, other)) for other in targets if other != SUM_TARGET]  # type: ignore[union-attr]
            if parts and all(part is not None for part in parts):
                found[name] = np.sum(np.asarray(parts, dtype=np.float64), axis=0)
    return found


def token_rows(
    audit: Audit,
    target: str,
    prompts: Mapping[str, PromptScores],
    taus: Mapping[str, Any],
    margin: float,
    errors: Taus,
) -> None:
    """Assumption 1."""
    scopes: dict[str, list[Sums]] = {}
    common: dict[str, Any] = {"target": target, "advantage": "score"}
    for name, scores in prompts.items():
        if not has_gradient(scores):
            why, n = f"not estimated; {NO_GRADIENT}", len(scores.lengths)
            edges = (-margin, margin)
            audit.nothing(1, "token_covariance_share", why, NO_GRADIENT, n, prompt_id=name, margin=edges, **common)
            continue
        if name not in taus or np.isnan(np.asarray(taus[name], dtype=np.float64)).all():
            audit.nothing(
                1,
                "token_covariance_share",
                f"{NOT_MEASURED}: {MEASURE_TAUS}",
                NOT_MEASURED,
                len(scores.lengths),
                prompt_id=name,
                margin=(-margin, margin),
                **common,
            )
            continue
        found = share_sums(np.diagonal(scores.gram), taus[name], scores.lengths, scores.rewards)
        for scope, (sums, chosen) in found.items():
            scopes.setdefault(scope, []).append(sums)
            ends = (float(scores.lengths[chosen].min()), float(scores.lengths[chosen].max()))
            known = errors.get((name, target))
            part = probe_part(sums, None if known is None else np.asarray(known, dtype=np.float64)[chosen])
            more = {"prompt_id": name, "scope": scope, "lengths": ends, "probe_part": part}
            _share_row(audit, [sums], margin, **more, **common)
    for scope, pool in scopes.items():
        if len(pool) > 1:
            _share_row(audit, pool, margin, prompt_id=None, scope=scope, **common)
            across = of_prompts_like_these(pool, share_statistic, level=audit.level, method=SHARE_METHOD)
            more = {**common, "prompt_id": None, "scope": scope, "estimand": PROMPTS_LIKE_THESE}
            audit.judged(1, "token_covariance_share", across, (-margin, margin), **more)


def _share_row(audit: Audit, pool: list[Sums], margin: float, **more: Any) -> None:
    share, verdict, needed = share_estimate(pool, margin=margin, level=audit.level)
    audit.add(1, "token_covariance_share", share, margin=(-margin, margin), verdict=verdict, n_needed=needed, **more)


def law_rows(audit: Audit, groups: Sequence[PromptScores], margin: float) -> None:
    """Assumption 2."""
    table = law_table(
        groups,
        advantages_studied=(audit.advantage,),
        subsets=False,
        exponents_only=True,
        margin=margin,
        level=audit.level,
        seed=audit.seed,
    )
    verdicts = {PROPORTIONAL: SUPPORTED, NOT_PROPORTIONAL: REJECTED}
    for row in table[table["quantity"].isin(["deviation_exponent", "within_exponent"])].to_dict("records"):
        estimate = Estimate(
            value=row["value"],
            low=row["low"],
            high=row["high"],
            level=audit.level,
            method=row["method"],
            n=row["n"],
            clusters=row["clusters"],
            seed=audit.seed,
        )
        audit.add(
            2,
            row["quantity"],
            estimate,
            target=row["target"],
            prompt_id=row["prompt_id"] if isinstance(row["prompt_id"], str) else None,
            margin=(1.0 - margin, 1.0 + margin),
            verdict=verdicts.get(row["verdict"], row["verdict"]),
            n_needed=row["n_needed"],
            at_least=bool(row["n_needed_at_least"]),
            estimand=row["estimand"],
            silent=row["silent"],
        )


def baseline_rows(
    audit: Audit,
    target: str,
    prompts: Mapping[str, PromptScores],
    parts: Mapping[str, Sums],
    margin: float,
    rule: Rule,
    alpha: float | None,
) -> None:
    """Assumption 3, from its sums by prompt."""
    edges = (1.0 - margin, 1.0 + margin)
    common: dict[str, Any] = {"target": target, "group_size": audit.group_size, "rule": rule.name, "alpha": alpha}
    for name, scores in prompts.items():
        if name not in parts:
            why = f"fewer than {3 * audit.group_size} verified responses"
            audit.nothing(
                3, "baseline_ratio", why, UNDETERMINED, len(scores.lengths), prompt_id=name, margin=edges, **common
            )
    pools: list[tuple[str | None, list[Sums]]] = [(name, [own]) for name, own in parts.items()]
    if len(parts) > 1:
        pools.append((None, list(parts.values())))
    for label, pool in pools:
        for quantity, statistic in (
            ("baseline_ratio", log_independence_ratio),
            ("baseline_variance_ratio", log_variance_ratio),
            ("baseline_norm_ratio", log_norm_ratio),
        ):
            ratio = of_these_prompts(pool, statistic, level=audit.level, method=_GROUPS, back=_exp)
            if quantity != "baseline_ratio":
                audit.add(3, quantity, ratio, prompt_id=label, **common)
                continue
            audit.judged(3, quantity, ratio, edges, prompt_id=label, **common)
            if label is None:
                across = of_prompts_like_these(pool, statistic, level=audit.level, method=_GROUPS, back=_exp)
                audit.judged(3, quantity, across, edges, prompt_id=None, estimand=PROMPTS_LIKE_THESE, **common)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0)) if not math.isnan(x) else math.nan


def length_rows(audit: Audit, target: str, prompts: Mapping[str, PromptScores], margin: float) -> None:
    """Assumption 4."""
    edges = (-math.inf, margin)
    found: dict[str, BinProducts] = {}
    for name, scores in prompts.items():
        n = len(scores.lengths)
        bins = length_bins(scores.lengths)
        if bins.max() == 0:
            why = f"no two length bins of {SMALLEST_BIN} responses: too few responses, or lengths"
            more: dict[str, Any] = {"target": target, "prompt_id": name, "margin": edges}
            audit.nothing(4, "between_length_share", why, UNDETERMINED, n, **more)
            continue
        rewards = np.zeros(n) if audit.advantage == "score" else scores.rewards
        found[name] = bin_products(scores.gram, rewards, scores.lengths, bins, advantage=audit.advantage)
        _bin_rows(audit, found[name], target=target, prompt_id=name)
    signals = {name: one.signals() for name, one in found.items()}
    pools: list[tuple[str | None, list[Sums], bool]] = [(name, [own], False) for name, own in signals.items()]
    if len(signals) > 1:
        pools += [(None, list(signals.values()), False), (None, list(signals.values()), True)]
    for label, pool, across in pools:
        share, inside, needed = ratio_of_signals(pool, margin=margin, level=audit.level, method=_BINS, across=across)
        audit.add(
            4,
            "between_length_share",
            share,
            target=target,
            prompt_id=label,
            margin=edges,
            verdict=VERDICTS[inside],
            n_needed=needed,
            estimand=PROMPTS_LIKE_THESE if across else THESE_PROMPTS,
        )


def _bin_rows(audit: Audit, products: BinProducts, **common: Any) -> None:
    count = len(products.lengths)
    told = []
    for b in range(count):
        square = of_these_prompts([products.pair(b, b)], lambda parts: parts[..., 0], level=audit.level, method=_MEANS)
        ends = (float(products.lengths[b, 0]), float(products.lengths[b, 1]))
        audit.add(4, "bin_square", square, scope=f"length bin {b + 1} of {count}", lengths=ends, **common)
        told.append(square.low > 0.0)
    for b in range(count):
        for c in range(b + 1, count):
            cosine = within_one(
                of_these_prompts([products.pair(b, c)], cosine_of_pair, level=audit.level, method=_MEANS)
            )
            # Between means that are noise a cosine says nothing: at CV 5 its interval covered 79 to 83%.
            cosine = gated(cosine, told[b] and told[c])
            audit.add(4, "bin_cosine", cosine, scope=f"length bins {b + 1} and {c + 1} of {count}", **common)
