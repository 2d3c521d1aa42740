"""Every way to the same Grams: ours, loops of autograd, torch.func, opacus, BackPACK, bergson.

Each takes the work and returns the (N, N) Gram of every target's weight and bias. Each is given its best honest
configuration: only the targets take gradients (but for the loop of full backward passes, which is what people write
first), so autograd keeps no graph below the lowest; batches are sorted by length; their budget of
512 padded tokens was the fastest of 512, 1024, 2048 and 4096 for each of them on the 27M model, short and mixed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gradients.common import Grams, Rows, batches, only_targets, pad, score
from benchmarks.gradients.shapes import Work


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One way to the Grams."""

    name: str
    run: Callable[[Work, int], Grams]
    package: str | None = None
    """What has to be installed."""
    what: str
    """What was done, one line."""
    token_budget: int = 0
    """Padded tokens of a batch; 0 where responses go one at a time or the library chooses."""
    tolerance: float = 1e-4
    """Largest difference of a Gram's entry from the reference's, relative to the largest entry, that is accepted."""
    once: bool = False
    """Timed in the first repeat alone."""


def ours(work: Work, token_budget: int) -> Grams:
    """`gradvar.measure_scores` as it comes."""
    from gradvar.gradients import measure_scores

    found = measure_scores(
        work.model, work.prompt, work.responses, list(work.targets), token_budget=token_budget or None
    )
    return {key: gram.gram() for key, gram in found.grams.items()}


def ours_bounded(work: Work, token_budget: int) -> Grams:
    """The same within 256 MiB beside the model."""
    from gradvar.gradients import measure_scores

    found = measure_scores(work.model, work.prompt, work.responses, list(work.targets), memory_budget=BOUND)
    return {key: gram.gram() for key, gram in found.grams.items()}


def ours_bfloat16(work: Work, token_budget: int) -> Grams:
    """The same under bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ours(work, token_budget)


def full_backward(work: Work, token_budget: int) -> Grams:
    """One backward pass a response through the whole model; the targets' gradients are taken."""
    rows = Rows(work)
    for i in range(len(work.responses)):
        one = pad(work, [i])
        work.model.zero_grad(set_to_none=True)
        score(work.model, one.ids, one.labels).backward()  # type: ignore[no-untyped-call]
        for path in work.modules:
            module = work.model.get_submodule(path)
            rows.put_module([i], path, module.weight.grad, None if module.bias is None else module.bias.grad)
    work.model.zero_grad(set_to_none=True)
    return rows.grams()


def autograd_loop(work: Work, token_budget: int) -> Grams:
    """One `torch.autograd.grad` a response, over the targets alone."""
    rows = Rows(work)
    with only_targets(work) as chosen:
        for i in range(len(work.responses)):
            one = pad(work, [i])
            found = torch.autograd.grad(score(work.model, one.ids, one.labels), list(chosen.values()))
            for name, gradient in zip(chosen, found, strict=True):
                rows.put([i], name, gradient)
    return rows.grams()


def func_vmap(work: Work, token_budget: int) -> Grams:
    """`torch.func.vmap(grad)` over batches, the model called with the targets as arguments."""
    rows = Rows(work)
    with only_targets(work) as chosen:
        values = {name: parameter.detach() for name, parameter in chosen.items()}
        for parameter in chosen.values():
            parameter.requires_grad_(False)

        def one(changed: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
            call = torch.func.functional_call
            kept = {"use_cache": False, "logits_to_keep": labels.shape[-1]}
            logits: Tensor = call(work.model, changed, (ids[None],), kept).logits[0]
            logp = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
            total: Tensor = (logp * (labels >= 0)).sum()
            return total

        gradients = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
        for batch in batches(work, token_budget):
            for name, gradient in gradients(values, batch.ids, batch.labels).items():
                rows.put(batch.members, name, gradient)
    return rows.grams()


def opacus(work: Work, token_budget: int) -> Grams:
    """opacus.GradSampleModule: hooks on the layers that take gradients, `grad_sample` on their parameters."""
    from opacus import GradSampleModule

    rows = Rows(work)
    with only_targets(work) as chosen:
        wrapped = GradSampleModule(work.model, batch_first=True, loss_reduction="sum", strict=False)
        work.model.train()  # its hooks keep quiet in eval mode; Qwen2 has no dropout
        try:
            for batch in batches(work, token_budget):
                score(wrapped, batch.ids, batch.labels).backward()  # type: ignore[no-untyped-call]
                for name, parameter in chosen.items():
                    rows.put(batch.members, name, parameter.grad_sample)  # type: ignore[attr-defined]
                wrapped.zero_grad(set_to_none=True)
        finally:
            wrapped.to_standard_module()
            work.model.eval()
            for parameter in chosen.values():
                parameter.grad = None
    return rows.grams()


def backpack(work: Work, token_budget: int) -> Grams:
    """BackPACK's BatchGrad on the target modules, which alone are extended (it knows Linear, not the rest of Qwen2)."""
    from backpack import backpack as saving
    from backpack import extend
    from backpack.extensions import BatchGrad

    rows = Rows(work)
    modules = [work.model.get_submodule(path) for path in work.modules]
    for module in modules:
        if not hasattr(module, "_backpack_extend"):
            extend(module)
    with only_targets(work) as chosen, saving(BatchGrad()):
        for batch in batches(work, token_budget):
            score(work.model, batch.ids, batch.labels).backward()  # type: ignore[no-untyped-call]
            for name, parameter in chosen.items():
                rows.put(batch.members, name, parameter.grad_batch)  # type: ignore[attr-defined]
                del parameter.grad_batch  # type: ignore[attr-defined]
                parameter.grad = None
    return rows.grams()


def bergson(work: Work, token_budget: int) -> Grams:
    """Its TraceCollector, without projection or normaliser; gradients stay in memory."""
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.gradients import GradientProcessor

    rows = Rows(work)
    with only_targets(work) as chosen:
        collector = TraceCollector(
            model=work.model,
            target_modules=set(work.modules),
            processor=GradientProcessor(projection_dim=None, include_bias=True),
            device="cpu",
            dtype=torch.float32,
        )
        for batch in batches(work, token_budget):
            with collector.with_batch(None):
                score(work.model, batch.ids, batch.labels).backward()  # type: ignore[no-untyped-call]
            for path in work.modules:
                (found,) = collector.mod_grads.pop(path)
                module = work.model.get_submodule(path)
                cube = found.view(len(batch.members), module.out_features, -1)
                split = module.in_features
                rows.put_module(
                    batch.members, path, cube[..., :split], cube[..., split] if module.bias is not None else None
                )
            for parameter in chosen.values():
                parameter.grad = None
        with contextlib.suppress(AttributeError):
            collector.teardown()
    return rows.grams()


REFERENCE = "autograd.grad"
BOUND = 256 << 20
BOUNDED = Rival(name="gradvar in 256 MiB", run=ours_bounded, what="`measure_scores` with that memory budget")
RIVALS = {
    rival.name: rival
    for rival in (
        Rival(name="gradvar", run=ours, what="`measure_scores` as it comes; log-probs, entropy and collision too"),
        Rival(
            name="gradvar bfloat16",
            run=ours_bfloat16,
            what='the same under `torch.autocast("cpu", torch.bfloat16)`, timed once',
            tolerance=0.05,
            once=True,
        ),
        Rival(
            name="full backward",
            run=full_backward,
            what="(a) one response at a time, every parameter takes a gradient",
        ),
        Rival(
            name="autograd.grad",
            run=autograd_loop,
            what="(b) one response at a time, the targets alone take gradients: no graph below the lowest",
        ),
        Rival(
            name="opacus",
            run=opacus,
            package="opacus",
            what="(c) GradSampleModule (hooks), the targets alone unfrozen, batches",
            token_budget=512,
        ),
        Rival(
            name="backpack",
            run=backpack,
            package="backpack",
            what="(d) BatchGrad, the target modules alone extended and unfrozen, batches",
            token_budget=512,
        ),
        Rival(
            name="bergson",
            run=bergson,
            package="bergson",
            what="(e) TraceCollector without projection, the targets alone unfrozen, batches",
            token_budget=512,
        ),
        Rival(
            name="func.vmap",
            run=func_vmap,
            what="(f) vmap(grad) over functional_call, the targets as arguments, batches",
            token_budget=512,
        ),
    )
}
