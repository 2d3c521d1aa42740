"""What the measuring pass saw of each response beside its gradient, and its file: one row a rollout.

Per target there are further columns where they were asked for: tau with its standard error, and the squared norms of
the scores of prefixes. The schema's metadata says of which targets, with how many probes and which seed.

Shape letters: N responses, k prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gradvar.runs import storage

_COLUMNS = [
    ("rollout_id", pa.int32()),
    ("policy_logprobs", pa.list_(pa.float32())),
    ("entropy", pa.float64()),
    ("proxy", pa.float64()),
]
_LABEL = "gradvar"


@dataclass(frozen=True, kw_only=True, eq=False)
class TauEstimate:
    """Sum of the squared norms of one response's token gradients, by random signs, for every response."""

    target: str
    value: NDArray[np.float64]
    """(N,) tau_i, the mean over the probes: unbiased. NaN where the response was left out."""
    error: NDArray[np.float64]
    """(N,) its standard error, sd over the probes / sqrt(probes); NaN for a single probe."""
    probes: int
    seed: int

    def select(self, rows: Sequence[int]) -> TauEstimate:
        """Return the responses at these places."""
        return replace(self, value=self.value[list(rows)], error=self.error[list(rows)])


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixNorms:
    """How each response's score grows along the response: ||s_i^(1..l)||^2 at k lengths l, evenly spaced."""

    target: str
    lengths: NDArray[np.int64]
    """(N, k) loss tokens of each prefix, rising; the last is the whole response."""
    value: NDArray[np.float64]
    """(N, k) squared norms; the last is the Gram's diagonal. NaN where the response was left out."""

    @property
    def count(self) -> int:
        """How many prefixes there are of each response, the whole one among them."""
        return int(self.lengths.shape[1])

    def select(self, rows: Sequence[int]) -> PrefixNorms:
        """Return the responses at these places."""
        return replace(self, lengths=self.lengths[list(rows)], value=self.value[list(rows)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """What the measuring pass saw of each response beside its gradient."""

    rollout_ids: tuple[int, ...]
    policy_logprobs: list[NDArray[np.float32]]
    """Log-probability of each response token in nats, N arrays; NaN where the response was left out."""
    entropy: NDArray[np.float64]
    """(N,) sum over loss tokens of the policy's entropy in nats."""
    proxy: NDArray[np.float64]
    """(N,) W = sum_t (1 - 2 pi_t + sum_v pi_v^2) over loss tokens."""
    taus: Mapping[str, TauEstimate] = field(default_factory=dict)
    """By target, where probes were asked for."""
    prefixes: Mapping[str, PrefixNorms] = field(default_factory=dict)
    """By target, where prefixes were asked for."""
    left_out: Mapping[int, str] = field(default_factory=dict)
    """By rollout id, why a response is in no estimate: what of it was not finite. Only by the user's word."""

    def select(self, rollout_ids: Sequence[int]) -> Measures:
        """Return these responses, in this order.

        Raises:
            KeyError: One of them was not measured.
        """
        place = {name: row for row, name in enumerate(self.rollout_ids)}
        rows = [place[name] for name in rollout_ids]
        return Measures(
            rollout_ids=tuple(rollout_ids),
            policy_logprobs=[self.policy_logprobs[row] for row in rows],
            entropy=self.entropy[rows],
            proxy=self.proxy[rows],
            taus={key: tau.select(rows) for key, tau in self.taus.items()},
            prefixes={key: norms.select(rows) for key, norms in self.prefixes.items()},
            left_out={name: why for name, why in self.left_out.items() if name in rollout_ids},
        )


def write_measures(path: Path, measures: Measures) -> None:
    """Write one prompt's measures, whole or not at all."""
    columns: dict[str, list[Any]] = {
        "rollout_id": list(measures.rollout_ids),
        "policy_logprobs": [values.tolist() for values in measures.policy_logprobs],
        "entropy": measures.entropy.tolist(),
        "proxy": measures.proxy.tolist(),
        "left_out": [measures.left_out.get(name) for name in measures.rollout_ids],
    }
    for key, tau in measures.taus.items():
        columns |= {f"{key}/tau": tau.value.tolist(), f"{key}/tau_error": tau.error.tolist()}
    for key, norms in measures.prefixes.items():
        columns |= {f"{key}/prefix_lengths": norms.lengths.tolist(), f"{key}/prefix_norms": norms.value.tolist()}
    about = {
        "left_out": bool(measures.left_out),
        "taus": {key: {"probes": tau.probes, "seed": tau.seed} for key, tau in measures.taus.items()},
        "prefixes": list(measures.prefixes),
    }
    schema = _schema(about)
    if any(about.values()):
        schema = schema.with_metadata({_LABEL: json.dumps(about)})
    storage.write_table(path, columns, schema)


def read_measures(path: Path) -> Measures:
    """Read one prompt's measures.

    Raises:
        GradvarError: The file is missing or damaged.
    """
    label = storage.read_label(path).get(_LABEL, "{}")
    try:
        about = json.loads(label)
        columns = storage.read_columns(path, _schema(about))
        return Measures(
            rollout_ids=tuple(columns["rollout_id"]),
            policy_logprobs=[np.array(values, dtype=np.float32) for values in columns["policy_logprobs"]],
            entropy=_floats(columns["entropy"]),
            proxy=_floats(columns["proxy"]),
            taus={
                key: TauEstimate(
                    target=key,
                    value=_floats(columns[f"{key}/tau"]),
                    error=_floats(columns[f"{key}/tau_error"]),
                    probes=int(one["probes"]),
                    seed=int(one["seed"]),
                )
                for key, one in about.get("taus", {}).items()
            },
            prefixes={
                key: PrefixNorms(
                    target=key,
                    lengths=np.array(columns[f"{key}/prefix_lengths"], dtype=np.int64),
                    value=_floats(columns[f"{key}/prefix_norms"]),
                )
                for key in about.get("prefixes", ())
            },
            left_out={
                name: why
                for name, why in zip(columns["rollout_id"], columns.get("left_out", ()), strict=False)
                if why is not None
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise storage.damaged(path, f"{type(error).__name__}: {error}") from error


def read_left_out(path: Path) -> dict[int, str]:
    """Read who was left out of one prompt and why; next to nothing is read where nobody was.

    Raises:
        GradvarError: The file is missing or damaged.
    """
    label = storage.read_label(path).get(_LABEL)
    return dict(read_measures(path).left_out) if label is not None and '"left_out": true' in label else {}


def _schema(about: Mapping[str, Any]) -> pa.Schema:
    columns: list[tuple[str, Any]] = [*_COLUMNS]
    if about.get("left_out"):
        columns.append(("left_out", pa.string()))
    for key in about.get("taus", {}):
        columns += [(f"{key}/tau", pa.float64()), (f"{key}/tau_error", pa.float64())]
    for key in about.get("prefixes", ()):
        columns += [(f"{key}/prefix_lengths", pa.list_(pa.int32())), (f"{key}/prefix_norms", pa.list_(pa.float64()))]
    return pa.schema(columns)


def _floats(values: Any) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)
