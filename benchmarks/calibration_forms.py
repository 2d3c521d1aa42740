"""CV in forms 1 and 2, lengths given, of one simulated data set beside its truth, which is that draw's own.

Shape letters: N responses of a prompt, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.calibration_truths import GROUP, LONGEST, conditional_variances, gradient_of, label
from gradvar.estimators import form_table
from gradvar.estimators.advantages import advantages
from gradvar.estimators.aggregation import find_rule, scope_weights
from gradvar.estimators.carrying import LEAST_CARRYING, effective_carrying
from gradvar.estimators.intervals import THESE_PROMPTS
from gradvar.runs.records import Estimate, PromptScores

Array = NDArray[np.float64]

VARIANTS: tuple[tuple[str, float | None], ...] = (("grpo", None), ("dapo", None), ("vl_norm", 0.5), ("vl_norm", 2.0))
NUMBERS = ("value", "low", "high", "level", "method", "n", "clusters", "seed")


def form_intervals(
    prompts: Sequence[PromptScores], laws: Sequence[dict[str, Any]], seed: int
) -> Iterator[tuple[str, float, Estimate]]:
    """Yield quantity, truth and estimate, as `form_table` makes it, over all prompts together."""
    alphas = tuple(alpha for _, alpha in VARIANTS if alpha is not None)
    table = form_table(prompts, rules=tuple(dict.fromkeys(rule for rule, _ in VARIANTS)), alphas=alphas, seed=seed)
    rows = table[table["estimand"] == THESE_PROMPTS]
    rows = rows[rows["prompt_id"].isna()] if len(prompts) > 1 else rows
    parts = [_parts(scores.lengths, law) for scores, law in zip(prompts, laws, strict=True)]
    carrying = [effective_carrying(advantages(scores.rewards, "grpo")) for scores in prompts]
    for row in rows.to_dict("records"):
        if row["rule"] is None or row["quantity"] == "cv_ratio_form_1":  # without an interval: it is arithmetic
            continue
        name = label(row["rule"], None if math.isnan(row["alpha"]) else row["alpha"])
        form = row["quantity"][-1]
        own = [part[name] for part in parts]
        estimate = Estimate(**{key: row[key] for key in NUMBERS})
        if row["quantity"].startswith("cv_ratio"):
            # Pooled ratios leave out prompts that few responses carry.
            used = list(zip(own, parts, carrying, strict=True))
            used = [one for one in used if one[2] >= LEAST_CARRYING] or used
            logs = [
                math.log(one[form] / one["signal"] * part["grpo"]["signal"] / part["grpo"][form]) / 2.0
                for one, part, _ in used
            ]
            yield f"cv ratio form {form} {name}/grpo", math.exp(float(np.mean(logs))), estimate
        else:
            noise, signal = sum(one[form] for one in own), sum(one["signal"] for one in own)
            yield f"cv form {form} {name}", math.sqrt(noise / signal), estimate


def _parts(lengths: Array, law: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Noise in both forms and signal of every rule for these lengths: of N responses, at groups of `GROUP`."""
    v, gradient = conditional_variances(law, "grpo", lengths)[1], gradient_of(law)
    found = {}
    for rule, alpha in VARIANTS:
        x = scope_weights(find_rule(rule), lengths, lambda y: y.sum(), alpha=alpha, max_length=LONGEST)
        found[label(rule, alpha)] = {
            "1": len(x) / GROUP * float(x**2 @ lengths) * float((v / lengths).mean()),
            "2": len(x) / GROUP * float(x**2 @ v),
            "signal": float(x.sum()) ** 2 * float(gradient @ gradient),
        }
    return found
