"""What the planner says a pass keeps, against a recount; every row measured once."""

import math

import pytest
import torch

from gradvar.gradients.plan import least_bytes, split_work
from gradvar.gradients.targets import Target

LENGTHS = (150, 90, 120, 60, 30, 140)
SHAPES = {
    "q": (48, 48), "k": (16, 48), "v": (16, 48), "o": (48, 48),
    "gate": (128, 48), "up": (128, 48), "down": (48, 128),
}  # fmt: skip
SHARED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}


def make_targets(layers):
    return [
        Target(
            key=f"{layer}.{kind}", module=f"{layer}.{kind}", rows=None, in_features=columns, out_features=rows,
            has_bias=False, kind=kind, layer=layer,
        )
        for layer in range(layers)
        for kind, (rows, columns) in SHAPES.items()
    ]  # fmt: skip


def recount(blocks, lengths, width=4, host=False):
    """Bytes of float32 factors or matrices and float64 bias sums; each input that factors need, once.

    On the host the outputs' side of each response is a multiple of 8 tokens long.
    """
    inputs, total = {}, 0
    for block in blocks:
        rows, target = block.stop - block.start, block.target
        total += len(lengths) * rows * 8
        if block.keep == "matrices":
            total += len(lengths) * rows * target.in_features * width
        else:
            total += sum(math.ceil(n / 8) * 8 if host else n for n in lengths) * rows * width
            inputs[target.layer, SHARED.get(target.kind, target.kind)] = sum(lengths) * target.in_features * width
    return total + sum(inputs.values())


@pytest.mark.parametrize("lengths", [LENGTHS, [length // 6 for length in LENGTHS], [8] * 40])
@pytest.mark.parametrize("times", [1, 1.5, 2.2, 4, 9, 30, 200])
def test_a_pass_keeps_no_more_than_its_room(lengths, times):
    """Also where a matrix's first rows are kept as gradients and the next as factors, which need the input."""
    targets = make_targets(3)
    room = int(times * least_bytes(targets, lengths, torch.float32))
    passes = split_work(targets, lengths, torch.float32, room)
    done = {target.key: [] for target in targets}
    for blocks in passes:
        assert recount(blocks, lengths) == sum(block.bytes for block in blocks) <= room
        for block in blocks:
            done[block.target.key].append((block.start, block.stop))
    for target in targets:
        spans = sorted(done[target.key])
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == target.out_features
