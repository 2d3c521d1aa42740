"""Inner products of updates on different prompts, from sketches of the responses' gradients or from exact products.

Either kind gives R estimates of every product: the R parts of a sketch, which err independently, or R = 1 where
products are exact. Products within a prompt come from its own exact Gram, never from here.
Shape letters: K prompts, N responses of a prompt, M updates of a prompt, d sketch dimension, R repeats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError

Array = NDArray[np.float64]


class CrossProducts(ABC):
    """Inner products between responses to several prompts, over one target."""

    @property
    @abstractmethod
    def repeats(self) -> int:
        """R."""

    @property
    @abstractmethod
    def source(self) -> str:
        """What they are, for people: "exact" or "sketch of d"."""

    @abstractmethod
    def select(self, keep: Mapping[str, NDArray[Any]]) -> CrossProducts:
        """Return the same for the prompts named and, of each, the responses of an index array."""

    @abstractmethod
    def of_updates(self, coefficients: Mapping[str, Array]) -> Array:
        """Return the inner products (R, K M, K M) of the updates sum_i c_mi s_i, coefficients (M, N) by prompt.

        Rows run over prompts in the order given, then updates. Blocks of one prompt with itself are as estimated.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class SketchProducts(CrossProducts):
    """From sketches whose inner products are unbiased estimates."""

    sketches: Mapping[str, NDArray[np.float32]]
    """(N, d) by prompt; the R parts of length d / R lie one after another."""
    parts: int
    """R."""

    @property
    def repeats(self) -> int:
        """R."""
        return self.parts

    @property
    def source(self) -> str:
        """What they are, for people."""
        return f"sketch of {next(iter(self.sketches.values())).shape[1]}"

    def select(self, keep: Mapping[str, NDArray[Any]]) -> SketchProducts:
        """Return the prompts named and, of each, the responses of an index array."""
        return SketchProducts(
            sketches={name: self.sketches[name][rows] for name, rows in keep.items()}, parts=self.parts
        )

    def of_updates(self, coefficients: Mapping[str, Array]) -> Array:
        """Return the inner products (R, K M, K M); see `CrossProducts`."""
        updates = np.concatenate(
            [c.astype(np.float32) @ self.sketches[name] for name, c in coefficients.items()]
        ).astype(np.float64)
        parts = updates.reshape(len(updates), self.repeats, -1).transpose(1, 0, 2)
        return np.asarray(self.repeats * (parts @ parts.transpose(0, 2, 1)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactProducts(CrossProducts):
    """From the exact Gram of all prompts' responses together."""

    matrix: Array
    """(all N, all N)."""
    rows: Mapping[str, NDArray[np.intp]]
    """Each prompt's rows of it."""

    @property
    def repeats(self) -> int:
        """1: they have no error of their own."""
        return 1

    @property
    def source(self) -> str:
        """What they are, for people."""
        return "exact"

    def select(self, keep: Mapping[str, NDArray[Any]]) -> ExactProducts:
        """Return the prompts named and, of each, the responses of an index array."""
        return ExactProducts(matrix=self.matrix, rows={name: self.rows[name][rows] for name, rows in keep.items()})

    def of_updates(self, coefficients: Mapping[str, Array]) -> Array:
        """Return the inner products (1, K M, K M); see `CrossProducts`."""
        names = list(coefficients)
        blocks = []
        for name in names:
            left = coefficients[name] @ self.matrix[self.rows[name]]
            blocks.append(
                np.concatenate([left[:, self.rows[other]] @ coefficients[other].T for other in names], axis=1)
            )
        return np.concatenate(blocks)[None]


@dataclass(frozen=True, kw_only=True, eq=False)
class SummedProducts(CrossProducts):
    """Over several targets' parameters together: inner products of disjoint blocks add."""

    targets: Sequence[CrossProducts]

    def __post_init__(self) -> None:
        if len({one.source for one in self.targets}) != 1:
            raise GradvarError(
                "cross products of targets can be added where all are exact or all are sketches of one dimension"
            )

    @property
    def repeats(self) -> int:
        """R, the same for all targets."""
        return self.targets[0].repeats

    @property
    def source(self) -> str:
        """What they are, for people."""
        return self.targets[0].source

    def select(self, keep: Mapping[str, NDArray[Any]]) -> SummedProducts:
        """Return the prompts named and, of each, the responses of an index array."""
        return SummedProducts(targets=[one.select(keep) for one in self.targets])

    def of_updates(self, coefficients: Mapping[str, Array]) -> Array:
        """Return the inner products (R, K M, K M); see `CrossProducts`."""
        return np.asarray(sum(one.of_updates(coefficients) for one in self.targets))


@dataclass(frozen=True, kw_only=True)
class SketchError:
    """Error of a sketch's inner products, in units of the norms' product sqrt(S_ii S_jj)."""

    measured: float
    """Root mean square over pairs of responses to one prompt, against the exact Gram; NaN for one response."""
    stated: float
    """What theory bounds its expectation by, sqrt(mean (1 + cos_ij^2) / d); one sketch may be a little off it."""
    largest: float
    """The largest over these pairs."""


def sketch_error(sketch: NDArray[Any], gram: Array) -> SketchError:
    """Compare one prompt's sketch (N, d) with its exact Gram (N, N); responses with zero gradients do not count."""
    norms = np.sqrt(np.clip(gram.diagonal(), 0.0, None))
    rows = np.flatnonzero(norms > 0)
    values = sketch[rows].astype(np.float64) / norms[rows, None]
    exact = gram[np.ix_(rows, rows)] / np.outer(norms[rows], norms[rows])
    upper = np.triu_indices(len(rows), 1)
    if len(upper[0]) == 0:
        return SketchError(measured=math.nan, stated=math.nan, largest=math.nan)
    errors = (values @ values.T - exact)[upper]
    return SketchError(
        measured=float(np.sqrt((errors**2).mean())),
        stated=float(np.sqrt((1.0 + exact[upper] ** 2).mean() / sketch.shape[1])),
        largest=float(np.abs(errors).max()),
    )
