"""Sequences into batches: length-sorted, padded on the right to a token budget.

Shape letters: B sequences of a batch, T their padded length, R the real (unpadded) tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradvar.errors import GradvarError


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some responses behind their common prompt, padded on the right.

    The last token of a response is not fed: nothing is predicted from it.
    """

    members: tuple[int, ...]
    """Index of each row's response."""
    input_ids: Tensor
    """(B, T) token ids, 0 where padded."""
    attention_mask: Tensor | None
    """(B, T) 1 on real tokens; None where nothing is padded."""
    real: Tensor | None
    """(R,) flat positions of the real tokens; None where all are real."""
    bounds: tuple[tuple[int, int], ...]
    """[start, stop) of each row's tokens among the R real ones."""

    def pack(self, values: Tensor, what: str) -> Tensor:
        """Return the real tokens' vectors, (R, K, D), K vectors a token, of a (B, T, ..., D) or flattened tensor.

        Raises:
            GradvarError: The tensor does not hold every token of the batch in order.
        """
        rows, length = self.input_ids.shape
        tokens = rows * length
        leading = values.shape[:-1].numel()
        aligned = values.shape[:2] == (rows, length) if values.ndim >= 3 else leading == tokens
        if not aligned and not (rows == 1 and leading % tokens == 0):
            raise GradvarError(
                f"{what} sees a tensor of shape {tuple(values.shape)} for {rows} sequences of {length} tokens, so its "
                "tokens cannot be told apart by response (routed tokens?): leave this target out"
            )
        flat = values.reshape(tokens, leading // tokens, values.shape[-1])
        return flat if self.real is None else flat.index_select(0, self.real)


def make_batches(
    prompt_ids: Sequence[int], responses: Sequence[Sequence[int]], token_budget: int, device: torch.device
) -> list[Batch]:
    """Return batches of at most `token_budget` padded tokens (at least one response each), longest first."""
    order = sorted(range(len(responses)), key=lambda i: (-len(responses[i]), i))
    groups: list[list[int]] = []
    for i in order:
        longest = len(prompt_ids) + len(responses[groups[-1][0]]) - 1 if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_pad(prompt_ids, responses, members, device) for members in groups]


def _pad(
    prompt_ids: Sequence[int], responses: Sequence[Sequence[int]], members: Sequence[int], device: torch.device
) -> Batch:
    fed = [[*prompt_ids, *responses[i][:-1]] for i in members]
    length = max(len(sequence) for sequence in fed)
    ids = torch.tensor([sequence + [0] * (length - len(sequence)) for sequence in fed], device=device)
    bounds = []
    start = 0
    for sequence in fed:
        bounds.append((start, start + len(sequence)))
        start += len(sequence)
    mask = real = None
    if start < ids.numel():
        lengths = torch.tensor([len(sequence) for sequence in fed], device=device)
        keep = torch.arange(length, device=device) < lengths[:, None]
        mask = keep.long()
        real = keep.flatten().nonzero().flatten()
    return Batch(members=tuple(members), input_ids=ids, attention_mask=mask, real=real, bounds=tuple(bounds))
