"""Which sketch of a gradient errs least at equal size: python -m benchmarks.sketches [RUN] > benchmarks/sketches.csv.

Score gradients of 16 responses of the bundled policy to each of 4 prompts, over a square and a wide matrix. Every
sketch is applied to the same gradients with 8 seeds; the error of an inner product is the root mean square over pairs
of responses to different prompts of (estimate - exact) / (||G_i|| ||G_j||), `expected` what theory says for count. CPU
seconds are for the 64 responses, the gradient's rows taken as given, as they are for the exact Gram.
    count       gradvar's: R = 8 sets of signs on one hash
    two-sided   P G Q with random signs, p = q = sqrt(d): LoGra and bergson without their learnt parts
    one set     count with R = 1
RUN is a run of the bundled policy, by default demo-run. Half a minute on one core.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradvar.demo import policy_path
from gradvar.gradients import sketch as sketching
from gradvar.gradients.gram import GradientStore
from gradvar.gradients.passes import run_pass
from gradvar.gradients.prepare import prepared
from gradvar.gradients.sketch import Sketch, SketchPlan
from gradvar.models import find_model, load_model
from gradvar.runs import open_run

TARGETS = ("3:q", "2:down")
PROMPTS, RESPONSES, SEEDS = 4, 16, 8
DIMENSIONS = (256, 1024, 4096, 16384)

Array = NDArray[np.float64]
Gradients = dict[str, list[Tensor]]


def gradients(run_path: str) -> Gradients:
    """Return (N, O, I) gradients by target, one tensor for each prompt."""
    run = open_run(run_path)
    model = load_model(find_model(str(policy_path()), None), dtype="float32", device="cpu")
    found: Gradients = {}
    for prompt in run.prompts()[:PROMPTS]:
        responses = [list(r.token_ids) for r in run.rollouts(prompt.prompt_id)[:RESPONSES]]
        with prepared(model, list(prompt.token_ids), responses, list(TARGETS)) as job:
            for blocks in job.plan.passes:
                for block, store in run_pass(job, blocks):
                    found.setdefault(block.target.key, []).append(_whole(store))
    return found


def _whole(store: GradientStore) -> Tensor:
    out = torch.empty((store.responses, store.rows, store.columns), dtype=store.dtype)
    for i in range(store.responses):
        store.fill(i, 0, store.rows, out[i])
    return out


def count(rows: Tensor, dimension: int, seed: int) -> Array:
    """Return gradvar's sketch (N, d)."""
    made = Sketch(SketchPlan(dimension=dimension, seed=seed), "benchmark", tuple(rows.shape[1:]), rows.shape[0])  # type: ignore[arg-type]
    made.add_rows(0, rows.flatten(1))
    return made.values().astype(np.float64)


def one_set(rows: Tensor, dimension: int, seed: int) -> Array:
    """Return a count sketch with one set of signs on d buckets."""
    before, sketching.REPEATS = sketching.REPEATS, 1
    try:
        return count(rows, dimension, seed)
    finally:
        sketching.REPEATS = before


def two_sided(rows: Tensor, dimension: int, seed: int) -> Array:
    """Return P G Q (N, p q) with random signs, p and q as equal as powers of two are."""
    generator = torch.Generator().manual_seed(seed)
    p = 1 << (int(math.log2(dimension)) // 2)
    q = dimension // p
    left = (torch.randint(0, 2, (p, rows.shape[1]), generator=generator) * 2 - 1).float() / math.sqrt(p)
    right = (torch.randint(0, 2, (rows.shape[2], q), generator=generator) * 2 - 1).float() / math.sqrt(q)
    return (left @ rows @ right).flatten(1).double().numpy()


SKETCHES: dict[str, Callable[[Tensor, int, int], Array]] = {
    "count": count,
    "one set": one_set,
    "two-sided": two_sided,
}


def main(run_path: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["target", "rows", "columns", "sketch", "dimension", "rms_error", "largest", "expected", "cpu_s"])
    for target, by_prompt in gradients(run_path).items():
        rows = torch.cat(by_prompt)
        flat = rows.flatten(1).double().numpy()
        exact = flat @ flat.T
        norms = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
        label = np.repeat(np.arange(len(by_prompt)), [len(g) for g in by_prompt])
        between = (label[:, None] < label[None, :]) & (norms > 0)
        for dimension in DIMENSIONS:
            for name, make in SKETCHES.items():
                errors = []
                began = time.process_time()
                for seed in range(SEEDS):
                    values = make(rows, dimension, seed)
                    errors.append(((values @ values.T - exact)[between]) / norms[between])
                seconds = (time.process_time() - began) / SEEDS
                cosines = exact[between] / norms[between]
                table.writerow(
                    [
                        target,
                        rows.shape[1],
                        rows.shape[2],
                        name,
                        dimension,
                        f"{np.sqrt(np.mean(np.square(errors))):.5f}",
                        f"{np.abs(errors).max():.4f}",
                        f"{np.sqrt(np.mean(1 + cosines**2) / dimension):.5f}",
                        f"{seconds:.3f}",
                    ]
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path("demo-run")))
