"""Ratios between rules' CVs in form 2, lengths given, and what makes them uncertain.

Shape letters: N responses of one prompt.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.form_cvs import Measured, baseline_moves

Array = NDArray[np.float64]

LEAST_LEFT = 0.05
"""Of a sum without one response, which what the others owe to it could make negative."""


class LogRatio(NamedTuple):
    """Log of one rule's CV over another's in form 2, of one prompt."""

    value: float
    influence: Array
    """(N,) what each response adds to its error."""
    spread: Array
    """(N,) standard deviation of what its own V_i adds."""
    skewness: Array
    """(N,) its skewness."""
    carrying: float
    """Effective number of those that carry the noise."""


def log_ratio(x: Array, reference: Array, measured: Measured) -> LogRatio:
    """Log of CV(x) / CV(reference) for given lengths, and its error.

    Lengths are given, so what varies is V_i around its centre v(L_i), beside what the others owe to response i: as a
    neighbour, and through the baseline that all advantages share (without that 89 to 93% were covered at N = 64 and
    128). The centre is a power law's, which follows a V_i by its leverage. The logs' own differences, not their slopes:
    one response may hold a third of a sum (one in ten right: 90 to 92% covered by slopes).
    """
    v = measured.within
    top, bottom = float(x**2 @ v), float(reference**2 @ v)
    if top <= 0.0 or bottom <= 0.0:
        none = np.full(len(v), math.nan)
        return LogRatio(math.nan, none, none, none, measured.carrying)
    value = 0.5 * math.log(top / bottom) - math.log(float(x.sum() / reference.sum()))
    own = (v - measured.centre) / (1.0 - _leverage(measured.lengths))

    def gone(w: Array, total: float) -> Array:
        """What the log of sum w_i v_i, a total, loses with each response."""
        owed = measured.shared(w[:, None])[:, 0] - baseline_moves(measured) * float(w @ measured.slope)
        lost = -np.log(np.maximum(1.0 - (w * own + owed) / total, LEAST_LEFT))
        return np.asarray(lost - lost.mean())

    influence = 0.5 * (gone(x**2, top) - gone(reference**2, bottom))
    gain = 0.5 * (x**2 / top - reference**2 / bottom)
    return LogRatio(value, influence, gain * measured.spread, measured.skewness, measured.carrying)


def _leverage(lengths: Array) -> Array:
    """Leverages (N,) of a straight line in log L, at most 1 - 1/N."""
    n = len(lengths)
    logs = np.log(lengths)
    squares = (logs - logs.mean()) ** 2
    return np.asarray(np.minimum(1.0 / n + squares / max(float(squares.sum()), 1e-12), 1.0 - 1.0 / n))
