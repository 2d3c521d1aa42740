"""Whether responses may go packed, one after another in one row: each must be as it is alone.

Short probes show models that let packed sequences see each other. What counts blocks of tokens from the row's beginning
(attention in chunks, blocks of keys that are chosen) shows in long rows only. Where its setting is known by name such
rows are refused. Code from elsewhere than transformers and torch, and configurations that speak of blocks under another
name, are tried on the longest row of the run itself, held against its responses alone: once for a model, and again
where rows or responses have become longer. What that row does not show (blocks that end where its responses do) stays
unseen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gradvar.attention import VARLEN
from gradvar.errors import GradvarError
from gradvar.gradients.alone import narrowest_bytes
from gradvar.gradients.batches import last_hidden, make_batches, takes_packed
from gradvar.gradients.devices import input_device
from gradvar.gradients.job import Job
from gradvar.gradients.request import other_start, same_states
from gradvar.gradients.witness import same_in_batch

_COUNTED = ("attention_chunk_size", "block_size", "index_block_size")
"""Settings of attention in chunks or blocks."""
_HINTS = ("block", "chunk", "compress", "pool", "stride", "bucket", "segment")
"""Parts of names of settings that may be such."""
_TRUSTED = ("torch", "transformers", "peft")
"""Packages whose modules keep to the sequences of a row that they are told of."""
_ATTENTIONS = ("eager", "sdpa", VARLEN, "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
_WINDOW = 128
"""Tokens that are compared together: what differs behind a block's end would be lost among all of a long response."""
_LONGER = 1.125
"""A row or a response so many times the longest looked at is looked at again."""
_held: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], tuple[int, int]]] = weakref.WeakKeyDictionary()


def packs(model: nn.Module, base: nn.Module, probe: list[int], wish: bool | None, longest: int) -> bool:
    """Return whether responses go packed into one row: where asked for, or where variable-length attention gains by it.

    Args:
        model: The causal language model.
        base: Its inner model.
        probe: A few token ids.
        wish: Asked for, ruled out, or None.
        longest: Tokens of a row of several responses, at most.

    Raises:
        GradvarError: Asked for, and the model mixes packed sequences or cuts such a row into blocks.
    """
    attention = _attention(model)
    if wish is False or (wish is None and not (takes_packed(attention) and input_device(base).type == "cuda")):
        return False
    first, second = (probe * 3)[:3], (probe[::-1] * 6)[:5]
    with torch.no_grad():
        (both,) = make_batches(first, [second, second[:3]], 10_000, input_device(base), packed=True)
        states = last_hidden(base, both)[0].double()
        alone = [make_batches(first, [one], 10_000, input_device(base))[0] for one in (second, second[:3])]
        apart = torch.cat([last_hidden(base, one)[0].double() for one in alone])
        stop = both.bounds[0][1]
        moved = last_hidden(base, other_start(both))[0].double()
    # what the first sequence holds moves itself, and nothing behind it
    reach = (moved - states)[1:stop]
    same = same_states(states, apart, reach, base) and same_states(moved[stop:], states[stop:], reach, base)
    counted = _counted_blocks(base, longest)
    if same and not counted:
        return True
    if wish and not same:
        raise GradvarError(
            f"{type(base).__name__} with {attention} attention mixes packed sequences: measure it padded "
            "(--no-packing), or with another --attention"
        )
    if wish:
        raise GradvarError(
            f"{type(base).__name__} counts blocks of tokens from the row's beginning ({counted}), which packed "
            "sequences would shift: measure it padded (--no-packing)"
        )
    return False


def long_rows_hold(job: Job) -> bool:
    """Return whether the responses of the job's longest packed row have the states there that they have alone.

    Looked at where something about the model may count from the row's beginning.
    """
    rows = [batch for batch in job.batches(job.plan.token_budget) if batch.packed]
    if not rows:
        return True
    row = max(rows, key=lambda batch: batch.input_ids.numel())
    if _is_known(job.model):
        return True
    sizes = row.input_ids.numel(), max(job.lengths[i] for i in row.members)
    known = _held.setdefault(job.model, {})
    name = (_attention(job.model), job.autocast, job.dtype, job.device)
    if name in known and all(size <= _LONGER * seen for size, seen in zip(sizes, known[name], strict=True)):
        return True
    size = narrowest_bytes(job, torch.empty(0, dtype=torch.float64))
    with torch.no_grad(), job.autocast.on():
        states = row.split(last_hidden(job.head.base, row), "the last hidden states")
        for own, i in zip(states, row.members, strict=True):
            (batch,) = make_batches(job.prompt, [job.responses[i]], 1, job.device)
            alone = last_hidden(job.head.base, batch)[0]
            if not all(same_in_batch(*parts, size) for parts in _windows(own, alone)):
                return False
    known[name] = sizes
    return True


def refuse_long_rows(model: nn.Module) -> GradvarError:
    """Return the error of a model that was asked to pack and in long rows mixes or shifts what it counts."""
    return GradvarError(
        f"{type(model).__name__} with {_attention(model)} attention gives a response other states in a long packed row "
        "than alone (blocks counted from the row's beginning?): measure it padded (--no-packing)"
    )


def _attention(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "unknown"))


def _is_known(model: nn.Module) -> bool:
    """Return whether all of the model's code is trusted and no setting of it may be one of blocks."""
    known = all(type(module).__module__.partition(".")[0] in _TRUSTED for module in model.modules())
    hints = [
        name
        for name, value in _settings(model).items()
        if isinstance(value, int) and value > 1 and any(hint in name for hint in _HINTS)
    ]
    return known and not hints and _attention(model) in _ATTENTIONS


def _settings(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return dict(vars(config.get_text_config())) if config is not None else {}


def _windows(own: Tensor, alone: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(own, _WINDOW), torch.split(alone, _WINDOW), strict=True))


def _counted_blocks(base: nn.Module, longest: int) -> str:
    """Return the setting of attention in chunks or blocks of tokens that a row of `longest` tokens holds several of."""
    settings = _settings(base)
    return ", ".join(
        f"{name}={settings[name]}"
        for name in _COUNTED
        if isinstance(settings.get(name), int) and 1 < settings[name] < longest
    )
