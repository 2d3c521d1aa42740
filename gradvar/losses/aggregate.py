"""Loss aggregation rules as torch losses, for anyone's trainer: the weights' formulas are `estimators.aggregation`'s.

Shape letters: N responses of a batch, T tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradvar.errors import GradvarError
from gradvar.estimators.aggregation import aggregation_weights


def aggregate_loss(
    token_loss: torch.Tensor,
    mask: torch.Tensor,
    rule: str,
    *,
    alpha: float | None = None,
    max_length: float | None = None,
    groups: Sequence[Any] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Aggregate token losses into one scalar: sum_i x_i sum_t mask_it token_loss_it.

    x_i are the weights of `gradvar.aggregation_weights` at the lengths L_i = sum_t mask_it (paper, appendix A.5);
    they carry no gradient. A response without any token that carries loss adds nothing and is not counted among the
    n responses (verl drops such rows too; TRL counts them). What stands at masked tokens never matters, NaN included.

    Args:
        token_loss: (N, T) loss of every token, for example -A_i ratio_it.
        mask: (N, T) 1 or True where a token carries loss.
        rule: Name for `aggregation_weights`.
        alpha: Exponent of vl_norm.
        max_length: M in tokens, required by dr_grpo and vl_norm.
        groups: (N,) labels of prompt groups; None makes the batch one scope. Required by "prompt_mean".

    Returns:
        Scalar tensor, differentiable; 0 where no token carries loss. Its dtype is that of `token_loss` promoted to at
        least float32, in which it is summed: a thousand tokens overflow float16, and bfloat16 would lose them.

    Raises:
        GradvarError: Shapes that differ, a mask with other values than 0 and 1, or what `aggregation_weights` refuses.
    """
    if token_loss.ndim != 2 or token_loss.shape != mask.shape:
        raise GradvarError(
            f"token_loss and mask must both be (responses, tokens), received {tuple(token_loss.shape)} and "
            f"{tuple(mask.shape)}"
        )
    carries = mask.to(torch.bool)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise GradvarError("mask may hold only 0 and 1: put per-token weights into token_loss")
    # float32 at least: lengths above 256 are not exact in bfloat16, sums above 65504 not finite in float16.
    dtype = torch.promote_types(token_loss.dtype, torch.float32)
    sums = torch.where(carries, token_loss, torch.zeros_like(token_loss)).sum(dim=1, dtype=dtype)
    with torch.no_grad():
        lengths = carries.sum(dim=1).to(dtype)
        counted = lengths > 0
        if not bool(counted.any()):
            weights = torch.zeros_like(lengths)
            one = None if groups is None else [0]
            aggregation_weights(rule, [1.0], alpha=alpha, max_length=max_length, groups=one)
        else:
            labels = None if groups is None else _labels(groups, counted)
            weights = torch.zeros_like(lengths)
            weights[counted] = aggregation_weights(
                rule, lengths[counted], alpha=alpha, max_length=max_length, groups=labels
            )
    return (weights * sums).sum()


def _labels(groups: Sequence[Any] | torch.Tensor, counted: torch.Tensor) -> list[Any]:
    labels = groups.tolist() if isinstance(groups, torch.Tensor) else list(groups)
    if len(labels) != len(counted):
        raise GradvarError(f"groups must label every response: {len(counted)} responses, {len(labels)} labels")
    return [label for label, keep in zip(labels, counted.tolist(), strict=True) if keep]
