"""What a pass hands over, sorted: predictions of response tokens, stores of gradients, factors by response.

Shape letters: N responses, T tokens of a batch row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, UnalignedTokensError
from gradvar.gradients.devices import execution_device, placed
from gradvar.gradients.gram import FactorStore, GradientStore, HeadStore, MatrixStore
from gradvar.gradients.job import Job
from gradvar.gradients.logprobs import TokenScores, compute_dtype
from gradvar.gradients.plan import Block
from gradvar.gradients.spill import HostFactorStore, HostMatrixStore, HostMemory


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """A batch's last hidden states where they predict response tokens; R such positions."""

    hidden: Tensor
    """(B, T, D) with its graph."""
    flat: Tensor
    """(R, D) the predicting ones, detached."""
    where: Tensor
    """(R,) their flat positions."""
    tokens: Tensor
    """(R,) the tokens that they predict."""
    weights: Tensor
    """(R,) weight of each token's log-probability."""
    spans: list[slice]
    """Each row's positions among the R."""
    scores: TokenScores

    def fill_heads(self, rows: Sequence[int], stores: Sequence[tuple[Block, GradientStore]]) -> None:
        """Hand the positions to the stores of output embeddings, in which `rows` are the batch's."""
        for _, store in stores:
            if isinstance(store, HeadStore):
                for i, span in zip(rows, self.spans, strict=True):
                    store.add_output(
                        i, self.flat[span], self.tokens[span], self.weights[span], self.scores.normaliser[span]
                    )

    def reweighted(self, factor: Tensor) -> Predictions:
        """Return the same positions with weights (and the gradients they make) times the factor (R,)."""
        gradient = self.scores.hidden_gradient
        scores = replace(self.scores, hidden_gradient=gradient * factor.to(gradient.device, gradient.dtype)[:, None])
        return replace(self, weights=self.weights * factor, scores=scores)

    def again(self, job: Job, factor: Tensor) -> Predictions:
        """Return the same as `reweighted`, the head run anew: what is measured inside it is captured as it runs."""
        weights = self.weights * factor
        scores = job.head.token_scores(self.flat, self.tokens, weights, job.temperature, job.plan.chunk_bytes)
        return replace(self, weights=weights, scores=scores)


def new_store(job: Job, block: Block, count: int, host: HostMemory | None) -> GradientStore:
    """Return a store for so many responses: as the plan has it, or (without `host`) of a batch's factors alone."""
    store = _new_store(job, block, count, host)
    store.key = block.target.key
    return store


def _new_store(job: Job, block: Block, count: int, host: HostMemory | None) -> GradientStore:
    rows = block.stop - block.start
    kind = compute_dtype(job.dtype)
    if block.target.kind == "head":
        head = job.head
        if head.weight is None:
            raise GradvarError(
                f"{block.target.key}: this model does more to its logits than a matrix product, a scale or a soft cap, "
                "so the head cannot be measured; choose other targets"
            )
        return HeadStore(count, block.start, rows, head.weight, head.bias, head.curve, job.temperature, kind)
    device = execution_device(job.model.get_submodule(block.target.module))
    size = (count, rows, block.target.in_features, kind, device)
    factors = (host is None or block.keep == "factors") and block.target.direct is None
    if host is not None and block.home == "host":
        return HostFactorStore(*size, host) if factors else HostMatrixStore(*size, host)
    return FactorStore(*size) if factors else MatrixStore(*size)


def collector(
    job: Job, batch: Batch, rows: Sequence[int], stores: Sequence[tuple[Block, GradientStore]]
) -> Callable[[str, Tensor, Tensor], None]:
    """Return the sink that sorts a batch's factors into the stores' `rows`, response by response."""
    # q, k and v get the same tensor: it is packed and kept once, unless something was written to it in between
    shared: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}

    def sink(path: str, a: Tensor, delta: Tensor) -> None:
        outputs = batch.split(delta, path)
        if path == job.tied:
            ids = batch.split(a[..., None], path)
            for _, store in stores:
                if isinstance(store, HeadStore):
                    for i, ids_i, delta_i in zip(rows, ids, outputs, strict=True):
                        store.add_input(i, ids_i[:, 0], _embedding_gradient(job, ids_i[:, 0], delta_i))
            return
        name = (id(a), a._version)
        if name not in shared:
            shared[name] = (a, batch.split(a.detach().to(delta.device), path))  # a hook may bring it after ours saw it
        for block, store in stores:
            if block.target.module == path:
                for i, a_i, delta_i in zip(rows, shared[name][1], outputs, strict=True):
                    store.add(i, a_i, delta_i[:, block.start : block.stop])

    return sink


def direct_collector(
    rows: Sequence[int], stores: Sequence[tuple[Block, GradientStore]]
) -> Callable[[str, Tensor], None]:
    """Return the sink that gives autograd's own gradients to the one response of a batch.

    Raises:
        UnalignedTokensError: There are several.
    """

    def sink(name: str, gradient: Tensor) -> None:
        if len(rows) > 1:
            raise UnalignedTokensError(f"{name}: its gradient cannot be told apart by response in a batch")
        for block, store in stores:
            direct, module = block.target.direct, block.target.module
            if direct is not None and isinstance(store, MatrixStore):
                span = slice(block.start, block.stop)
                if name == f"{module}.{direct.weight}":
                    store.add_gradient(rows[0], direct.rows(gradient)[span], None)
                elif name == f"{module}.{direct.bias}":
                    store.add_gradient(rows[0], None, gradient.flatten()[span])

    return sink


def _embedding_gradient(job: Job, ids: Tensor, outputs: Tensor) -> Tensor:
    """Return (T, D) gradients of the rows that the tokens fed take from the input embedding."""
    embedding = job.model.get_submodule(job.tied or "")
    gradient = outputs.to(compute_dtype(job.dtype)) * job.tied_scale
    skip = getattr(embedding, "padding_idx", None)  # torch gives that row no gradient
    return gradient if skip is None else gradient * (ids != skip)[:, None]


def predicting(job: Job, batch: Batch) -> list[int]:
    """Return the flat positions of a batch that predict response tokens, row by row."""
    length = batch.input_ids.shape[1]
    where: list[int] = []
    for row, i in enumerate(batch.members):
        start = (0 if batch.packed else row * length) + batch.firsts[row] + len(job.prompt) - 1
        where += range(start, start + len(job.responses[i]))
    return where


def predictions(job: Job, batch: Batch, hidden: Tensor) -> Predictions:
    """Return where the batch's last hidden states predict response tokens, and what they say of them."""
    tokens: list[int] = []
    weights: list[int] = []
    spans = []
    for i in batch.members:
        spans.append(slice(len(tokens), len(tokens) + len(job.responses[i])))
        tokens += job.responses[i]
        weights += job.masks[i]
    device = batch.input_ids.device
    at = placed(predicting(job, batch), hidden.device)
    flat = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, at)
    chosen = placed(tokens, device)
    weight = placed(weights, device, compute_dtype(job.dtype))
    return Predictions(
        hidden=hidden,
        flat=flat,
        where=at,
        tokens=chosen,
        weights=weight,
        spans=spans,
        scores=job.head.token_scores(flat, chosen, weight, job.temperature, job.plan.chunk_bytes),
    )
