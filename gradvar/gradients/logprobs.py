"""Log-probabilities of the responses' tokens and the gradient of their sum in the last hidden states, without logits.

With z = h W' + b, logits y = f(z) and p = softmax(y / temperature):
    d log p(o) / dh = (f'(z_o) W[o] - (p f'(z)) W) / temperature,
taken in chunks of tokens, so that no (tokens x vocabulary) tensor of a whole sequence exists. f is nothing, a scale or
a soft cap (`Curve`); where the model does something else to its logits, its own code is run on chunks of hidden states
and differentiated by autograd. What holds is found by running the model's own code on amplified hidden states.

Shape letters: C tokens of a chunk, D hidden width, V vocabulary, T all tokens asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradvar.errors import GradvarError
from gradvar.gradients.capture import hooked
from gradvar.gradients.curve import Curve, fitted_curves
from gradvar.gradients.devices import input_device, values
from gradvar.gradients.states import Autocast
from gradvar.gradients.targets import output_embeddings

_CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}  # from 32 MiB up, glibc gives every chunk fresh pages to fault in
_IN_CACHE = 1 << 19
"""Bytes of logits that are worked on at one time on a CPU: three times that stays in a core's cache between steps."""
VOCABULARY_TILE = 8192
_AMPLITUDES = (1.0, 8.0, 64.0)
"""Largest logits, before scaling, at which the head is probed, and at twice its own: caps show at large ones alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenScores:
    """Per-token results of one call."""

    hidden_gradient: Tensor
    """(T, D) d(sum of weight_t log p_t)/dh, in the compute dtype."""
    logprobs: Tensor
    """(T,) log-probability of each token in nats, at the temperature, in the compute dtype."""
    entropy: Tensor
    """(T,) entropy of the next-token distribution in nats."""
    collision: Tensor
    """(T,) sum over the vocabulary of p^2."""
    normaliser: Tensor
    """(T,) log sum exp of the logits divided by the temperature (0 where the model's own head was run)."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 models and float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_bytes(device: torch.device) -> int:
    """Return the size of the largest chunk of logits on a device."""
    return _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"])


class Head:
    """What the model does between its last hidden state and the logits, probed once.

    Args:
        model: The causal language model, in eval mode.
        probe_ids: A few token ids of the vocabulary.

    Raises:
        GradvarError: The model's logits cannot be had from its last hidden states.
    """

    def __init__(self, model: nn.Module, probe_ids: list[int]) -> None:
        self._model = model
        self._autocast = Autocast.current(input_device(model))
        self.module = output_embeddings(model)
        ids = torch.tensor([probe_ids], device=input_device(model))
        with torch.no_grad():
            with _naming_experts(model):
                expected = model(input_ids=ids, use_cache=False).logits
            self.base, self._template = self._find_base(ids, expected)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.curve = Curve()
        self._ids = ids[:, :1]
        self._read_linear(self._template["last_hidden_state"])

    @property
    def probe_states(self) -> Tensor:
        """(1, T, D) last hidden states of the probe ids."""
        states: Tensor = self._template["last_hidden_state"]
        return states

    @property
    def is_linear(self) -> bool:
        """Whether logits are h W' + b with the weight and bias of one matrix, each perhaps scaled or soft-capped."""
        return self.weight is not None

    @property
    def description(self) -> str:
        """How the log-probabilities are made, for the run's record."""
        if not self.is_linear:
            return "the model's own head"
        if self.curve.cap is not None:
            return f"linear, soft-capped at {self.curve.cap:.6g}"
        return "linear" if self.curve.is_identity else f"linear, scaled by {self.curve.scale:.6g}"

    def _find_base(self, ids: Tensor, expected: Tensor) -> tuple[nn.Module, Any]:
        """Return the module whose last hidden state, put back in its place, gives the model's logits."""
        for base in _base_candidates(self._model):
            output = base(input_ids=ids, use_cache=False)
            if not hasattr(output, "last_hidden_state"):
                continue
            called: list[bool] = []
            with _replaced(base, output, called):
                again = self._model(input_ids=ids, use_cache=False).logits
            # the states in reverse must give the logits in reverse: some heads read other outputs than these states
            backwards = type(output)(**{**output, "last_hidden_state": output["last_hidden_state"].flip(1)})
            with _replaced(base, backwards, []):
                reverse = self._model(input_ids=ids, use_cache=False).logits
            if called and again.shape == expected.shape and _close(again, expected) and _close(reverse, again.flip(1)):
                return base, output
        raise GradvarError(
            f"{type(self._model).__name__}: no inner model was found whose last hidden state gives the model's logits; "
            "expected a transformers causal language model (model.base_model or model.get_decoder())"
            + hooked(self._model, *_base_candidates(self._model))
        )

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Return the (C, V) logits that the model's own code makes of (C, D) hidden states."""
        output = type(self._template)(**{**self._template, "last_hidden_state": hidden[None]})
        ids = self._ids.expand(1, hidden.shape[0])
        with _replaced(self.base, output, []), self._autocast.on():
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits[0]

    def _read_linear(self, hidden: Tensor) -> None:
        module = self.module
        if not isinstance(module, nn.Linear):
            return
        with values(module):  # what is offloaded is brought once and kept
            weight, bias = module.weight, module.bias
        if weight.is_meta or not weight.is_floating_point() or type(weight.data) is not Tensor:  # quantised or sharded
            return
        flat = hidden[0].to(weight.device, weight.dtype)  # Mamba's states are float32, its head may be narrower
        if flat.shape[-1] != weight.shape[1]:  # more lies between (ELECTRA's generator makes states narrower)
            return
        with torch.no_grad():
            flat = flat[flat.isfinite().all(-1)]
            natural = functional.linear(flat, weight, bias).abs()
            largest = float(natural.where(natural.isfinite(), 0.0).max()) if natural.numel() else 0.0
            if largest == 0:  # nothing that a scale or a cap would show in
                return
            amplitudes = [*_AMPLITUDES, *([2 * largest] if 2 * largest > _AMPLITUDES[-1] else [])]
            # several in one call: a few rows more cost little beside bringing the matrix once more
            room = max(1, chunk_bytes(weight.device) // (natural.numel() * weight.element_size()))
            pairs: list[tuple[Tensor, Tensor]] = []
            for start in range(0, len(amplitudes), room):
                probe = torch.cat([flat * (amplitude / largest) for amplitude in amplitudes[start : start + room]])
                probe = probe.to(hidden.dtype).to(weight.dtype)
                own = self.own_logits(probe.to(hidden.device, hidden.dtype)).to(weight.device)
                z = functional.linear(probe, weight, bias)
                if own.shape != z.shape:
                    return
                pairs += zip(torch.split(z, len(flat)), torch.split(own, len(flat)), strict=True)
            if not all(bool((z.isfinite() & own.isfinite()).any()) for z, own in pairs):
                return
            for curve in fitted_curves(pairs):
                bent = [(curve.apply_(z.to(compute_dtype(z.dtype), copy=True)).to(y.dtype), y) for z, y in pairs]
                if all(_close(y, ours) and _same_together(y, ours) for ours, y in bent):
                    self.weight, self.bias, self.curve = weight.detach(), None if bias is None else bias.detach(), curve
                    return

    def token_scores(
        self, hidden: Tensor, tokens: Tensor, weights: Tensor, temperature: float, chunk_size: int
    ) -> TokenScores:
        """Return log-probabilities and the gradient of their weighted sum.

        Args:
            hidden: (T, D) last hidden states, detached.
            tokens: (T,) the token that each of them predicts.
            weights: (T,) 1 where the token carries loss, else 0.
            temperature: Divides the logits.
            chunk_size: Bytes of a chunk of logits, at most (that of a single token, where it is larger).
        """
        vocabulary = self.shape()[0]
        chunk = max(1, chunk_size // (vocabulary * (8 if hidden.dtype == torch.float64 else 4)))
        parts = [
            self._chunk(hidden[i : i + chunk], tokens[i : i + chunk], weights[i : i + chunk], temperature)
            for i in range(0, hidden.shape[0], chunk)
        ]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        return TokenScores(
            hidden_gradient=columns[0],
            logprobs=columns[1],
            entropy=columns[2],
            collision=columns[3],
            normaliser=columns[4],
        )

    def alive_bytes(self, chunk: int, dtype: torch.dtype) -> int:
        """Return the most bytes of logits alive at one time in `token_scores`.

        Args:
            chunk: Bytes of a chunk.
            dtype: Of the hidden states.
        """
        if self.weight is None:
            return 9 * chunk  # the graph of the model's own code too
        kind = compute_dtype(dtype)
        in_cache = max(_IN_CACHE, self.shape()[0] * kind.itemsize)
        part = min(chunk, in_cache) if self.weight.device.type == "cpu" else chunk
        made = 1 if dtype == self.weight.dtype == kind or self.weight.is_cuda else 2  # tiles and what they are put into
        return max(made * chunk, chunk + 3 * part)  # exponentials, logits without -inf, the product of both

    def shape(self) -> tuple[int, int]:
        """Return (vocabulary, hidden width)."""
        width = int(self._template["last_hidden_state"].shape[-1])
        return (self.weight.shape[0] if self.weight is not None else self._vocabulary(), width)

    def _vocabulary(self) -> int:
        size = getattr(self.module, "out_features", None)
        return int(size) if size is not None else int(self._model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]

    def _chunk(self, hidden: Tensor, tokens: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, ...]:
        if self.weight is None:
            return self._own_chunk(hidden, tokens, weights, temperature)
        home = hidden.device
        hidden, tokens, weights = (x.to(self.weight.device) for x in (hidden, tokens, weights))
        logits = _product(hidden, self.weight)
        height = max(1, _IN_CACHE // logits[:1].nbytes) if logits.device.type == "cpu" else len(logits)
        columns = []
        for start in range(0, len(logits), height):
            part = logits[start : start + height]
            exponentials, *read = self._exponentials(part, tokens[start : start + height], temperature)
            columns.append(read)
            if len(part) < len(logits):
                part.copy_(exponentials)
            else:
                logits = exponentials
        chosen, slope, total, entropy, collision, normaliser = map(torch.cat, zip(*columns, strict=True))
        gradient = _weighted_rows(logits, self.weight).div_(-total[:, None])
        rows = self.weight[tokens]
        gradient += rows if self.curve.cap is None else rows * slope[:, None]
        gradient *= (weights * (self.curve.scale if self.curve.cap is None else 1.0) / temperature)[:, None]
        return tuple(x.to(home) for x in (gradient, chosen, entropy, collision, normaliser))

    def _exponentials(self, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, ...]:
        """Return exp(y / temperature - largest) times f'(z), and per row what is read off on the way.

        That is (C,) log-probabilities, slopes f'(z) of the tokens, sums of the exponentials, entropies, collisions and
        log normalisers. z, products of the matrix (C, V), are overwritten.
        """
        # few passes over (C, V): each costs more than its arithmetic
        if self.bias is not None:
            logits += self.bias
        self.curve.apply_(logits)
        if temperature != 1:
            logits /= temperature
        largest = logits.amax(-1, keepdim=True)
        logits -= largest
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        exponentials = logits.exp()
        total = exponentials.sum(-1)
        log_total = total.log()
        below = None if logits.is_cuda else torch.linalg.vecdot(exponentials, logits)
        # 0 times -inf, where a logit is -inf: on the CPU looked for, a GPU would have to be waited for
        if below is None or bool(below.isnan().any()):
            below = torch.linalg.vecdot(exponentials, logits.clamp_min(-1e30))
        entropy = log_total - below / total
        collision = (torch.linalg.vector_norm(exponentials, dim=-1) / total).square()
        normaliser = largest[:, 0] + log_total
        slope = total
        if self.curve.cap is not None:
            slopes = self.curve.slope_(logits.add_(largest).mul_(temperature))
            exponentials *= slopes
            slope = slopes.gather(1, tokens[:, None])[:, 0]
        return exponentials, chosen - log_total, slope, total, entropy, collision, normaliser

    def _own_chunk(self, hidden: Tensor, tokens: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, ...]:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.own_logits(leaf).to(compute_dtype(hidden.dtype)) / temperature
            logp = logits.log_softmax(-1)
            chosen = logp.gather(1, tokens.to(logp.device)[:, None])[:, 0]
            (gradient,) = torch.autograd.grad((chosen * weights.to(logp.device)).sum(), leaf)
        logp, home = logp.detach(), hidden.device
        probability = logp.exp()
        entropy = -torch.linalg.vecdot(probability, logp.clamp_min(-1e30))
        collision = torch.linalg.vecdot(probability, probability)
        results = (gradient.to(logp.dtype), chosen.detach(), entropy, collision, torch.zeros_like(entropy))
        return tuple(x.to(home) for x in results)


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight' in the compute dtype, no copy of the whole weight made."""
    kind = compute_dtype(hidden.dtype)
    if hidden.dtype == weight.dtype == kind:
        return hidden @ weight.T
    if hidden.is_cuda and hidden.dtype == weight.dtype:
        return torch.mm(hidden, weight.T, out_dtype=kind)
    wide = hidden.to(kind)
    return torch.cat([wide @ rows.to(kind).T for rows in torch.split(weight, VOCABULARY_TILE)], dim=1)


def _weighted_rows(probability: Tensor, weight: Tensor) -> Tensor:
    """Return probability @ weight in the dtype of `probability`, no copy of the whole weight made."""
    if weight.dtype == probability.dtype:
        return probability @ weight
    if weight.is_cuda:
        return torch.mm(probability.to(weight.dtype), weight, out_dtype=probability.dtype)
    total = torch.zeros((probability.shape[0], weight.shape[1]), dtype=probability.dtype, device=weight.device)
    for columns, rows in zip(
        torch.split(probability, VOCABULARY_TILE, 1), torch.split(weight, VOCABULARY_TILE), strict=True
    ):
        total.addmm_(columns, rows.to(probability.dtype))
    return total


@contextmanager
def _naming_experts(model: nn.Module) -> Iterator[None]:
    """Say which of transformers' ways to run experts lacks float64; torch's own error names a matrix alone."""
    try:
        yield
    except RuntimeError as error:
        way = getattr(getattr(model, "config", None), "_experts_implementation", None)
        if way in (None, "eager") or re.search("Double|float64", str(error)) is None:
            raise
        raise GradvarError(
            f"{type(model).__name__} runs its experts by {way}, whose operator takes no float64 ({error}): load it "
            'with experts_implementation="eager", or in float32'
        ) from error


def _base_candidates(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the inner models that transformers' conventions suggest, outermost first."""
    seen = {id(model)}
    base = getattr(model, "base_model", None)
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if getter is not None else None
    for candidate in (base, decoder, getattr(base, "decoder", None), getattr(model, "model", None)):
        if isinstance(candidate, nn.Module) and id(candidate) not in seen:
            seen.add(id(candidate))
            yield candidate


@contextmanager
def _replaced(module: nn.Module, output: Any, called: list[bool]) -> Iterator[None]:
    """Let the module return `output` without computing anything, and note in `called` that it was asked."""

    def answer(*args: object, **kwargs: object) -> Any:
        called.append(True)
        return output

    own = module.__dict__.get("forward")
    module.forward = answer
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree to some roundings of the coarser dtype, relative to the largest entry."""
    epsilon = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    roundings = 32 if epsilon < torch.finfo(torch.float16).eps else 4  # 32 of bfloat16's are a quarter
    a, b = a.double(), b.to(a.device).double()
    scale = float(b.abs().where(b.isfinite(), 0.0).amax())
    same = (a - b).abs() <= roundings * epsilon * scale
    return bool(same.all()) or bool((same | (a == b) | (a.isnan() & b.isnan())).all())


def _same_together(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors differ by no more than roundings do together: in scale, where they average out, least.

    A factor or a term for each token of the vocabulary hides in entry by entry comparisons of half precision.
    """
    epsilon = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    a, b = a.double(), b.to(a.device).double()
    finite = a.isfinite() & b.isfinite()
    gap = a - b
    if not bool(finite.all()):
        gap, b = gap[finite], b[finite]
    roundings = 8.0 if epsilon < torch.finfo(torch.float16).eps else 0.5
    return bool((gap * b).sum().abs() <= roundings * epsilon * b.square().sum()) and bool(
        gap.norm() <= 2 * roundings * epsilon * b.norm()
    )
