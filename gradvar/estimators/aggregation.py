"""Loss aggregation rules: the weight x_i that each response's gradient gets, written once.

Every rule is one formula over lengths, made of operators and sums only, so the same line serves NumPy arrays here
and torch tensors in `gradvar.losses`. Shape letters: n responses in scope.

    ghat = sum_i x_i A_i s_i

What verl, TRL and SkyRL call each rule, with which arguments and over which responses, is in `Rule.settings`, read in
verl (volcengine/verl, commit b178a3c, 0.8.0.dev of January 2026), TRL (huggingface/trl, commit f2cd577, 1.10.0.dev0)
and SkyRL (NovaSky-AI/SkyRL, commit a956457); docs/aggregators.md is made of it. A constant factor changes no CV.
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


BATCH_SCOPE, PROMPT_SCOPE, MICRO_SCOPE = "mini-batch", "prompt group", "micro-batch"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What gives a rule in a training framework."""

    framework: str
    """"verl", "TRL" or "SkyRL", with the version where they differ."""
    argument: str
    """The framework's argument."""
    name: str
    """Its value, by which `find_rule` knows the rule, unless another version's rule has it."""
    scope: str = BATCH_SCOPE
    """The responses that the rule's sums run over."""
    max_length: str = ""
    """Which argument is M, where the rule has one."""

    def __str__(self) -> str:
        return f'{self.framework} {self.argument}="{self.name}"' + (f", M = {self.max_length}" * bool(self.max_length))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to weight the responses of a scope."""

    name: str
    """The registry's key."""
    label: str
    """How people write it."""
    formula: Callable[[Any, Any, Total, Any, Any], Any]
    """(lengths, n, total, max_length, alpha) to weights."""
    weight: str = ""
    """x_i for people."""
    takes_max_length: bool = False
    """Whether M, the maximum response length, enters."""
    takes_alpha: bool = False
    """Whether the exponent alpha enters."""
    aliases: tuple[str, ...] = ()
    """Further names of it."""
    settings: tuple[Setting, ...] = ()
    """What gives it in verl, TRL and SkyRL."""


def _grpo(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / (n * lengths)


def _dapo(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / total(lengths) + 0.0 * lengths


def _dr_grpo(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / (n * max_length) + 0.0 * lengths


def _vl_norm(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    # The mean length cancels in the ratio; with it small powers neither over- nor underflow (the authors' code does the
    # same). Large ones are reached by squaring shares, of which one is always at least 1/n: no alpha overflows.
    doublings = max(0, math.ceil(math.log2(abs(alpha) / _PLAIN_POWER))) if alpha else 0
    shrunk = (lengths * n / total(lengths)) ** (-alpha / 2**doublings)
    for _ in range(doublings):
        shrunk = (shrunk / total(shrunk)) ** 2
    return shrunk / (max_length * total(shrunk))


_PLAIN_POWER = 4.0
"""Powers of a length over the mean up to it stay inside float32 for every length."""


def _token_sum(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 + 0.0 * lengths


def _token_sum_norm(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / max_length + 0.0 * lengths


def _seq_mean_token_sum(lengths: Any, n: Any, total: Total, max_length: Any, alpha: Any) -> Any:
    return 1.0 / n + 0.0 * lengths


def _verl(name: str, version: str = "", max_length: str = "") -> Setting:
    argument = "actor_rollout_ref.actor.loss_agg_mode"
    return Setting(framework=f"verl{version}", argument=argument, name=name, max_length=max_length)


def _trl(name: str, scope: str = BATCH_SCOPE, max_length: str = "") -> Setting:
    return Setting(framework="TRL", argument="GRPOConfig loss_type", name=name, scope=scope, max_length=max_length)


def _skyrl(name: str, scope: str = BATCH_SCOPE, max_length: str = "") -> Setting:
    argument = "trainer.algorithm.loss_reduction"
    return Setting(framework="SkyRL", argument=argument, name=name, scope=scope, max_length=max_length)


_SCALE = "actor_rollout_ref.actor.loss_scale_factor (None: the padded length)"

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            name="grpo",
            label="GRPO",
            formula=_grpo,
            weight="1/(n L_i)",
            aliases=("seq-mean-token-mean", "sequence_mean"),
            settings=(_verl("seq-mean-token-mean"), _trl("grpo"), _skyrl("sequence_mean")),
        ),
        Rule(
            name="dapo",
            label="DAPO",
            formula=_dapo,
            weight="1/sum_j L_j",
            aliases=("token-mean", "token_mean", "bnpo", "prompt_mean"),
            settings=(
                _verl("token-mean"),
                _trl("dapo"),
                _trl("bnpo", MICRO_SCOPE),
                _skyrl("token_mean"),
                _skyrl("prompt_mean", PROMPT_SCOPE),
            ),
        ),
        Rule(
            name="dr_grpo",
            label="Dr. GRPO",
            formula=_dr_grpo,
            weight="1/(n M)",
            takes_max_length=True,
            aliases=("seq-mean-token-sum-norm", "seq_mean_token_sum_norm"),
            settings=(
                # Before that pull request the mean over sequences was missing: token_sum_norm.
                _verl("seq-mean-token-sum-norm", " from pull request 5417 (February 2026)", _SCALE),
                _trl("dr_grpo", max_length="max_completion_length"),
                _skyrl("seq_mean_token_sum_norm", max_length="trainer.algorithm.max_seq_len"),
            ),
        ),
        Rule(
            name="vl_norm",
            label="VL Norm",
            formula=_vl_norm,
            weight="L_i^-alpha / (M sum_j L_j^-alpha)",
            takes_max_length=True,
            takes_alpha=True,
        ),
        Rule(name="token_sum", label="token sum", formula=_token_sum, weight="1", aliases=("token-sum",)),
        Rule(
            name="token_sum_norm",
            label="token sum / M",
            formula=_token_sum_norm,
            weight="1/M",
            takes_max_length=True,
            settings=(_verl("seq-mean-token-sum-norm", " before pull request 5417", _SCALE),),
        ),
        Rule(
            name="seq_mean_token_sum",
            label="sequence mean of token sums",
            formula=_seq_mean_token_sum,
            weight="1/n",
            aliases=("seq-mean-token-sum",),
            settings=(_verl("seq-mean-token-sum"),),
        ),
    )
}
"""Every rule by its name."""

REFUSED = {
    "token_mean_legacy": "SkyRL's token_mean_legacy averages the token means of its micro-batches, so a response's "
    "weight depends on which others share its micro-batch (trainer.micro_train_batch_size_per_gpu), which no run of "
    'gradvar knows: study "dapo", which is its limit for large micro-batches; in a loss it is '
    'aggregate_loss(..., "dapo", groups=labels of the micro-batches)',
}
"""Names that are no rule of responses, and why."""

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
    """Return the rule of that name or alias; which framework means what by it is in its `settings`.

    Raises:
        GradvarError: No rule has the name.
    """
    if rule in REFUSED:
        raise GradvarError(f"rule {rule!r} is refused: {REFUSED[rule]}")
    try:
        return _BY_ANY_NAME[rule]
    except KeyError:
        near = difflib.get_close_matches(rule, _BY_ANY_NAME, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise GradvarError(f"unknown rule {rule!r}{hint}: expected one of {', '.join(sorted(_BY_ANY_NAME))}") from None


def needs_groups(name: str) -> bool:
    """Whether a name means a rule inside each prompt group, so that a batch without labels cannot have it."""
    return any(setting.name == name and setting.scope == PROMPT_SCOPE for setting in find_rule(name).settings)


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
        groups: (N,) labels of the prompt groups; None makes all N responses one scope. Required by "prompt_mean".

    Returns:
        (N,) weights in 1/token units of the rule: float64 array, or a tensor where a tensor came in.

    Raises:
        GradvarError: Unknown rule, missing or impossible alpha or max_length, lengths that are not positive, labels
            that do not match the lengths, or none where the name means prompt groups.
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
        if needs_groups(rule):
            raise GradvarError(
                f"rule {rule!r} is {found.name} inside each prompt group: give groups, or ask for {found.name!r} to "
                "have all responses as one scope"
            )
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
    """Return each rule once, and once per alpha where it takes one; names of one rule are one.

    Scopes are no part of it: a table of one prompt's updates has the prompt group as scope, one of batches gives every
    rule whose weights depend on it at both scopes, in the column `scope`.

    Raises:
        GradvarError: Unknown rule, an alpha that is not a finite number, or no alpha for a rule that takes one.
    """
    variants: list[tuple[Rule, float | None]] = []
    for rule in map(find_rule, rules):
        if rule.takes_alpha and not alphas:
            raise GradvarError(f"rule {rule.name!r} needs at least one alpha, for example 1.0")
        for alpha in alphas if rule.takes_alpha else (None,):
            check_rule_arguments(rule, alpha=alpha, max_length=1.0)
            variants.append((rule, None if alpha is None else float(alpha)))
    return list(dict.fromkeys(variants))
