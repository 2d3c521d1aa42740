"""Loss aggregation rules: the weight x_i that each response's gradient gets, written once.

Every rule is one formula over lengths, made of operators and sums only, so the same line serves NumPy arrays here
and torch tensors in `gradvar.losses`. Shape letters: n responses in scope.

    ghat = sum_i x_i A_i s_i

What the frameworks call each rule, read in verl (commit b178a3c, 0.8.0.dev of January 2026), TRL (commit f2cd577,
1.10.0.dev0) and SkyRL (commit a956457). verl's seq-mean-token-sum-norm divides by M only up to that commit (here
token_sum_norm), later by n M as Dr. GRPO does; a constant factor changes no CV.

| rule | x_i | verl | TRL | SkyRL |
|---|---|---|---|---|
| grpo | 1/(n L_i) | seq-mean-token-mean | loss_type="grpo" | sequence_mean |
| dapo | 1/sum_j L_j | token-mean | "dapo" (global batch), "bnpo" (local) | token_mean, prompt_mean (prompt scope) |
| dr_grpo | 1/(n M) | seq-mean-token-sum-norm (newer) | "dr_grpo" | seq_mean_token_sum_norm |
| token_sum_norm | 1/M | seq-mean-token-sum-norm (older) | | |
| vl_norm | L_i^-alpha / (M sum_j L_j^-alpha) | none ships it | | |
| token_sum | 1 | | | |
| seq_mean_token_sum | 1/n | seq-mean-token-sum | | |
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradvar.errors import GradvarError

Total = Callable[[Any], Any]
"""Sum of a quantity over the responses in scope, shaped so that it broadcasts against the quantity."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to weight the responses of a scope."""

    name: str
    """The registry's key."""
    label: str
    """How people write it."""
    formula: Callable[[Any, Any, Total, Any, Any], Any]
    """(lengths, n, total, max_length, alpha) to weights."""
    takes_max_length: bool = False
    """Whether M, the maximum response length, enters."""
    takes_alpha: bool = False
    """Whether the exponent alpha enters."""
    aliases: tuple[str, ...] = ()
    """What verl, TRL and SkyRL call it."""


def _grpo(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / (n * lengths)


def _dapo(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / total(lengths) + 0.0 * lengths


def _dr_grpo(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / (n * max_length) + 0.0 * lengths


def _vl_norm(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    # The mean length cancels in the ratio; with it no power over- or underflows (the authors' code does the same).
    shrunk = (lengths * n / total(lengths)) ** (-alpha)
    return shrunk / (max_length * total(shrunk))


def _token_sum(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 + 0.0 * lengths


def _token_sum_norm(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / max_length + 0.0 * lengths


def _seq_mean_token_sum(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / n + 0.0 * lengths


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(name="grpo", label="GRPO", formula=_grpo, aliases=("seq-mean-token-mean", "sequence_mean")),
        Rule(name="dapo", label="DAPO", formula=_dapo, aliases=("token-mean", "token_mean", "bnpo", "prompt_mean")),
        Rule(
            name="dr_grpo",
            label="Dr. GRPO",
            formula=_dr_grpo,
            takes_max_length=True,
            aliases=("seq-mean-token-sum-norm", "seq_mean_token_sum_norm"),
        ),
        Rule(name="vl_norm", label="VL Norm", formula=_vl_norm, takes_max_length=True, takes_alpha=True),
        Rule(name="token_sum", label="token sum", formula=_token_sum, aliases=("token-sum",)),
        Rule(
            name="token_sum_norm",
            label="token sum / M",
            formula=_token_sum_norm,
            takes_max_length=True,
        ),
        Rule(
            name="seq_mean_token_sum",
            label="sequence mean of token sums",
            formula=_seq_mean_token_sum,
            aliases=("seq-mean-token-sum",),
        ),
    )
}
"""Every rule by its name."""

_BY_ANY_NAME = {name: rule for rule in RULES.values() for name in (rule.name, *rule.aliases)}


def register_rule(rule: Rule) -> None:
    """Add a rule of your own: from here every estimator, table and `gradvar.aggregate_loss` knows it by its name.

    Raises:
        GradvarError: The name or an alias is taken.
    """
    taken = [name for name in (rule.name, *rule.aliases) if name in _BY_ANY_NAME]
    if taken:
        raise GradvarError(f"rule {rule.name!r}: the name {taken[0]!r} is taken; choose another")
    RULES[rule.name] = rule
    _BY_ANY_NAME.update(dict.fromkeys((rule.name, *rule.aliases), rule))


def find_rule(rule: str) -> Rule:
    """Return the rule of that name or alias.

    Raises:
        GradvarError: No rule has the name.
    """
    try:
        return _BY_ANY_NAME[rule]
    except KeyError:
        near = difflib.get_close_matches(rule, _BY_ANY_NAME, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise GradvarError(f"unknown rule {rule!r}{hint}: expected one of {', '.join(sorted(_BY_ANY_NAME))}") from None


def check_rule_arguments(rule: Rule, *, alpha: float | None, max_length: float | None) -> None:
    """Refuse a missing or impossible alpha or max_length.

    Raises:
        GradvarError: The rule needs what is missing, or a value is not a positive number (max_length) or not finite
            (alpha).
    """
    if rule.takes_max_length and max_length is None:
        raise GradvarError(f"rule {rule.name!r} divides by the maximum response length: give max_length in tokens")
    if max_length is not None and not (math.isfinite(max_length) and max_length > 0):
        raise GradvarError(f"max_length must be a positive number of tokens, received {max_length!r}")
    if rule.takes_alpha and alpha is None:
        raise GradvarError(f"rule {rule.name!r} needs alpha, for example 1.0 or the paper's other choice 0.75")
    if alpha is not None and not (isinstance(alpha, int | float | np.floating) and math.isfinite(alpha)):
        raise GradvarError(f"alpha must be a finite number, received {alpha!r}")


def scope_weights(rule: Rule, lengths: Any, total: Total, *, alpha: float | None, max_length: float | None) -> Any:
    """Evaluate one rule's formula where the caller says what a sum over the scope is.

    Args:
        rule: From `find_rule`.
        lengths: Floating point lengths in tokens, an array or tensor of any shape.
        total: Sums over the scope; its result must broadcast against `lengths`.
        alpha: Exponent of vl_norm.
        max_length: M in tokens.

    Returns:
        Weights, shaped as `lengths`.
    """
    return rule.formula(lengths, total(lengths * 0.0 + 1.0), total, max_length, alpha)


def aggregation_weights(
    rule: str,
    lengths: Any,
    *,
    alpha: float | None = None,
    max_length: float | None = None,
    groups: Sequence[Any] | Any | None = None,
) -> Any:
    """Weights x_i (N,) of a loss aggregation rule: ghat = sum_i x_i A_i s_i.

    With `groups` each prompt group is a scope of its own and the groups are averaged:
    x_i = (1 / number of groups) * rule inside the group of i. So "dapo" with groups is SkyRL's prompt_mean, and for
    groups of one size "grpo" and "dr_grpo" do not depend on the scope while "dapo" and "vl_norm" do.

    Args:
        rule: grpo, dapo, dr_grpo, vl_norm, token_sum, token_sum_norm, seq_mean_token_sum, or a framework's name for
            one of them.
        lengths: (N,) response lengths in tokens that carry loss: a sequence, an array or a torch tensor.
        alpha: Exponent of vl_norm; other rules ignore it.
        max_length: M in tokens, the longest response allowed; required by dr_grpo, vl_norm and token_sum_norm.
        groups: (N,) labels of the prompt groups; None makes all N responses one scope.

    Returns:
        (N,) weights in 1/token units of the rule: float64 array, or a tensor where a tensor came in.

    Raises:
        GradvarError: Unknown rule, missing or impossible alpha or max_length, lengths that are not positive, or
            labels that do not match the lengths.
    """
    found = find_rule(rule)
    check_rule_arguments(found, alpha=alpha, max_length=max_length)
    is_tensor = hasattr(lengths, "new_tensor")
    values: Any = lengths * 1.0 if is_tensor else np.asarray(lengths, dtype=np.float64)
    if values.ndim != 1 or values.shape[0] == 0:
        raise GradvarError(f"lengths must be one row of at least one response, received shape {tuple(values.shape)}")
    if not bool((values > 0).all()):
        raise GradvarError("lengths must all be positive: leave out responses without a token that carries loss")
    if groups is None:
        return scope_weights(found, values, lambda x: x.sum(), alpha=alpha, max_length=max_length)
    labels = np.asarray(groups.tolist() if hasattr(groups, "tolist") else list(groups))
    if labels.shape != tuple(values.shape):
        raise GradvarError(f"groups must label every response: {values.shape[0]} lengths, labels {labels.shape}")
    kinds, codes = np.unique(labels, return_inverse=True)
    one_hot: Any = np.eye(len(kinds))[codes]
    if is_tensor:
        one_hot = values.new_tensor(one_hot)
    weights = scope_weights(found, values, lambda x: one_hot @ (one_hot.T @ x), alpha=alpha, max_length=max_length)
    return weights / len(kinds)


def expand_rules(rules: Sequence[str], alphas: Sequence[float]) -> list[tuple[Rule, float | None]]:
    """Return each rule once, and once per alpha where it takes one.

    Raises:
        GradvarError: Unknown rule, an alpha that is not a finite number, or no alpha for a rule that takes one.
    """
    variants: list[tuple[Rule, float | None]] = []
    for name in rules:
        rule = find_rule(name)
        if rule.takes_alpha and not alphas:
            raise GradvarError(f"rule {rule.name!r} needs at least one alpha, for example 1.0")
        for alpha in alphas if rule.takes_alpha else (None,):
            check_rule_arguments(rule, alpha=alpha, max_length=1.0)
            variants.append((rule, None if alpha is None else float(alpha)))
    return variants
