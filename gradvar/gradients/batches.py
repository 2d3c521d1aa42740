"""Sequences into batches: length-sorted, padded to a token budget.

Shape letters: B sequences of a batch, T their padded length, R the real (unpadded) tokens of a batch.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradvar.errors import GradvarError
from gradvar.gradients.devices import moved, placed


class UnalignedTokensError(GradvarError):
    """A module's tokens cannot be told apart by response in a batch; one response at a time they can."""


class ChangedInBatchError(UnalignedTokensError):
    """A batch changes what a response gives."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some responses behind their common prompt, padded on one side or one after another in one row (packed).

    The last token of a response is not fed: nothing is predicted from it.
    """

    members: tuple[int, ...]
    """Index of each row's response; of all in the one row of a packed batch."""
    input_ids: Tensor
    """(B, T) token ids, 0 where padded."""
    attention_mask: Tensor | None
    """(B, T) 1 on real tokens; None where nothing is padded."""
    real: Tensor | None
    """(R,) flat positions of the real tokens; None where all are real."""
    bounds: tuple[tuple[int, int], ...]
    """[start, stop) of each response's tokens among the R real ones."""
    firsts: tuple[int, ...]
    """Column of each response's first real token."""
    packed: bool = False
    """Whether the sequences stand one after another in one row, told apart by positions that restart."""

    @property
    def positions(self) -> Tensor | None:
        """(B, T) position of each token in its own sequence; None where that is its column."""
        if self.packed:
            spans = [torch.arange(stop - start, device=self.input_ids.device) for start, stop in self.bounds]
            return torch.cat(spans)[None]
        if not any(self.firsts) or self.attention_mask is None:
            return None
        return (self.attention_mask.cumsum(1) - 1).clamp_min(0)

    def split(self, values: Tensor, what: str) -> list[Tensor]:
        """Return each member's vectors, (its tokens times K, D), of a tensor with K vectors a token, D last.

        Accepted are (B, T, ..., D) with T at any place in the middle, and tokens flattened to (B T, D). A batch of one
        takes any shape: every vector is its.

        Raises:
            UnalignedTokensError: The tensor's tokens cannot be told apart by response.
        """
        rows, length = self.input_ids.shape
        if len(self.members) == 1:
            return [values.reshape(-1, values.shape[-1])]
        axes = [axis for axis in range(1, values.ndim - 1) if values.shape[axis] == length]
        if values.ndim == 2 and values.shape[0] == rows * length:
            flat = values[:, None]
        elif values.ndim >= 3 and values.shape[0] == rows and (len(axes) == 1 or (axes and length == 1)):
            flat = values.movedim(axes[0], 1).reshape(rows * length, -1, values.shape[-1])
        else:
            raise UnalignedTokensError(
                f"{what} sees a tensor of shape {tuple(values.shape)} for {rows} sequences of {length} tokens, so its "
                "tokens cannot be told apart by response: leave this target out"
            )
        packed = flat if self.real is None else flat.index_select(0, self.real.to(flat.device))
        return [packed[start:stop].flatten(0, 1) for start, stop in self.bounds]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A short padded batch that was run: its rows have the states that they have alone."""

    prompt: tuple[int, ...]
    """What all rows begin with."""
    batch: Batch
    hidden: Tensor
    """(B, T, D) its last hidden states."""


def last_hidden(base: nn.Module, batch: Batch) -> Tensor:
    """Return the (B, T, D) last hidden states of a batch."""
    positions = batch.positions
    options: dict[str, Any] = {}
    # padding on the right comes after all that counts, and the model is causal; a mask there costs the fast attention
    # kernels, and rows of it without a single key have made NaN (Gemma 2 in float64, transformers 5.23)
    # packed sequences are told apart by their positions alone, and only where there is no mask
    if batch.attention_mask is not None and any(batch.firsts):
        options["attention_mask"] = batch.attention_mask
    if batch.packed and _takes_lengths(base):  # else read back from the positions, which waits for the device each time
        starts = placed([0, *(stop for _, stop in batch.bounds)], batch.input_ids.device, torch.int32)
        longest = max(stop - start for start, stop in batch.bounds)
        options.update(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest)
    if positions is not None and "position_ids" in inspect.signature(type(base).forward).parameters:
        options["position_ids"] = positions
    hidden: Tensor = base(input_ids=batch.input_ids, use_cache=False, **options).last_hidden_state
    return hidden


def takes_packed(attention: str) -> bool:
    """Return whether an attention implementation, by its name, has kernels for sequences of several lengths."""
    return "flash" in attention or "varlen" in attention


def _takes_lengths(base: nn.Module) -> bool:
    """Return whether the model hands its layers what it does not know, the sequences' lengths for one."""
    attention = str(getattr(getattr(base, "config", None), "_attn_implementation", ""))
    parameters = inspect.signature(type(base).forward).parameters.values()
    return takes_packed(attention) and any(one.kind is one.VAR_KEYWORD for one in parameters)


def make_batches(
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    token_budget: int,
    device: torch.device,
    padding_side: str = "right",
    packed: bool = False,
) -> list[Batch]:
    """Return batches of at most `token_budget` tokens, padding too (at least one response each), longest first."""
    order = sorted(range(len(responses)), key=lambda i: (-len(responses[i]), i))
    groups: list[list[int]] = []
    for i in order:
        longest = len(prompt_ids) + len(responses[groups[-1][0]]) - 1 if groups else 0
        size = (len(groups[-1]) + 1) * longest if groups else 0
        if packed and groups:
            size = sum(len(prompt_ids) + len(responses[j]) - 1 for j in [*groups[-1], i])
        if groups and size <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    if packed:
        return [_pack(prompt_ids, responses, members, device) for members in groups]
    # as many rows as tokens would make (T, B, D) look like (B, T, D)
    square = [g for g in groups if len(g) > 1 and len(g) == len(prompt_ids) + len(responses[g[0]]) - 1]
    groups += [[group.pop()] for group in square]
    return [_pad(prompt_ids, responses, members, device, padding_side) for members in groups]


def _pack(
    prompt_ids: Sequence[int], responses: Sequence[Sequence[int]], members: Sequence[int], device: torch.device
) -> Batch:
    fed = [[*prompt_ids, *responses[i][:-1]] for i in members]
    stops = list(itertools.accumulate(len(sequence) for sequence in fed))
    starts = [stop - len(sequence) for stop, sequence in zip(stops, fed, strict=True)]
    return Batch(
        members=tuple(members),
        input_ids=placed([[token for sequence in fed for token in sequence]], device),
        attention_mask=None,
        real=None,
        bounds=tuple(zip(starts, stops, strict=True)),
        packed=len(members) > 1,
        firsts=tuple(starts),
    )


def _pad(
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    members: Sequence[int],
    device: torch.device,
    padding_side: str,
) -> Batch:
    fed = [[*prompt_ids, *responses[i][:-1]] for i in members]
    length = max(len(sequence) for sequence in fed)
    gaps = [length - len(sequence) for sequence in fed]
    firsts = [gap if padding_side == "left" else 0 for gap in gaps]
    ids = placed(
        [[0] * first + sequence + [0] * (gap - first) for sequence, gap, first in zip(fed, gaps, firsts, strict=True)],
        device,
    )
    bounds = []
    start = 0
    for sequence in fed:
        bounds.append((start, start + len(sequence)))
        start += len(sequence)
    mask = real = None
    if start < ids.numel():
        columns = torch.arange(length)  # on the host: a GPU would be waited for to count what is real
        begins = torch.tensor(firsts)[:, None]
        ends = torch.tensor([first + len(row) for first, row in zip(firsts, fed, strict=True)])[:, None]
        keep = (columns >= begins) & (columns < ends)
        mask, real = moved(keep.long(), device), moved(keep.flatten().nonzero().flatten(), device)
    return Batch(
        members=tuple(members),
        input_ids=ids,
        attention_mask=mask,
        real=real,
        bounds=tuple(bounds),
        firsts=tuple(firsts),
    )
