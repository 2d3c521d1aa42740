"""The data files of a run directory: one reader and one writer for each kind, every file whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.runs import provenance, storage
from gradvar.runs.measures import Measures, read_measures, write_measures
from gradvar.runs.records import Prompt, Rollout, ScoreGram
from gradvar.runs.sketches import (
    CrossGrams,
    GradientSketch,
    read_cross_grams,
    read_sketches,
    write_cross_grams,
    write_sketches,
)

_PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("data_source", pa.string()),
        ("ground_truth", pa.string()),
        ("extra", pa.string()),
    ]
)
_ROLLOUTS = pa.schema(
    [
        ("rollout_id", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("length", pa.int32()),
        ("finish_reason", pa.string()),
        ("sampler_logprobs", pa.list_(pa.float32())),
        ("loss_mask", pa.list_(pa.int8())),
    ]
)
_REWARDS = pa.schema([("rollout_id", pa.int32()), ("reward", pa.float64())])


CROSS_GRAMS = "cross.safetensors"

_MADE_BY = {
    "fit": ("law", "identity", "proxies"),
    "cv": ("cv", "batches", "extras"),
    "alpha": ("alpha", "forms", "planning"),
    "audit": ("audit", "token_covariance", "prefixes"),
    "check": ("check",),
    "compare": ("compare",),
}
"""Command to the tables that it writes."""


class RunFiles:
    """The prompts, rollouts, rewards, Grams, measures and tables under one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- prompts and rollouts -----------------------------------------------------------------------------------

    @property
    def prompt_ids(self) -> list[str]:
        """Names of the prompts, in the run's order."""
        return [prompt.prompt_id for prompt in self.prompts()]

    def prompts(self) -> list[Prompt]:
        """Read the prompts."""
        path = self.path / "prompts.parquet"
        columns = storage.read_columns(path, _PROMPTS)
        try:
            return [
                Prompt(
                    prompt_id=prompt_id,
                    text=text,
                    token_ids=tuple(token_ids),
                    data_source=data_source,
                    ground_truth=json.loads(ground_truth),
                    extra=json.loads(extra),
                )
                for prompt_id, text, token_ids, data_source, ground_truth, extra in zip(
                    *(columns[name] for name in _PROMPTS.names), strict=True
                )
            ]
        except (TypeError, ValueError) as error:
            raise storage.damaged(path, str(error)) from error

    def write_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Write the prompts; in a run, prompts are only ever added."""
        columns: dict[str, list[Any]] = {
            "prompt_id": [p.prompt_id for p in prompts],
            "text": [p.text for p in prompts],
            "token_ids": [list(p.token_ids) for p in prompts],
            "data_source": [p.data_source for p in prompts],
            "ground_truth": [json.dumps(p.ground_truth, ensure_ascii=False) for p in prompts],
            "extra": [json.dumps(p.extra, ensure_ascii=False) for p in prompts],
        }
        storage.write_table(self.path / "prompts.parquet", columns, _PROMPTS)

    def rollouts(self, prompt_id: str) -> list[Rollout]:
        """Read one prompt's rollouts."""
        path = self.file("rollouts", prompt_id)
        columns = storage.read_columns(path, _ROLLOUTS)
        try:
            return [
                Rollout(
                    rollout_id=rollout_id,
                    token_ids=tuple(token_ids),
                    text=text,
                    finish_reason=reason,
                    sampler_logprobs=None if logprobs is None else tuple(logprobs),
                    loss_mask=None if mask is None else tuple(mask),
                )
                for rollout_id, token_ids, text, _, reason, logprobs, mask in zip(
                    *(columns[name] for name in _ROLLOUTS.names), strict=True
                )
            ]
        except (TypeError, GradvarError) as error:
            raise storage.damaged(path, str(error)) from error

    def write_rollouts(self, prompt_id: str, rollouts: Sequence[Rollout]) -> None:
        """Write one prompt's rollouts, whole or not at all."""
        columns: dict[str, list[Any]] = {
            "rollout_id": [r.rollout_id for r in rollouts],
            "token_ids": [list(r.token_ids) for r in rollouts],
            "text": [r.text for r in rollouts],
            "length": [r.length for r in rollouts],
            "finish_reason": [r.finish_reason for r in rollouts],
            "sampler_logprobs": [None if r.sampler_logprobs is None else list(r.sampler_logprobs) for r in rollouts],
            "loss_mask": [None if r.loss_mask is None else list(r.loss_mask) for r in rollouts],
        }
        storage.write_table(self.file("rollouts", prompt_id), columns, _ROLLOUTS)

    # --- rewards ------------------------------------------------------------------------------------------------

    def rewards(self, prompt_id: str) -> NDArray[np.float64]:
        """Read one prompt's rewards, (N,) in the rollouts' order, NaN where unverified."""
        columns = storage.read_columns(self.file("rewards", prompt_id), _REWARDS)
        return np.array([np.nan if r is None else r for r in columns["reward"]], dtype=np.float64)

    def rewards_label(self, prompt_id: str) -> tuple[str, str] | None:
        """Return which rollouts a reward file is for (their digest) and what scored them, None without a file."""
        path = self.file("rewards", prompt_id)
        if not path.exists():
            return None
        metadata = storage.read_label(path)
        return metadata.get("rollouts", ""), metadata.get("reward", "")

    def write_rewards(
        self, prompt_id: str, rollout_ids: Sequence[int], rewards: NDArray[np.float64], *, label: tuple[str, str]
    ) -> None:
        """Write one prompt's rewards, (N,), NaN where unverified, with the label that `rewards_label` returns."""
        columns: dict[str, list[Any]] = {
            "rollout_id": list(rollout_ids),
            "reward": [None if np.isnan(r) else float(r) for r in rewards],
        }
        schema = _REWARDS.with_metadata({"rollouts": label[0], "reward": label[1]})
        storage.write_table(self.file("rewards", prompt_id), columns, schema)

    # --- Grams and measures -------------------------------------------------------------------------------------

    def grams(self, prompt_id: str) -> dict[str, ScoreGram]:
        """Read one prompt's score Grams, by target; one lacks the responses that were left out over its target."""
        path = self.file("grams", prompt_id)
        arrays, metadata = storage.read_arrays(path)
        try:
            about = json.loads(metadata["gradvar"])
            for name, matrix in arrays.items():
                if not (np.isfinite(matrix).all() and np.allclose(matrix, matrix.T) and (matrix.diagonal() >= 0).all()):
                    raise ValueError(f"{name} is not a Gram matrix (finite, symmetric, no negative square)")
            return {
                name.removesuffix("/gram"): ScoreGram(
                    target=name.removesuffix("/gram"),
                    matrix=matrix,
                    rollout_ids=tuple(about.get("kept", {}).get(name.removesuffix("/gram"), about["rollout_ids"])),
                    dtype=about["dtype"],
                    include_bias=about["include_bias"],
                    temperature=about["temperature"],
                )
                for name, matrix in ((name, arrays[f"{name}/gram"]) for name in about["targets"])
            }
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise storage.damaged(path, f"{type(error).__name__}: {error}") from error

    def grams_label(self, prompt_id: str) -> str | None:
        """Return the digest of the rollouts a Gram file was measured on, None without a file."""
        return str(self._about_grams(prompt_id, "rollouts")) if self.file("grams", prompt_id).exists() else None

    def measured_ids(self, prompt_id: str) -> tuple[int, ...]:
        """Return the rollouts that one prompt's Grams were measured on, those left out since among them."""
        return tuple(self._about_grams(prompt_id, "rollout_ids"))

    def gram_targets(self, prompt_id: str) -> tuple[str, ...]:
        """Return the targets of one prompt's Grams, without reading these."""
        return tuple(self._about_grams(prompt_id, "targets"))

    def _about_grams(self, prompt_id: str, key: str) -> Any:
        path = self.file("grams", prompt_id)
        try:
            return json.loads(storage.read_arrays_label(path)["gradvar"])[key]
        except (KeyError, ValueError, TypeError) as error:
            raise storage.damaged(path, f"{type(error).__name__}: {error}") from error

    def write_grams(
        self,
        prompt_id: str,
        grams: dict[str, ScoreGram],
        *,
        rollouts_digest: str,
        rollout_ids: Sequence[int] | None = None,
    ) -> None:
        """Write one prompt's Grams, whole or not at all.

        Args:
            prompt_id: The prompt.
            grams: By target.
            rollouts_digest: Of the rollouts they were measured on.
            rollout_ids: The ids of those; None where every Gram holds all of them.
        """
        first = next(iter(grams.values()))
        measured = first.rollout_ids if rollout_ids is None else tuple(rollout_ids)
        kept = {name: list(gram.rollout_ids) for name, gram in grams.items() if gram.rollout_ids != measured}
        about = {
            "targets": list(grams),
            "rollout_ids": list(measured),
            **({"kept": kept} if kept else {}),
            "rollouts": rollouts_digest,
            "dtype": first.dtype,
            "include_bias": first.include_bias,
            "temperature": first.temperature,
            "versions": provenance.package_versions(),
        }
        arrays = {f"{name}/gram": gram.matrix for name, gram in grams.items()}
        storage.write_arrays(self.file("grams", prompt_id), arrays, {"gradvar": json.dumps(about)})

    def measures(self, prompt_id: str) -> Measures:
        """Read the policy's log-probabilities, entropies, taus and prefixes of one prompt's responses."""
        return read_measures(self.file("measures", prompt_id))

    def write_measures(self, prompt_id: str, measures: Measures) -> None:
        """Write one prompt's measures, whole or not at all."""
        write_measures(self.file("measures", prompt_id), measures)

    def sketches(self, prompt_id: str) -> dict[str, GradientSketch]:
        """Read the sketches of one prompt's gradients, by target; none where they are not those of its Grams."""
        digest = self.grams_label(prompt_id)
        return {} if digest is None else read_sketches(self.file("sketches", prompt_id), rollouts_digest=digest)

    def write_sketches(self, prompt_id: str, sketches: dict[str, GradientSketch], *, rollouts_digest: str) -> None:
        """Write one prompt's sketches, whole or not at all."""
        write_sketches(self.file("sketches", prompt_id), sketches, rollouts_digest=rollouts_digest)

    def cross_grams(self) -> CrossGrams | None:
        """Read the exact products between prompts; None without, or where a prompt was measured again."""
        found = read_cross_grams(self.path / CROSS_GRAMS)
        if found is None or any(self.grams_label(name) != digest for name, digest in found.digests.items()):
            return None
        return found

    def write_cross_grams(self, grams: CrossGrams) -> None:
        """Write the exact products between prompts, whole or not at all."""
        write_cross_grams(self.path / CROSS_GRAMS, grams)

    # --- tables -------------------------------------------------------------------------------------------------

    def table(self, name: str) -> pd.DataFrame:
        """Read one estimate table.

        Raises:
            GradvarError: The table was not made yet.
        """
        path = self.path / "tables" / f"{name}.parquet"
        if not path.exists():
            command = next((c for c, tables in _MADE_BY.items() if name in tables), "fit")
            raise GradvarError(f"{self.path} holds no table {name!r}: run `gradvar {command} {self.path}` first")
        return storage.read_frame(path)

    def write_estimates(self, name: str, table: pd.DataFrame) -> Path:
        """Write one tidy estimate table and return its path."""
        path = self.path / "tables" / f"{name}.parquet"
        storage.write_frame(path, table)
        return path

    def remove_estimates(self, name: str) -> None:
        """Remove a table that an earlier call of a command made and this one does not, so that none is out of date."""
        (self.path / "tables" / f"{name}.parquet").unlink(missing_ok=True)

    def file(self, kind: str, prompt_id: str) -> Path:
        """Return the path of one prompt's file of a kind: rollouts, rewards, grams, measures or sketches."""
        suffix = "safetensors" if kind in ("grams", "sketches") else "parquet"
        return self.path / kind / f"{prompt_id}.{suffix}"


def rollouts_digest(rollouts: Sequence[Rollout]) -> str:
    """Return a hash of ids, tokens and loss masks: what a Gram and a reward depend on."""
    hasher = hashlib.sha256()
    for rollout in rollouts:
        hasher.update(json.dumps([rollout.rollout_id, rollout.token_ids, rollout.loss_mask]).encode())
    return hasher.hexdigest()
