"""What `gradvar targets` prints: alike layers in one row, what presets pick, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import console
from .plans import print_line

if TYPE_CHECKING:
    from gradvar.gradients import Target, TargetListing

_FUSED = {"qkv": ":q, :k, :v", "gate_up": ":gate, :up"}
"""Row blocks that may be asked for alone where the layout turns out to be contiguous."""
_SETS = ("qkv", "attn", "mlp", "all")
"""Presets of several kinds."""


def show_targets(listing: TargetListing, *, every: bool, as_json: bool) -> None:
    """Show the groups of targets or every key, then presets and refusals."""
    if as_json:
        console.print_json(_document(listing))
        return
    if every:
        rows = [[t.key, _layers((t.layer,) if t.layer is not None else ()), *_cells(t)] for t in listing.targets]
        _print("Targets", "target", "layer", rows)
    else:
        _print(
            f"What can be measured: {listing.layers} layers",
            "target",
            "layers",
            [
                [group.pattern, _layers(group.layers), *_cells(group.first, len(group.targets))]
                for group in listing.groups
            ],
        )
    _print_presets(listing)
    for pattern, why in listing.refused.items():
        print_line(f"cannot be measured: {pattern} {why}")
    if listing.others:
        words = ", ".join(f"{count} {name}" for name, count in listing.others.items())
        print_line(f"no matrix products, not measured: {words}")
    if listing.quantised:
        print_line(
            f"its weights are quantised ({listing.quantised}): whatever is quantised is refused by name when the model "
            "is loaded; give a checkpoint in bfloat16 or float32"
        )
    if listing.adapters:
        print_line("the model carries low-rank adapters: presets pick these alone, its own matrices are had by a glob")


def _cells(target: Target, count: int = 1) -> list[str]:
    times = f"{count} x " if count > 1 else ""
    experts = f", {target.direct.experts} experts" if target.direct and target.direct.experts > 1 else ""
    return [
        target.kind,
        f"{target.out_features} x {target.in_features}{experts}",
        "yes" if target.has_bias else "no",
        f"{times}{_count(target.parameter_count())}",
        "" if target.direct else _FUSED.get(target.kind, ""),
    ]


def _print(title: str, key: str, layers: str, rows: Sequence[list[str]]) -> None:
    fused = any(row[-1] for row in rows)
    names = [key, layers, "kind", "rows x columns", "bias", "parameters", "row blocks"]
    shown = [list(row) if fused else list(row[:-1]) for row in rows]
    console.table(
        title,
        names if fused else names[:-1],
        shown,
        caption="Row blocks can be asked for alone (KEY:q) where a probe of the weights finds them contiguous."
        if fused
        else "",
    )


def _print_presets(listing: TargetListing) -> None:
    sets = {name: patterns for name, patterns in listing.presets.items() if name in _SETS}
    for name, patterns in sets.items():
        print_line(f"{name:<4} picks {', '.join(pattern.rpartition('*.')[2] for pattern in patterns)}")
    single = [name for name in listing.presets if name not in _SETS]
    print_line(f"ask by layer, as last:qkv, middle:mlp, 0-3:attn, all:all; single kinds: {', '.join(single)}")
    for name, why in listing.refused_presets.items():
        print_line(f"refused: {name}: {why.partition(': ')[2]}")


def _layers(numbers: Sequence[int]) -> str:
    """Return layer numbers as ranges: 0-3, 7."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _count(parameters: int) -> str:
    if parameters >= 10**6:
        return f"{parameters / 10**6:.3g} M"
    return f"{parameters / 10**3:.3g} k" if parameters >= 10**4 else str(parameters)


def _document(listing: TargetListing) -> dict[str, Any]:
    return {
        "layers": listing.layers,
        "targets": [
            {
                "key": target.key,
                "layer": target.layer,
                "kind": target.kind,
                "rows": target.out_features,
                "columns": target.in_features,
                "parameters": target.parameter_count(),
                "bias": target.has_bias,
                "experts": target.direct.experts if target.direct else 1,
            }
            for target in listing.targets
        ],
        "presets": listing.presets,
        "refused_presets": listing.refused_presets,
        "cannot_be_measured": listing.refused,
        "not_matrices": listing.others,
        "quantised": listing.quantised,
        "adapters": listing.adapters,
    }
