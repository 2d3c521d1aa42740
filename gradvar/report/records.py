"""What a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from gradvar.figures import Drawing, NotDrawn


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence of the answer."""

    head: str
    text: str
    tone: str = ""
    """"alarm", "good", "bad", "open" or nothing."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table, with the tone of its verdict."""

    text: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as it is shown."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    """So many columns from the left hold words; the others hold numbers. The first names its row."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response to browse."""

    rollout_id: int
    length: int
    reward: float
    """NaN where unverified."""
    deviation: float
    """||s_i - mean s||^2, NaN where it was not measured."""
    weighted: float
    """||g_i - mean g||^2 with the run's advantages, NaN where there is none."""
    truncated: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class PromptSample:
    """A prompt and some of its responses."""

    prompt_id: str
    text: str
    n_tokens: int
    n_responses: int
    median_length: float
    mean_reward: float
    responses: Sequence[Response]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the report."""

    key: str
    title: str
    words: Sequence[str] = ()
    drawings: Sequence[Drawing | NotDrawn] = ()
    most_panels: int | None = None
    """Panels of each drawing that are shown; None shows all."""
    tables: Sequence[Table] = ()
    missing: Sequence[str] = ()
    """What is not in the run and which command makes it."""
    samples: Sequence[PromptSample] = ()
    code: str = ""
    """Commands or configuration, shown as they are typed."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the report is written from."""

    name: str
    """Of the run."""
    path: str
    tables: Mapping[str, pd.DataFrame]
    """Estimate tables by name, those that the run holds."""
    missing: Mapping[str, str]
    """Table that the run lacks to the words that say which command makes it."""
    drawings: Mapping[str, Sequence[Drawing | NotDrawn]]
    """Figures by section."""
    target: str
    """The target spoken of: the sum of all, or the only one."""
    advantage: str
    """Of the fitted law."""
    cv_advantage: str
    """Of the aggregators compared."""
    group_size: int
    level: float
    margin: float
    """Around exponent 1, as the law was judged."""
    advice: str | None
    disagreement: str | None
    sampler: pd.DataFrame
    """Sampler against policy, one row a prompt: prompt_id, mean_abs, max_abs, mean_difference, n_tokens."""
    samples: Sequence[PromptSample]
    left_out: int
    """Prompts that are not shown among the samples."""
    facts: Sequence[tuple[str, str]]
    """Provenance: name and value."""
    commands: Sequence[str]
    """How to make this run again."""
    config: str
    """The whole configuration, as JSON text."""
    prompts: int
    responses: int
    notes: Sequence[str] = field(default_factory=tuple)
    """Further limits of this run: unverified, silent, left out, not measured."""


def cell(value: Any, tone: str = "") -> Cell:
    """Return a cell of any value."""
    return Cell(text=str(value), tone=tone)
