"""Per-response gradients kept as factors or as matrices, and their Gram in tiles of rows.

The gradient of response i over a weight is G_i = sum_t delta_t a_t' (O x I), over its bias sum_t delta_t. A tile holds
the same rows of all N gradients, M (N x rows I), and S += M M': memory for the tile does not grow with the matrix.
Products are taken in float32 (float64 for float64 models) over short stretches and summed in float64.

Shape letters: N responses, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gradvar.errors import GradvarError
from gradvar.gradients.curve import Curve
from gradvar.gradients.plan import aligned_rows

_STRETCH = 1 << 16
"""Longest inner product taken without float64 in between, in entries; a quarter of it on a GPU, to occupy all of it."""
PIECE = 1 << 20
"""Largest intermediate product on a CPU, in entries."""


def piece(device: torch.device) -> int:
    """Return the entries of the largest intermediate product: a GPU would be left mostly idle by a CPU's."""
    return PIECE if device.type == "cpu" else PIECE << 4


class GradientStore(ABC):
    """What is kept of N responses' gradients over one block of O rows and I columns."""

    key = "a measured module"
    """The target's, for errors."""

    def __init__(self, responses: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.responses = responses
        self.rows = rows
        self.columns = columns
        self.dtype = dtype
        self.device = device
        self._wide = torch.device("cpu") if device.type == "mps" else device
        self._bias = torch.zeros((responses, rows), dtype=torch.float64, device=self._wide)

    def add(self, response: int, a: Tensor, delta: Tensor) -> None:
        """Add one call's factors, a (T, I) and delta (T, O), to a response's gradient."""
        self._bias[response] += delta.sum(0, dtype=self.dtype).to(self._wide, torch.float64)
        self._keep(response, a, delta)

    @abstractmethod
    def _keep(self, response: int, a: Tensor, delta: Tensor) -> None:
        """Keep the weight's part."""

    @abstractmethod
    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out` (stop - start, I)."""

    def ahead(self, response: int, start: int, stop: int) -> None:  # noqa: B027
        """Be told what `fill` is asked for next, to have it there by then."""

    def forget(self, response: int) -> None:  # noqa: B027
        """Let go of the factors of a response's weight."""

    def bias_gradients(self) -> Tensor:
        """Return the (N, O) float64 sums of all responses."""
        return self._bias

    def bias_gradient(self, response: int) -> Tensor:
        """Return a response's (O,) float64 sum_t delta_t."""
        return self._bias[response]

    def finite(self, responses: Sequence[int]) -> list[bool]:
        """Return of each response whether its gradient, as far as it was added, is finite: a GPU is waited for once."""
        return torch.stack([self._is_finite(response) for response in responses]).tolist()

    def _is_finite(self, response: int) -> Tensor:
        return self._bias[response].isfinite().all()

    def gram(self, include_bias: bool, tile_bytes: int, on_tile: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Return the (N, N) float64 Gram, on the CPU.

        Args:
            include_bias: Whether the bias gradients count as parameters too.
            tile_bytes: Size of the largest tile.
            on_tile: Shown the first row and the gradients (N, rows I) of every tile.
        """
        width = torch.finfo(self.dtype).bits // 8
        height = aligned_rows(self.rows, max(1, tile_bytes // (self.responses * self.columns * width)))
        total = torch.zeros((self.responses, self.responses), dtype=torch.float64, device=self._wide)
        buffer = torch.empty((self.responses, height * self.columns), dtype=self.dtype, device=self.device)
        for start in range(0, self.rows, height):
            stop = min(start + height, self.rows)
            tile = buffer[:, : (stop - start) * self.columns]
            for response in range(self.responses):
                self.fill(response, start, stop, tile[response].view(stop - start, self.columns))
                if response + 1 < self.responses:
                    self.ahead(response + 1, start, stop)
                elif stop < self.rows:
                    self.ahead(0, stop, min(stop + height, self.rows))
            if on_tile is not None:
                on_tile(start, tile)
            for part in _stretches(tile):
                total += torch.bmm(part, part.transpose(1, 2)).to(self._wide).sum(0, dtype=torch.float64)
        if include_bias:
            total += self._bias @ self._bias.T
        return ((total + total.T) / 2).cpu()

    def squared_norms(self, include_bias: bool, tile_bytes: int) -> Tensor:
        """Return each response's (N,) float64 squared norm, on the CPU: the Gram's diagonal alone."""
        width = torch.finfo(self.dtype).bits // 8
        height = aligned_rows(self.rows, max(1, tile_bytes // (self.columns * width)))
        total = torch.zeros(self.responses, dtype=torch.float64, device=self._wide)
        buffer = torch.empty((height, self.columns), dtype=self.dtype, device=self.device)
        for response in range(self.responses):
            for start in range(0, self.rows, height):
                stop = min(start + height, self.rows)
                tile = buffer[: stop - start]
                self.fill(response, start, stop, tile)
                total[response] += torch.linalg.vecdot(tile, tile).to(self._wide, torch.float64).sum()
        if include_bias:
            total += self._bias.square().sum(1)
        return total.cpu()


class FactorStore(GradientStore):
    """Keeps a and delta: small where responses are short against the matrix."""

    def __init__(self, responses: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(responses, rows, columns, dtype, device)
        self._factors: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(responses)]
        self._versions: list[list[int]] = [[] for _ in range(responses)]

    def forget(self, response: int) -> None:
        """Let go of the factors of a response's weight."""
        self._factors[response].clear()
        self._versions[response].clear()

    def _keep(self, response: int, a: Tensor, delta: Tensor) -> None:
        # rows of a fused matrix are copied: a view would hold the other rows in memory
        self._factors[response].append((a, delta.contiguous()))
        self._versions[response].append(a._version)

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        if not self._factors[response]:
            out.zero_()
        for i, (a, delta) in enumerate(self._factors[response]):
            check_unchanged(self.key, a, self._versions[response][i])
            if i == 0:
                multiply(delta[:, start:stop].T, a, out)
            else:
                add_product(delta[:, start:stop].T, a, out)


class MatrixStore(GradientStore):
    """Keeps the gradients themselves: small where responses are long against the matrix."""

    def __init__(self, responses: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(responses, rows, columns, dtype, device)
        self._gradients = torch.zeros((responses, rows, columns), dtype=dtype, device=device)

    def _keep(self, response: int, a: Tensor, delta: Tensor) -> None:
        add_product(delta.T, a, self._gradients[response])

    def add_gradient(self, response: int, weight: Tensor | None, bias: Tensor | None) -> None:
        """Add a part of a response's gradient, as autograd gave it: weight (O, I), bias (O,)."""
        if weight is not None:
            self._gradients[response] += weight.to(self.device, self.dtype)
        if bias is not None:
            self._bias[response] += bias.to(self._wide, torch.float64)

    def _is_finite(self, response: int) -> Tensor:
        low, high = torch.aminmax(self._gradients[response])  # makes no copy
        return super()._is_finite(response) & (low.isfinite() & high.isfinite()).to(self._wide)

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        out.copy_(self._gradients[response, start:stop])


class HeadStore(GradientStore):
    """The output embedding: delta_t = (onehot(o_t) - p_t) f'(z_t) / temperature, made again for the rows of each tile.

    f is the curve between the matrix product z and the logits.

    Where the matrix is the input embedding too, the gradient that arrives there is added: it lands on the rows of the
    tokens fed.
    """

    def __init__(
        self,
        responses: int,
        first_row: int,
        rows: int,
        weight: Tensor,
        bias: Tensor | None,
        curve: Curve,
        temperature: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(responses, rows, weight.shape[1], dtype, weight.device)
        self._curve = curve
        self._span = slice(first_row, first_row + rows)
        self._weight = weight[self._span]
        self._shift = None if bias is None else bias[self._span]
        self._temperature = temperature
        self._outputs: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._inputs: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add_output(self, response: int, hidden: Tensor, tokens: Tensor, weights: Tensor, normaliser: Tensor) -> None:
        """Add the predicting positions: hidden (T, I), tokens, weights and log normalisers (T,)."""
        home = self.device
        self._outputs[response] = (
            hidden.to(home), tokens.to(home) - self._span.start, weights.to(home), normaliser.to(home)
        )  # fmt: skip
        if self._shift is not None:
            for begin, end in self._pieces(response, 0, self.rows):
                delta = self._delta(response, begin, end)
                self._bias[response, begin:end] = delta.sum(0).to(self._wide, torch.float64)

    def add_input(self, response: int, ids: Tensor, gradient: Tensor) -> None:
        """Add what arrives at one call of the input embedding: ids (T,), gradient (T, I)."""
        part = (ids.to(self.device) - self._span.start, gradient.to(self.device, self.dtype))
        self._inputs.setdefault(response, []).append(part)

    def _keep(self, response: int, a: Tensor, delta: Tensor) -> None:
        raise TypeError("the output embedding takes add_output and add_input")

    def _pieces(self, response: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return rows [begin, end) whose delta over all positions is at most one `piece`."""
        height = aligned_rows(self.rows, max(1, piece(self.device) // len(self._outputs[response][0])))
        return [(begin, min(begin + height, stop)) for begin in range(start, stop, height)]

    def _delta(self, response: int, start: int, stop: int) -> Tensor:
        hidden, tokens, weights, normaliser = self._outputs[response]
        logits = torch.empty((len(hidden), stop - start), dtype=self.dtype, device=self.device)
        multiply(hidden, self._weight[start:stop].T, logits)
        if self._shift is not None:
            logits += self._shift[start:stop]
        self._curve.apply_(logits)
        delta = -torch.exp(logits / self._temperature - normaliser[:, None])
        here = (tokens >= start) & (tokens < stop)  # chosen by a product: indices would have to be waited for
        delta.scatter_add_(1, (tokens - start).clamp(0, stop - start - 1)[:, None], here.to(self.dtype)[:, None])
        delta *= (weights / self._temperature)[:, None]
        if not self._curve.is_identity:
            delta *= self._curve.slope_(logits)
        return delta

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        hidden = self._outputs[response][0]
        for begin, end in self._pieces(response, start, stop):
            _multiply_wide(self._delta(response, begin, end).T, hidden, out[begin - start : end - start])
        for ids, gradient in self._inputs.get(response, []):
            here = (ids >= start) & (ids < stop)
            out.index_add_(0, ids[here] - start, gradient[here])


def check_unchanged(key: str, a: Tensor, version: int) -> None:
    """Refuse a target whose input was written again since it was kept: its gradient is lost.

    Args:
        key: The target's.
        a: The input.
        version: Torch's count of what was written to it, as it was kept.
    """
    if a._version != version:
        raise GradvarError(
            f"{key}: the model used this module's input again for other responses (a buffer of its own?), so its "
            "gradient is lost: choose other targets"
        )


def _stretches(tile: Tensor) -> Iterator[Tensor]:
    """Yield a tile (N, K) as views (stretches, N, length): all whole stretches, then what is left."""
    length = _STRETCH if tile.device.type == "cpu" else max(1, _STRETCH // 4)
    whole = tile.shape[1] // length
    if whole:
        yield tile[:, : whole * length].view(len(tile), whole, length).transpose(0, 1)
    if whole * length < tile.shape[1]:
        yield tile[:, whole * length :][None]


_HALVES = (torch.bfloat16, torch.float16)


def _widens(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Return whether CUDA takes the product as it is: half-precision operands and a float32 result alone."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in _HALVES and out.dtype == torch.float32


@lru_cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch adds a half-precision product to a float32 sum: some want one dtype of the three."""
    half, total = torch.ones((16, 16), dtype=dtype, device=device), torch.ones((16, 16), device=device)
    try:
        torch.addmm(total, half, half, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left @ right to `out` in its dtype: half-precision operands, float32 sums."""
    if _widens(left, right, out):
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _multiply_wide(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right to `out`, left in its dtype: on CUDA a bfloat16 right meets left in two bfloat16 parts.

    They hold 16 bits of left's 24, at several times the rate of float32 products.
    """
    if left.is_cuda and left.dtype == torch.float32 and right.dtype == torch.bfloat16:
        high = left.bfloat16()
        multiply(high, right, out)
        add_product(left.sub(high).bfloat16(), right, out)
    else:
        multiply(left, right, out)


def add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """Add left @ right to `total`, a piece of rows at a time where the dtypes differ."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
        return
    if _widens(left, right, total) and _adds_wide(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    height = max(1, piece(total.device) // total.shape[1])
    for start in range(0, total.shape[0], height):
        part = total[start : start + height]
        part += multiply(left[start : start + height], right, torch.empty_like(part))
