"""What every table function does with its prompts: order them, add the sum of targets, derive their generators."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradvar.errors import GradvarError
from gradvar.estimators.cv import NO_GRADIENT, SILENT
from gradvar.runs.records import PromptScores

SMALLEST = 1e-100
"""Of a Gram's largest entry, and one over it the largest: estimates hold its powers, which float64 keeps up to
1e308."""
SUM_TARGET = "sum"
"""Name of the target that is all targets' parameters together."""


def arrange(groups: Sequence[PromptScores]) -> dict[str, dict[str, PromptScores]]:
    """Return {target: {prompt_id: scores}} in the order given, with the sum of targets added.

    Where every prompt holds the same two or more targets and none is called "sum", their sum is added: inner products
    over disjoint parameters add.

    Raises:
        GradvarError: No prompts, a (prompt, target) pair twice, targets of one prompt with other responses, or a Gram
            that is not finite or whose higher powers leave float64.
    """
    if not groups:
        raise GradvarError("no prompts to estimate from: measure at least one prompt first")
    targets: dict[str, dict[str, PromptScores]] = {}
    for scores in groups:
        prompts = targets.setdefault(scores.target, {})
        if scores.prompt_id in prompts:
            raise GradvarError(f"prompt {scores.prompt_id!r} with target {scores.target!r} was given twice")
        if not np.isfinite(scores.gram).all():
            raise GradvarError(
                f"prompt {scores.prompt_id!r}: the gram of {scores.target!r} holds NaN or infinity: measure it again"
            )
        largest = float(np.abs(scores.gram).max(initial=0.0))
        if largest > 0.0 and not SMALLEST < largest < 1.0 / SMALLEST:
            raise GradvarError(
                f"prompt {scores.prompt_id!r}: the gram of {scores.target!r} has entries up to {largest:.0e}, expected "
                f"{SMALLEST:.0e} to {1.0 / SMALLEST:.0e}, as powers leave float64: rescale it, which changes no CV"
            )
        prompts[scores.prompt_id] = scores
    held = [frozenset(prompts) for prompts in targets.values()]
    if len(targets) > 1 and SUM_TARGET not in targets and len(set(held)) == 1:
        names = list(next(iter(targets.values())))
        targets[SUM_TARGET] = {name: _sum([prompts[name] for prompts in targets.values()]) for name in names}
    return targets


def _sum(scores: list[PromptScores]) -> PromptScores:
    first = scores[0]
    for other in scores[1:]:
        same = np.array_equal(first.lengths, other.lengths) and np.array_equal(
            first.rewards, other.rewards, equal_nan=True
        )
        if not same:
            raise GradvarError(
                f"prompt {first.prompt_id!r}: targets {first.target!r} and {other.target!r} hold other responses; "
                "measure the prompt again"
            )
    return replace(first, target=SUM_TARGET, gram=functools.reduce(operator.add, [s.gram for s in scores]))


def generator(seed: int, prompt_id: str, purpose: str) -> np.random.Generator:
    """Return the generator of one prompt and purpose, the same whatever other prompts and targets there are."""
    return np.random.default_rng(np.random.SeedSequence([seed, *purpose.encode(), 0, *prompt_id.encode()]))


def is_silent(scores: PromptScores) -> bool:
    """Whether all verified rewards are equal (or none is verified): every group advantage is 0."""
    known = scores.rewards[~np.isnan(scores.rewards)]
    return known.size == 0 or float(np.ptp(known)) == 0.0


def has_gradient(scores: PromptScores) -> bool:
    """Whether any response's score is not 0: whether these parameters act on the log-probabilities at all."""
    return float(np.trace(scores.gram)) > 0.0


def why_nothing(scores: PromptScores, advantage: str) -> str | None:
    """Return the verdict of a prompt and target whose every advantage-weighted gradient is 0, None of any other."""
    if not has_gradient(scores):
        return NO_GRADIENT
    if advantage == "raw":
        return None if (np.nan_to_num(scores.rewards) != 0.0).any() else SILENT
    return SILENT if advantage != "score" and is_silent(scores) else None
