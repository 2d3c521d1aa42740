"""Inner products between responses to different prompts: sketches of gradients, a file each prompt, or exact, one file.

Shape letters: N responses, d dimension of the sketch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradvar.runs import storage

KIND = "count sketch 1"
"""How the sketches are made: only sketches of one kind, seed and dimension may be multiplied."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientSketch:
    """Sketches of one prompt's response score gradients over one target: <row i, row j> estimates <s_i, s_j>."""

    target: str
    matrix: NDArray[np.float32]
    """(N, d) float32."""
    rollout_ids: tuple[int, ...]
    """The responses behind the rows, N of them."""
    seed: int
    parts: int
    """Parts of length d / parts, one after another, each of which estimates a product over `parts` on its own."""
    include_bias: bool
    """Whether the target's bias is part of the parameters."""

    def __post_init__(self) -> None:
        n, d = self.matrix.shape
        if n != len(self.rollout_ids) or d % self.parts or self.matrix.dtype != np.float32:
            raise ValueError(
                f"sketch of {self.target!r} needs float32 rows for {len(self.rollout_ids)} responses in {self.parts} "
                f"equal parts, received {self.matrix.dtype} {self.matrix.shape}"
            )

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.matrix.shape[1])

    def rows(self, rollout_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the sketches of these rollouts, (len, d).

        Raises:
            KeyError: One of them has none.
        """
        place = {name: row for row, name in enumerate(self.rollout_ids)}
        return self.matrix[[place[name] for name in rollout_ids]]


def write_sketches(path: Path, sketches: Mapping[str, GradientSketch], *, rollouts_digest: str) -> None:
    """Write one prompt's sketches, by target, whole or not at all."""
    about = {
        "kind": KIND,
        "rollouts": rollouts_digest,
        "targets": {
            name: {
                "rollout_ids": list(one.rollout_ids),
                "seed": one.seed,
                "dimension": one.dimension,
                "parts": one.parts,
                "include_bias": one.include_bias,
            }
            for name, one in sketches.items()
        },
    }
    arrays = {f"{name}/sketch": one.matrix for name, one in sketches.items()}
    storage.write_arrays(path, arrays, {"gradvar": json.dumps(about)})


def read_sketches(path: Path, *, rollouts_digest: str) -> dict[str, GradientSketch]:
    """Read one prompt's sketches by target; none where there is no file, or one of other rollouts or another kind.

    Raises:
        GradvarError: The file is damaged.
    """
    if not path.exists():
        return {}
    try:
        about = json.loads(storage.read_arrays_label(path)["gradvar"])
        if about["kind"] != KIND or about["rollouts"] != rollouts_digest:
            return {}
        arrays, _ = storage.read_arrays(path)
        found = {
            name: GradientSketch(
                target=name,
                matrix=arrays[f"{name}/sketch"],
                rollout_ids=tuple(one["rollout_ids"]),
                seed=one["seed"],
                parts=one["parts"],
                include_bias=one["include_bias"],
            )
            for name, one in about["targets"].items()
        }
        if not all(np.isfinite(one.matrix).all() for one in found.values()):
            raise ValueError("a sketch is not finite")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise storage.damaged(path, f"{type(error).__name__}: {error}") from error
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossGrams:
    """Exact inner products of the score gradients of several prompts' responses."""

    matrices: Mapping[str, NDArray[np.float64]]
    """By target, (N, N) over all prompts' responses."""
    responses: tuple[tuple[str, int], ...]
    """(prompt_id, rollout_id) behind the rows, N of them."""
    digests: Mapping[str, str]
    """By prompt, of the rollouts its Grams were measured on then."""
    include_bias: bool
    """Whether the targets' biases are part of the parameters."""

    def rows(self, prompt_id: str, rollout_ids: Sequence[int]) -> NDArray[np.intp]:
        """Return the rows of these responses to a prompt.

        Raises:
            KeyError: One of them is not there.
        """
        place = {name: row for row, name in enumerate(self.responses)}
        return np.array([place[prompt_id, rollout_id] for rollout_id in rollout_ids], dtype=np.intp)


def write_cross_grams(path: Path, grams: CrossGrams) -> None:
    """Write exact products whole or not at all."""
    about = {
        "responses": [list(name) for name in grams.responses],
        "digests": dict(grams.digests),
        "include_bias": grams.include_bias,
        "targets": list(grams.matrices),
    }
    arrays = {f"{name}/gram": matrix for name, matrix in grams.matrices.items()}
    storage.write_arrays(path, arrays, {"gradvar": json.dumps(about)})


def read_cross_grams(path: Path) -> CrossGrams | None:
    """Read exact products, None without a file.

    Raises:
        GradvarError: The file is damaged.
    """
    if not path.exists():
        return None
    arrays, metadata = storage.read_arrays(path)
    try:
        about = json.loads(metadata["gradvar"])
        responses = tuple((str(prompt_id), int(rollout_id)) for prompt_id, rollout_id in about["responses"])
        matrices = {name: arrays[f"{name}/gram"] for name in about["targets"]}
        for name, matrix in matrices.items():
            if matrix.shape != (len(responses), len(responses)) or not np.isfinite(matrix).all():
                raise ValueError(f"{name} is not a finite matrix of {len(responses)} responses")
        return CrossGrams(
            matrices=matrices,
            responses=responses,
            digests=dict(about["digests"]),
            include_bias=about["include_bias"],
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise storage.damaged(path, f"{type(error).__name__}: {error}") from error
