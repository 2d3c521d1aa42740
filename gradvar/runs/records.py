"""The small frozen records that pass between rooms, and the one list of table columns.

Shape letters: N responses of one prompt, T tokens of one response.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError

FINISH_REASONS = ("stop", "length")

TABLE_COLUMNS = (
    "prompt_id",
    "target",
    "quantity",
    "rule",
    "alpha",
    "advantage",
    "scope",
    "group_size",
    "value",
    "low",
    "high",
    "level",
    "method",
    "n",
    "clusters",
    "seed",
    "verdict",
)
"""Columns of every estimate table; a missing prompt_id means pooled over prompts."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt exactly as the model sees it."""

    prompt_id: str
    """Name of the prompt in the run, safe as a file name."""
    text: str
    """The prompt after its template."""
    token_ids: tuple[int, ...]
    """What the model is fed."""
    data_source: str = "unknown"
    """Where the problem came from; chooses the reward function."""
    ground_truth: Any = None
    """The gold answer: any JSON value."""
    extra: Any = None
    """Whatever else the problem carried: any JSON value."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response."""

    rollout_id: int
    """Index within the prompt."""
    token_ids: tuple[int, ...]
    """As sampled, the end token included."""
    text: str
    """Decoded for people and reward functions; never tokenised again."""
    finish_reason: str
    """"stop" (the end token was sampled) or "length" (cut by the limit)."""
    sampler_logprobs: tuple[float, ...] | None = None
    """Log-probability of each sampled token under the sampler, in nats, at the sampling temperature."""
    loss_mask: tuple[int, ...] | None = None
    """1 where a token carries loss; None means every token."""

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        if count == 0:
            raise GradvarError(f"rollout {self.rollout_id} is empty: expected at least one response token")
        if self.finish_reason not in FINISH_REASONS:
            raise GradvarError(
                f"rollout {self.rollout_id}: finish_reason {self.finish_reason!r} is not one of {FINISH_REASONS}"
            )
        for name, values in (("sampler_logprobs", self.sampler_logprobs), ("loss_mask", self.loss_mask)):
            if values is not None and len(values) != count:
                raise GradvarError(
                    f"rollout {self.rollout_id}: {name} has {len(values)} entries for {count} response tokens"
                )
        if self.loss_mask is not None and not set(self.loss_mask) <= {0, 1}:
            raise GradvarError(f"rollout {self.rollout_id}: loss_mask may hold only 0 and 1")
        if self.length == 0:
            raise GradvarError(f"rollout {self.rollout_id}: loss_mask is 0 everywhere, so no token carries loss")

    @property
    def length(self) -> int:
        """Number of response tokens that carry loss, the end token included."""
        return len(self.token_ids) if self.loss_mask is None else sum(self.loss_mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreGram:
    """Inner products of one prompt's response score gradients over one target (or a sum of targets).

    S_ij = <s_i, s_j>, s_i = grad sum_t log pi(o_it | q, o_i,<t) at the sampling temperature; the sum runs over
    the tokens that carry loss. Exact, accumulated in float64.
    """

    target: str
    """Full module path, with `:q` and the like for rows of a fused matrix; joined by " + " in a sum."""
    matrix: NDArray[np.float64]
    """(N, N) float64."""
    rollout_ids: tuple[int, ...]
    """The responses behind the rows, N of them."""
    dtype: str
    """The model's dtype in the backward pass, for example "bfloat16"."""
    include_bias: bool
    """Whether the target's bias is part of the parameters."""
    temperature: float
    """Softmax temperature at which log pi was taken."""

    def __post_init__(self) -> None:
        n = len(self.rollout_ids)
        if self.matrix.shape != (n, n) or self.matrix.dtype != np.float64:
            raise ValueError(
                f"ScoreGram {self.target!r} needs a float64 matrix of shape ({n}, {n}), "
                f"received {self.matrix.dtype} {self.matrix.shape}"
            )

    def gram(self) -> NDArray[np.float64]:
        """Return the (N, N) float64 matrix of <s_i, s_j>."""
        return self.matrix

    def __add__(self, other: ScoreGram) -> ScoreGram:
        """Return the Gram over both targets' parameters together: inner products of disjoint blocks add.

        Raises:
            ValueError: The two belong to other responses or were measured another way, or share a target.
        """
        if not isinstance(other, ScoreGram):
            return NotImplemented
        ours = (self.rollout_ids, self.dtype, self.include_bias, self.temperature)
        theirs = (other.rollout_ids, other.dtype, other.include_bias, other.temperature)
        if ours != theirs:
            raise ValueError(
                f"cannot add the Grams of {self.target!r} and {other.target!r}: "
                "responses, dtype, bias choice or temperature differ"
            )
        both = self.target.split(" + ") + other.target.split(" + ")
        if len(set(both)) < len(both):
            raise ValueError(f"cannot add {self.target!r} and {other.target!r}: a target would count twice")
        return replace(self, target=" + ".join(both), matrix=self.matrix + other.matrix)


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """What the estimators need of one prompt and one target: the Gram, the rewards, the lengths."""

    prompt_id: str
    target: str
    gram: NDArray[np.float64]
    """(N, N) float64 score Gram."""
    rewards: NDArray[np.float64]
    """(N,) rewards, NaN where unverified."""
    lengths: NDArray[np.float64]
    """(N,) tokens that carry loss, end token included."""
    truncated: NDArray[np.bool_]
    """(N,) True where the response was cut by the length limit."""
    log_probs: NDArray[np.float64] | None = None
    """(N,) summed log-probability of each response in nats, where it was measured."""
    max_length: int = 0
    """M: the response length limit of the run, in tokens."""
    rollout_ids: tuple[int, ...] = ()
    """The responses' names in the run, N of them; empty where the scores come from no run."""

    def verified(self) -> PromptScores:
        """Return the same prompt with the unverified responses left out."""
        return self.select(~np.isnan(self.rewards))

    def select(self, keep: NDArray[Any]) -> PromptScores:
        """Return the responses chosen by a boolean mask or an index array."""
        rows = np.flatnonzero(keep) if keep.dtype == np.bool_ else keep
        return replace(
            self,
            gram=self.gram[np.ix_(rows, rows)],
            rewards=self.rewards[rows],
            lengths=self.lengths[rows],
            truncated=self.truncated[rows],
            log_probs=None if self.log_probs is None else self.log_probs[rows],
            rollout_ids=tuple(self.rollout_ids[row] for row in rows) if self.rollout_ids else (),
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with what one needs to trust it."""

    value: float
    """The point estimate; NaN where it is undefined or unresolved."""
    low: float
    """Lower end of the interval; NaN where none is given."""
    high: float
    """Upper end of the interval; NaN where none is given, inf where unbounded."""
    level: float
    """Nominal coverage of the interval, for example 0.95."""
    method: str
    """How value and interval were made, for example "permutation groups, delete-one jackknife"."""
    n: int
    """Responses behind it."""
    clusters: int
    """Prompts behind it."""
    seed: int | None
    """Seed of the random numbers used; None where none were."""


def no_estimate(
    method: str, *, n: int, level: float, clusters: int = 1, seed: int | None = None, value: float = math.nan
) -> Estimate:
    """Return an estimate without interval, and without value where none is given; `method` says why."""
    return Estimate(
        value=value, low=math.nan, high=math.nan, level=level, method=method, n=n, clusters=clusters, seed=seed
    )


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of a tidy table: an Estimate with its labels."""

    quantity: str
    estimate: Estimate
    target: str
    prompt_id: str | None = None
    rule: str | None = None
    alpha: float | None = None
    advantage: str | None = None
    scope: str | None = None
    group_size: int | None = None
    verdict: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of this table family."""


def target_label(target: str) -> str:
    """Return a target's name for people: model.layers.3.self_attn.q_proj is "layer 3 q_proj"."""
    if target == "sum":
        return "all targets"
    layer = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", target)
    return f"layer {layer[1]} {layer[2]}" if layer else target


def counted(count: Any, what: str) -> str:
    """Return a number of things in words: 1 prompt, 2 prompts."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def estimate_table(rows: Iterable[TableRow]) -> pd.DataFrame:
    """Return the tidy table of TABLE_COLUMNS (extra columns after them), one line a row."""
    records = []
    for row in rows:
        estimate = row.estimate
        records.append(
            {
                "prompt_id": row.prompt_id,
                "target": row.target,
                "quantity": row.quantity,
                "rule": row.rule,
                "alpha": math.nan if row.alpha is None else float(row.alpha),
                "advantage": row.advantage,
                "scope": row.scope,
                "group_size": row.group_size,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "level": estimate.level,
                "method": estimate.method,
                "n": estimate.n,
                "clusters": estimate.clusters,
                "seed": estimate.seed,
                "verdict": row.verdict,
                **row.extra,
            }
        )
    table = pd.DataFrame.from_records(records)
    table = table.reindex(columns=[*TABLE_COLUMNS, *[c for c in table.columns if c not in TABLE_COLUMNS]])
    return table.astype({"group_size": "Int64", "seed": "Int64", "n": "Int64", "clusters": "Int64"})
