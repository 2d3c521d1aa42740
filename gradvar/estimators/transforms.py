"""DAPO's extras and the VL Norm authors' form, as transformations of rewards, masks and advantages.

Shape letters: N responses, n of a group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.runs.records import PromptScores

Array = NDArray[np.float64]


def overlong_penalty(lengths: Any, *, max_length: float, buffer: float) -> Array:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13), (N,) added to the rewards.

        0                                 L <= M - buffer
        (M - buffer - L) / buffer         M - buffer < L <= M
        -1                                L > M

    Args:
        lengths: (N,) tokens.
        max_length: M, the longest response allowed (DAPO: 20480).
        buffer: Length of the punishment interval in tokens (DAPO: 4096).

    Raises:
        GradvarError: A buffer that is not between 0 and max_length.
    """
    if not 0 < buffer <= max_length:
        raise GradvarError(f"buffer must lie in (0, max_length = {max_length:g}], received {buffer!r}")
    values = np.asarray(lengths, dtype=np.float64)
    return np.clip((max_length - buffer - values) / buffer, -1.0, 0.0)


def soft_overlong(scores: PromptScores, *, buffer: float, max_length: float | None = None) -> PromptScores:
    """The same prompt with the soft overlong punishment added to its rewards; unverified stay unverified.

    Args:
        scores: One prompt and target.
        buffer: Length of the punishment interval in tokens.
        max_length: M; None takes the run's.

    Raises:
        GradvarError: No maximum length is known, or a buffer that does not fit it.
    """
    limit = float(scores.max_length) if max_length is None else max_length
    if limit <= 0:
        raise GradvarError("the soft overlong punishment needs max_length: the run does not know its own")
    return replace(scores, rewards=scores.rewards + overlong_penalty(scores.lengths, max_length=limit, buffer=buffer))


def authors_vl_norm(advantages: Any, lengths: Any, alpha: float) -> Array:
    """Advantages (N,) of VL Norm as its authors' code folds the weights in (zerolllin/Delta-L-Normalization).

    A_i l_i / mean(l), l_i = (L_i / mean L)^-alpha, both means over the whole rollout batch of N responses; the loss is
    then sum_it A'_i loss_it / (N M). So every response has the weight that `aggregation_weights("vl_norm", ...)` gives
    with the whole batch as one scope. They differ from the paper's sum inside each prompt group (groups=labels)
    wherever groups differ in length, and from both in how mini-batches see it: the weights stay those of the rollout
    batch, while a loss rule computes its sums in the mini-batch.

    Raises:
        GradvarError: Shapes that differ, or lengths that are not positive.
    """
    a, sizes = np.asarray(advantages, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    if a.shape != sizes.shape or a.ndim != 1:
        raise GradvarError(f"advantages {a.shape} and lengths {sizes.shape} must be rows of the same responses")
    if not (sizes > 0).all():
        raise GradvarError("lengths must be positive numbers of tokens")
    shrunk = (sizes / sizes.mean()) ** (-alpha)
    return np.asarray(a * shrunk / shrunk.mean())
