"""Which attention a model runs with, and one of our own that takes sequences of several lengths in one row.

`gradvar_varlen` needs no flash-attn wheel: on CUDA in half precision it is torch's own kernel
(torch.nn.attention.varlen, torch 2.10 and later; tried on small numbers, gradients too, before it is trusted),
elsewhere each sequence alone in torch's scaled_dot_product_attention. transformers hands on `cu_seq_lens_q` and
`max_length_q` as it does for flash attention, so nothing is read back from the device at each layer.

Shape letters: B rows, H heads, T tokens of a row, D head width.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradvar.errors import GradvarError

VARLEN = "gradvar_varlen"
_WIDEST_HEAD = 256
_HALVES = (torch.bfloat16, torch.float16)
_BENDS = ("softcap", "attn_logit_softcapping", "sinks")


def choose_attention(wish: str, config: Any, device: str, dtype: str) -> str | None:
    """Return transformers' name of the attention for a setting; None leaves the choice to it (sdpa where it can).

    "auto" takes variable-length kernels on CUDA in half precision where the model can have them: ours, or flash-attn's
    where the model bends its attention logits (soft cap) and it is installed.

    Args:
        wish: A name, or "auto".
        config: The model's configuration.
        device: Torch device name, or "balanced".
        dtype: The model's dtype by name.

    Raises:
        GradvarError: This model or device cannot have it.
    """
    on_cuda = device.startswith("cuda") or (device == "balanced" and torch.cuda.is_available())
    half = dtype in ("bfloat16", "float16")
    if wish == "auto":
        if not (on_cuda and half):
            return None
        if _kernel() is not None and why_not(config) is None:
            register()
            return VARLEN
        flash = importlib.util.find_spec("flash_attn") is not None and not _has_sinks(config)
        return "flash_attention_2" if flash else None
    if wish == VARLEN:
        reason = why_not(config)
        if reason is not None:
            raise GradvarError(f"--attention {VARLEN}: {reason}; choose sdpa or eager")
        register()
    if wish.startswith("flash") and not (on_cuda and half):
        raise GradvarError(
            f"--attention {wish}: expected a CUDA device and bfloat16 or float16, received {device} and {dtype}; "
            "choose sdpa or eager"
        )
    if wish == "flex_attention" and not on_cuda:
        raise GradvarError(
            f"--attention {wish}: torch has no backward of it on {device}, expected a CUDA device; choose sdpa or eager"
        )
    return wish


def why_not(config: Any) -> str | None:
    """Return why a model cannot run with `gradvar_varlen`, None where it can."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(kind, "_supports_attention_backend", False):
        return "this model's attention cannot be exchanged"
    if not getattr(kind, "_supports_flash_attn", False):
        return "this model's attention is more than causality and a window (chunks, chosen keys), which a mask tells"
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in _BENDS) or _has_sinks(config):
        return "this model bends its attention logits (soft cap or sinks)"
    return None


def _has_sinks(config: Any) -> bool:
    return "gpt_oss" in str(getattr(config, "model_type", ""))


def register() -> None:
    """Make `gradvar_varlen` known to transformers, without a mask: causality and sequences are seen to here."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the causal attention (B, T, H, D) of (B, H, T, D) queries, and None for its weights.

    Args:
        module: The attention module.
        query: (B, H, T, D).
        key: (B, H', S, D), H' a divisor of H; where S > T the queries are those of the last tokens.
        value: (B, H', S, D').
        attention_mask: None.
        scaling: Of the logits; None is 1/sqrt(D).
        sliding_window: Keys that a query sees, at most.
        is_causal: None asks the module.
        cu_seq_lens_q: (sequences + 1,) int32 where each begins in the one row; None where rows are sequences.
        max_length_q: The longest sequence.
        **others: What other implementations take.

    Raises:
        GradvarError: Asked for what it does not do: a mask, dropout, soft caps, sinks, other than causal attention.
    """
    wanted = [name for name in ("softcap", "s_aux", "position_bias", "dropout") if _given(others.get(name))]
    if attention_mask is not None:
        wanted.append("attention_mask")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        wanted.append("is_causal=False")
    if wanted:
        raise GradvarError(f"{VARLEN} attention does not do {', '.join(wanted)}: choose --attention sdpa or eager")
    if cu_seq_lens_q is None:
        return _attend(query, key, value, scaling, sliding_window).transpose(1, 2).contiguous(), None
    longest = query.shape[2] if max_length_q is None else int(max_length_q)
    windowed = sliding_window is not None and sliding_window < longest
    if not windowed and _fits_kernel(query, key, value, scaling):
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        return _by_kernel(q, k, v, cu_seq_lens_q, longest, scaling)[None], None
    return _one_by_one(query, key, value, cu_seq_lens_q, scaling, sliding_window).contiguous(), None


def _given(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(value)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Return the causal attention of one sequence, or of rows that are each one."""
    length, seen = query.shape[2], key.shape[2]
    mask = None
    if length != seen or (window is not None and window < seen):
        last = torch.arange(seen - length, seen, device=query.device)[:, None]
        columns = torch.arange(seen, device=query.device)
        mask = (columns <= last) & (columns > last - (seen if window is None else window))
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1:  # with a mask, CUDA's kernels do not share heads
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=mask is None and groups > 1
    )


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Return the attention (1, T, H, D) of packed (1, H, T, D), sequence by sequence."""
    parts = [
        _attend(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scale, window)
        for a, b in itertools.pairwise(starts.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _kernel() -> Any:
    """Return torch's variable-length attention, None in an older torch."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
    """Return the attention (T, H, D) of packed (T, H, D) by torch's kernel."""
    kernel = _kernel()
    takes = inspect.signature(kernel).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in takes:
        options["enable_gqa"] = groups > 1
    elif groups > 1:  # torch 2.10 and 2.11 do not share heads
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    if "scale" in takes:
        options["scale"] = scale
    elif scale is not None and abs(scale * query.shape[-1] ** 0.5 - 1) > 1e-6:  # torch 2.10 always takes 1/sqrt(D)
        query = query * (scale * query.shape[-1] ** 0.5)
    starts = starts.to(query.device, torch.int32)
    output: Tensor = kernel(query, key, value, starts, starts, longest, longest, **options)
    return output


def _fits_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _HALVES
        and width == value.shape[-1] <= _WIDEST_HEAD
        and width % 8 == 0
        and _agrees(query.device, query.dtype, query.shape[1], key.shape[1], width, scale)
    )


@lru_cache(maxsize=64)
def _agrees(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, scale: float | None = None
) -> bool:
    """Return whether the kernel gives the attention and the gradients of each sequence alone, on small numbers."""
    if _kernel() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    lengths = (37, 5, 70)
    starts = torch.tensor([0, 37, 42, 112], dtype=torch.int32, device=device)
    values = [torch.randn(sum(lengths), count, width, generator=generator) for count in (heads, key_heads, key_heads)]
    found = []
    try:
        with torch.enable_grad():
            for exact in (False, True):
                q, k, v = (x.to(device, dtype).to(torch.float32 if exact else dtype).requires_grad_() for x in values)
                if exact:
                    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
                    output = _one_by_one(rows[0], rows[1], rows[2], starts, scale, None)[0]
                else:
                    output = _by_kernel(q, k, v, starts, max(lengths), scale)
                weights = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape)
                gradients = torch.autograd.grad((output.float() * weights).sum(), (q, k, v))
                found.append([output.detach().float(), *(gradient.float() for gradient in gradients)])
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel, and must not be remembered
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    pairs = zip(*found, strict=True)
    return all(bool((one - other).norm() <= 0.02 * other.norm()) for one, other in pairs)
