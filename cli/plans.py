"""What `gradvar measure --dry-run` prints: how the work would be split, and what it would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradvar.runs.records import counted

from . import console

if TYPE_CHECKING:
    from gradvar.gradients import Block
    from gradvar.stages import MeasurementPlan, PlannedPrompt

_SHOWN_PROMPTS = 12
_SHOWN_BLOCKS = 24


def show_plan(plan: MeasurementPlan, *, as_json: bool) -> None:
    """Show batches, passes, bytes and FLOP of every prompt, what is kept of each target, and the totals."""
    if as_json:
        console.print_json(_document(plan))
        return
    if not plan.prompts:
        print_line(f"nothing is missing: {plan.complete} prompts hold every target, probe and prefix asked for")
        return
    _print_prompts(plan)
    _print_blocks(max(plan.prompts, key=lambda one: one.cost.peak_bytes))
    extra = [f"{plan.probes} probes" if plan.probes else "", f"{plan.prefixes} prefixes" if plan.prefixes else ""]
    print_line(
        f"in all: {counted(len(plan.prompts), 'prompt')}, "
        f"{sum(len(one.work.kept) for one in plan.prompts)} responses on "
        f"{len(plan.targets)} targets ({plan.dtype}, {plan.device}{''.join(f', {one}' for one in extra if one)}); "
        f"at most {size(plan.peak_bytes)} beside the model, {flop(plan.flop)}"
        + (f"; at most {size(plan.host_bytes)} in the host's memory" if plan.host_bytes else "")
        + (f"; {plan.complete} prompts are complete" if plan.complete else "")
    )
    print_line("Estimates from short probes of the model. Nothing was measured or written.")


def size(count: float) -> str:
    """Return bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def flop(count: float) -> str:
    """Return a number of multiplications and additions as people read it."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PFLOP"


def print_line(text: str) -> None:
    """Print one line of a result as it is."""
    console.result.print(text, markup=False, soft_wrap=True)


def _print_prompts(plan: MeasurementPlan) -> None:
    rows = []
    for one in plan.prompts[:_SHOWN_PROMPTS]:
        cost = one.cost
        rows.append(
            [
                one.work.prompt.prompt_id,
                str(len(one.work.kept)),
                str(cost.batches),
                str(cost.tokens),
                f"{_padded_share(one):.0%}",
                str(len(one.plan.passes)),
                one.plan.checkpointing,
                size(cost.kept_bytes),
                size(cost.activation_bytes + cost.logits_bytes),
                size(cost.peak_bytes),
                flop(cost.flop),
            ]
        )
    names = ["responses", "batches", "tokens", "padding", "passes", "checkpointing"]
    more = len(plan.prompts) - len(rows)
    console.table(
        "What measuring would take",
        ["prompt", *names, "gradients", "activations", "peak", "work"],
        rows,
        caption="Batches and tokens of one pass over the model; peak: held at one time, beside the model."
        + (f"\n{more} more prompts like these; --json has all." if more > 0 else ""),
    )


def _print_blocks(one: PlannedPrompt) -> None:
    rows = []
    for number, blocks in enumerate(one.plan.passes):
        for block in blocks:
            whole = block.stop - block.start == block.target.out_features
            kept = "input and output gradient" if block.keep == "factors" else block.keep
            shown = "all" if whole else f"{block.start}-{block.stop - 1}"
            rows.append([block.target.key, str(number + 1), shown, kept, block.home, size(block.bytes)])
    more = len(rows) - _SHOWN_BLOCKS
    console.table(
        f"What is kept of each target, prompt {one.work.prompt.prompt_id} (the largest)",
        ["target", "pass", "rows", "kept as", "in memory of", "bytes"],
        rows[:_SHOWN_BLOCKS],
        caption=f"{more} more; --json has all." if more > 0 else "",
    )


def _padded_share(one: PlannedPrompt) -> float:
    return 1 - one.cost.tokens / one.cost.padded_tokens


def _document(plan: MeasurementPlan) -> dict[str, Any]:
    prompts = [
        {
            "prompt_id": one.work.prompt.prompt_id,
            "responses": len(one.work.kept),
            "targets": one.work.targets,
            "missing": {kind: getattr(one.work, kind) for kind in ("grams", "taus", "prefixes", "sketches")},
            "checkpointing": one.plan.checkpointing,
            "token_budget": one.plan.token_budget,
            "padded_share": _padded_share(one),
            **vars(one.cost),
            "peak_bytes": one.cost.peak_bytes,
            "flop": one.cost.flop,
            "passes": [[_block(block) for block in blocks] for blocks in one.plan.passes],
        }
        for one in plan.prompts
    ]
    return {
        "dtype": plan.dtype,
        "device": plan.device,
        "targets": plan.targets,
        "probes": plan.probes,
        "prefixes": plan.prefixes,
        "complete_prompts": plan.complete,
        "peak_bytes": plan.peak_bytes,
        "host_bytes": plan.host_bytes,
        "flop": plan.flop,
        "prompts": prompts,
    }


def _block(block: Block) -> dict[str, Any]:
    rows = [block.start, block.stop]
    return {"target": block.target.key, "rows": rows, "keep": block.keep, "home": block.home, "bytes": block.bytes}
