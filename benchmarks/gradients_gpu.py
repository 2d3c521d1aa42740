"""Score Grams of a 7B model on one GPU: seconds, memory, share of a matrix product's rate, where the time goes.

    python -m benchmarks.gradients_gpu

Qwen2.5-7B's shape with random weights made on the device in bfloat16, 128 responses of 2000 tokens, last-layer QKV and
layer-14 QKV + MLP in one pass. A card with less than 75 GB free gets a smaller shape and says so. Nothing is
downloaded.
`--mixed` takes responses of many lengths (lognormal, the longest as long) and packs them one after another into rows.
`--memory 80` is the most that the model and the measurement may take of the card, in GB; more makes larger batches.
`--device cpu --tiny` runs the same code on a model of a few thousand parameters. Writes benchmarks/gradients_gpu.md, or
gradients_gpu_mixed.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gradients.shapes import MODELS
from gradvar.attention import VARLEN, choose_attention
from gradvar.errors import GradvarError
from gradvar.gradients import ScoreMeasurement, measure_scores, resolve_targets
from gradvar.gradients import passes as engine
from gradvar.gradients.fit import default_budget
from gradvar.gradients.gram import GradientStore
from gradvar.gradients.logprobs import Head
from gradvar.gradients.targets import decoder_layers

PARTS = ("forward below the lowest target", "forward above", "head", "backward", "Grams", "the rest")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and the responses."""

    name: str
    model: dict[str, int]
    targets: tuple[str, ...]
    responses: int
    length: int
    """Tokens of each; of the longest where they are mixed."""
    prompt: int
    needs: int
    """GB free on the card."""
    mixed: bool = False
    """Responses of many lengths, packed."""

    def lengths(self) -> list[int]:
        """Return the responses' lengths in tokens."""
        if not self.mixed:
            return [self.length] * self.responses
        drawn = np.random.default_rng(1).lognormal(np.log(self.length / 5), 0.8, self.responses)
        lengths = [int(np.clip(each, 2, self.length)) for each in drawn]
        return [self.length, *lengths[1:]]


QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_HALF_B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
SHAPES = (
    Shape(
        name="Qwen2.5-7B's shape",
        model=QWEN_7B,
        targets=("last:qkv", "14:qkv,mlp"),
        responses=128,
        length=2000,
        prompt=100,
        needs=75,
    ),
    Shape(
        name="Qwen2.5-7B's shape, fewer responses",
        model=QWEN_7B,
        targets=("last:qkv", "14:qkv,mlp"),
        responses=16,
        length=1000,
        prompt=100,
        needs=22,
    ),
    Shape(
        name="Qwen2.5-0.5B's shape",
        model=QWEN_HALF_B,
        targets=("last:qkv", "12:qkv,mlp"),
        responses=32,
        length=500,
        prompt=100,
        needs=0,
    ),
)
TINY = Shape(
    name="a tiny shape",
    model=MODELS["tiny"],
    targets=("last:qkv", "1:qkv,mlp"),
    responses=6,
    length=20,
    prompt=5,
    needs=0,
)


class Stopwatch:
    """Time by part, from marks on the device's own clock: each mark ends the part before it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Begin a part."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def totals(self) -> dict[str, float]:
        """Return the seconds of each part, from the first mark to the last."""
        if self._cuda:
            torch.cuda.synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            found[part] += start.elapsed_time(stop) / 1000 if self._cuda else stop - start
        return found


@contextmanager
def marked(model: nn.Module, lowest: int, watch: Stopwatch) -> Iterator[None]:
    """Let the engine's steps mark the stopwatch."""
    rest = "the rest"
    layer = decoder_layers(model)[lowest][1]
    base = model.base_model
    if not isinstance(base, nn.Module):
        raise TypeError("expected a transformers model")
    hooks = [
        base.register_forward_pre_hook(lambda *_: watch.mark("forward below the lowest target")),
        layer.register_forward_pre_hook(lambda *_: watch.mark("forward above")),
        base.register_forward_hook(lambda *_: watch.mark(rest)),
    ]

    def wrapped(own: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            watch.mark(part)
            found = own(*args, **kwargs)
            watch.mark(rest)
            return found

        return call

    changed: list[tuple[Any, str, str]] = [
        (Head, "token_scores", "head"),
        (engine, "_backward", "backward"),
        (GradientStore, "gram", "Grams"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    try:
        for owner, name, part in changed:
            setattr(owner, name, wrapped(getattr(owner, name), part))
        watch.mark(rest)
        yield
        watch.mark(rest)
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)
        for hook in hooks:
            hook.remove()


def choose_shape(device: torch.device, tiny: bool, most: float) -> Shape:
    """Return the largest shape that the card holds, or that `most` GB of it do."""
    if tiny:
        return TINY
    if device.type != "cuda":
        return SHAPES[-1]
    memory = torch.cuda.mem_get_info(device)[0] / 1e9  # others may use the card too
    return next(shape for shape in SHAPES if min(memory, most) >= shape.needs)


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model with random weights, made on the device, with the attention that `gradvar measure` chooses."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**shape.model, max_position_embeddings=32768, use_cache=False)
    wish = VARLEN if shape.mixed else "auto"
    attention = choose_attention(wish, config, str(device), str(dtype).removeprefix("torch."))
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 1.0) -> float:
    """Return FLOP/s of a square matrix product, the median of ten stretches."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def stretch(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    stretch(3)
    count = max(1, int(seconds / 10 / max(stretch(3) / 3, 1e-9)))
    return float(2 * size**3 * count / np.median([stretch(count) for _ in range(10)]))


def flop(model: nn.Module, shape: Shape, lowest: int, entries: int) -> float:
    """Return the arithmetic of one pass over `entries` target weights.

    Projections and attention forward, truncated backward, head twice, gradients and Grams; the prompt each time.
    """
    width, layers = shape.model["hidden_size"], shape.model["num_hidden_layers"]
    lengths = [shape.prompt + length - 1 for length in shape.lengths()]
    tokens = sum(lengths)
    one = decoder_layers(model)[0][1]
    matrices = sum(p.numel() for p in one.parameters() if p.ndim == 2)
    attention = sum(2 * width * length**2 for length in lengths)  # causal: half of 4 T D a token
    forward = layers * (2 * tokens * matrices + attention)
    backward = (layers - lowest) * (2 * tokens * matrices + 2.5 * attention)
    head = 2 * 2 * sum(shape.lengths()) * shape.model["vocab_size"] * width
    return forward + backward + head + 2 * tokens * entries + 2 * shape.responses**2 * entries


def measure(model: nn.Module, shape: Shape, watch: Stopwatch, lowest: int, budget: int | None) -> ScoreMeasurement:
    """Run the measurement once with the stopwatch, in `budget` bytes beside the model."""
    rng = np.random.default_rng(0)
    vocabulary = shape.model["vocab_size"]
    prompt = rng.integers(0, vocabulary, shape.prompt).tolist()
    responses = [rng.integers(0, vocabulary, length).tolist() for length in shape.lengths()]
    with marked(model, lowest, watch):
        return measure_scores(
            model, prompt, responses, list(shape.targets), packing=shape.mixed or None, memory_budget=budget
        )


def report(shape: Shape, parts: dict[str, float], *, total: float, peak: float, rate: float, work: float) -> list[str]:
    """Return the page's tables."""
    lines = [
        "| | |",
        "|---|---:|",
        f"| seconds | {total:.2f} |",
        f"| peak memory, the model's too | {peak:.1f} GB |",
        f"| arithmetic | {work / 1e15:.3g} PFLOP |",
        f"| rate | {work / total / 1e12:.3g} TFLOP/s |",
        f"| a matrix product's rate in this run | {rate / 1e12:.3g} TFLOP/s |",
        f"| share of it | {work / total / rate:.0%} |",
        f"| limit at that rate | {work / rate:.2f} s |",
        "",
        "| where the time goes | s | share |",
        "|---|---:|---:|",
    ]
    return lines + [f"| {part} | {parts[part]:.2f} | {parts[part] / sum(parts.values()):.0%} |" for part in PARTS]


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradients_gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (cuda)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--mixed", action="store_true", help="responses of many lengths, packed into rows")
    parser.add_argument("--memory", type=float, default=80, help="GB of the card, the model's too (80)")
    parser.add_argument("--out", type=Path, help="the page (beside this script)")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"argument --device: expected cuda, cuda:1 or cpu, received {options.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here: run this on a machine with one, or try --device cpu --tiny", file=sys.stderr)
        return 2
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # the stopwatch marks the current device's stream
    chosen = choose_shape(device, options.tiny, options.memory)
    shape = replace(chosen, mixed=options.mixed)
    page = options.out or Path(__file__).with_name(f"gradients_gpu{'_mixed' * options.mixed}.md")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if chosen is not SHAPES[0] and not options.tiny:
        print(f"too little memory for {SHAPES[0].name} in full: {shape.name}, {shape.responses} responses")
    model = build(shape, device, dtype)
    targets = resolve_targets(model, list(shape.targets))
    lowest = min(target.layer for target in targets if target.layer is not None)
    entries = sum(target.out_features * target.in_features for target in targets)
    budget = None
    if device.type == "cuda":
        room = 1e9 * options.memory - torch.cuda.memory_allocated(device)
        budget = max(1, min(int(room), default_budget(model)))
    first = shape if options.tiny else replace(shape, responses=2)
    try:
        measure(model, first, Stopwatch(device), lowest, budget)  # kernels are chosen at a first run
    except GradvarError as error:
        print(f"error: --memory {options.memory:g}: {error}", file=sys.stderr)
        return 2
    rate = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    watch = Stopwatch(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    found = measure(model, shape, watch, lowest, budget)
    parts = watch.totals()
    total = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
    asked = [f"--device {options.device}"] * (options.device != "cuda")
    asked += ["--tiny"] * options.tiny + ["--mixed"] * options.mixed
    asked += [f"--memory {options.memory:g}"] * (options.memory != parser.get_default("memory"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    lines = [
        f"# Score Grams on {name}",
        "",
        f"Made by `{' '.join(['python -m benchmarks.gradients_gpu', *asked])}` on "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}: torch {torch.__version__}, {os.cpu_count()} cores. "
        f"{shape.name}, random weights, {str(dtype).removeprefix('torch.')}, {shape.responses} responses of "
        f"{'up to ' * shape.mixed}{shape.length} tokens "
        f"({sum(shape.lengths())} in all) behind a prompt of {shape.prompt}, "
        f"{' and '.join(shape.targets)} in "
        f"{len(found.plan.passes)} pass{'es' * (len(found.plan.passes) > 1)} of batches of {found.plan.token_budget} "
        f"tokens at most, attention {found.attention}.",
        "",
        *report(shape, parts, total=total, peak=peak, rate=rate, work=flop(model, shape, lowest, entries)),
        "",
    ]
    page.write_text("\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
