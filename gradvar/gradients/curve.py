"""What a model does to each logit after the output embedding: s z, or c tanh(s z / c), found by running its own code.

Scaling divides or multiplies all logits (Cohere, Granite), soft-capping bends the large ones (Gemma 2). Both are read
from logits of the model's own head, so no list of names or settings is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MOST_FITTED = 4096
"""Logits of each probe that a soft cap is fitted to."""
_MASKED = 1e30
"""Larger logits stand for a token that is never to be drawn: nothing is fitted to them."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """y = scale z, or y = cap tanh(scale z / cap), for each logit alone."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether logits stay as they are."""
        return self.scale == 1.0 and self.cap is None

    def apply_(self, logits: Tensor) -> Tensor:
        """Bend logits of any shape in place and return them."""
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slope_(self, bent: Tensor) -> Tensor:
        """Make dy/dz of the bent logits y in place and return it; only where there is a cap, else it is the scale."""
        if self.cap is None:
            return bent.fill_(self.scale)
        return bent.div_(self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def fitted_curves(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Curve]:
    """Yield the curves that could lie between z and y, simplest first; whether one does is for the caller to see.

    Args:
        pairs: Logits z of the matrix product and y of the model, of equal shapes, small ones first.
    """
    yield Curve()
    samples = [_sample(z, y) for z, y in pairs]
    z, y = (np.concatenate(side) for side in zip(*samples, strict=True))
    if len(z) == 0 or not (z @ z > 0):
        return
    scale = float((z @ y) / (z @ z))
    if scale > 0:
        yield Curve(scale=scale)
    capped = _fitted_cap(samples)
    if capped is not None:
        yield capped


def _sample(z: Tensor, y: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return pairs below `_MASKED`, evenly spread over the probe, the largest among them."""
    flat = [side.detach().reshape(-1).to("cpu", torch.float64) for side in (z, y)]
    both = torch.stack(flat)
    both = both[:, (both.abs() < _MASKED).all(0)]
    order = both[0].abs().argsort(descending=True)
    step = max(1, order.numel() // _MOST_FITTED)
    first, second = both[:, order[::step]].numpy()
    return first, second


def _fitted_cap(samples: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Curve | None:
    from scipy import optimize

    z, y = (np.concatenate(side) for side in zip(*samples, strict=True))
    small, bent = samples[0]
    start = np.array([float((small @ bent) / (small @ small)), float(np.abs(y).max())])
    if not (start > 0).all():
        return None
    weight = 1.0 / np.concatenate([np.full(len(one), max(float(np.abs(b).max()), 1e-30)) for one, b in samples])

    def gap(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        scale, cap = np.exp(logs)
        out: NDArray[np.float64] = (cap * np.tanh(scale * z / cap) - y) * weight
        return out

    begin = np.log(start)
    fit = optimize.least_squares(gap, begin, bounds=(begin - 20, begin + 20), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    scale, cap = (float(x) for x in np.exp(fit.x))
    return Curve(scale=scale, cap=cap)
