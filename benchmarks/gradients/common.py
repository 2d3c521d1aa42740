"""What the rivals share: which weights take a gradient, padded batches, the loss, and a Gram from N gradients.

Every rival runs the model on what a response needs and no more: its last token is not fed, and logits are made where
they predict response tokens only. Where responses are batched they are sorted by length and padded on the right; a
causal model then needs no attention mask, which lets its attention take the fast path.

Shape letters: N responses, B of a batch, T padded length, L longest response of a batch, P parameters of a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gradients.shapes import Work

Grams = dict[str, NDArray[np.float64]]
"""(N, N) by module path."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Padded:
    """Some responses behind the prompt, padded on the right."""

    members: tuple[int, ...]
    ids: Tensor
    """(B, T) what is fed."""
    labels: Tensor
    """(B, L) what the last L positions predict, -100 where padded."""


def batches(work: Work, token_budget: int) -> list[Padded]:
    """Return batches of at most `token_budget` padded tokens, longest first."""
    order = sorted(range(len(work.responses)), key=lambda i: -len(work.responses[i]))
    groups: list[list[int]] = []
    for i in order:
        longest = len(work.prompt) + len(work.responses[groups[-1][0]]) - 1 if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [pad(work, group) for group in groups]


def pad(work: Work, members: Sequence[int]) -> Padded:
    """Return one batch."""
    width = max(len(work.responses[i]) for i in members)
    ids, labels = [], []
    for i in members:
        response = work.responses[i]
        gap = width - len(response)
        ids.append([*work.prompt, *response[:-1], *[0] * gap])
        labels.append([*response, *[-100] * gap])
    return Padded(members=tuple(members), ids=torch.tensor(ids), labels=torch.tensor(labels))


def score(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return sum log pi of the labelled tokens, the padded ones left out."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=labels.shape[-1]).logits
    return -functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def parameters(work: Work) -> dict[str, nn.Parameter]:
    """Return the targets' weights and biases by name."""
    named = dict(work.model.named_parameters())
    return {name: value for name, value in named.items() if name.rpartition(".")[0] in set(work.modules)}


@contextmanager
def only_targets(work: Work) -> Iterator[dict[str, nn.Parameter]]:
    """Let the targets alone take gradients, so that no layer below them is in the graph."""
    chosen = parameters(work)
    for parameter in work.model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter in work.model.parameters():
            parameter.requires_grad_(True)


class Rows:
    """The N gradients of every target, one (N, P) float32 matrix each."""

    def __init__(self, work: Work) -> None:
        named = parameters(work)
        self._columns: dict[str, tuple[str, int]] = {}
        widths: dict[str, int] = dict.fromkeys(work.modules, 0)
        for name, parameter in named.items():
            path = name.rpartition(".")[0]
            self._columns[name] = (path, widths[path])
            widths[path] += parameter.numel()
        self._rows = {path: torch.empty(len(work.responses), width) for path, width in widths.items()}

    def put(self, members: Sequence[int], name: str, gradients: Tensor) -> None:
        """Keep a parameter's gradients, one row a member."""
        path, start = self._columns[name]
        flat = gradients.detach().reshape(len(members), -1)
        self._rows[path][list(members), start : start + flat.shape[1]] = flat

    def put_module(self, members: Sequence[int], path: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Keep a module's gradients."""
        self.put(members, f"{path}.weight", weight)
        if bias is not None:
            self.put(members, f"{path}.bias", bias)

    def grams(self) -> Grams:
        """Return M M' of every target."""
        return {path: (rows @ rows.T).double().numpy() for path, rows in self._rows.items()}
