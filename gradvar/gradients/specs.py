"""The short names users ask for targets by: `last:qkv`, `0-3:attn`, a glob; and what is said when nothing fits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients.targets import MLP_KINDS, NO_MATRIX, QKV_KINDS, Target, TargetCatalogue

PRESETS: dict[str, tuple[str, ...]] = {
    "qkv": QKV_KINDS,
    "attn": (*QKV_KINDS, "o", "attn"),
    "mlp": MLP_KINDS,
    "all": (*QKV_KINDS, "o", "attn", *MLP_KINDS, "router", "other"),
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "o": ("o",),
    "gate": ("gate",),
    "up": ("up",),
    "down": ("down",),
    "router": ("router",),
}
"""Kinds that each preset name selects inside a decoder layer."""

_LAYER_SELECTOR = re.compile(r"(?:(?:last|first|middle|all|\d+(?:-\d+)?)(?:,(?!$)|$))+")


def resolve_targets(model: nn.Module, specs: str | Sequence[str]) -> list[Target]:
    """Return the targets that the specs name, without repeats, in the model's order.

    A spec is `LAYERS:KINDS`, with LAYERS among `last`, `first`, `middle`, `all`, a number, a range `0-3` or several
    joined by commas, and KINDS among qkv, attn (qkv and output), mlp, all, q, k, v, o, gate, up, down, router, joined
    by commas; or a glob over module paths (`*.o_proj`, `lm_head`), over row blocks (`*.c_attn:q`) or over single
    experts of a fused tensor (`*.experts.down_proj:3`). In a mixture of experts, mlp is the experts and the shared
    expert; the router goes by its own name and with all. Where peft's adapters are active, presets choose their
    matrices (and the copies in modules_to_save) alone: what is trained.

    Raises:
        GradvarError: A spec matches nothing, or names something that cannot be measured.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    if not specs:
        raise GradvarError("no targets were given: expected for example last:qkv")
    catalogue = TargetCatalogue(model)
    chosen: dict[str, Target] = {}
    for spec in specs:
        for target in find_targets(catalogue, spec.strip()):
            chosen.setdefault(target.key, target)
    order = {path: i for i, path in enumerate(catalogue.whole)}
    return sorted(chosen.values(), key=lambda t: (order[t.key.partition(":")[0]], t.rows or (-1, -1)))


def check_targets(skeleton: nn.Module, specs: str | Sequence[str]) -> None:
    """Check specs against a model without weights (meta device), before long work; `resolve_targets` has the last word.

    Raises:
        GradvarError: A spec matches nothing, or names something that cannot be measured.
    """
    catalogue = TargetCatalogue(skeleton, shapes_only=True)
    for spec in [specs] if isinstance(specs, str) else specs:
        find_targets(catalogue, spec.strip())


def find_targets(catalogue: TargetCatalogue, spec: str) -> list[Target]:
    """Return the targets that one spec names in a catalogue.

    Raises:
        GradvarError: It matches nothing, or names something that cannot be measured.
    """
    spec = re.sub(r"\s*([:,])\s*", r"\1", spec)
    if not spec:
        raise GradvarError("a target is empty: expected for example last:qkv")
    selector, colon, kinds = spec.partition(":")
    if not colon and (spec in PRESETS or _LAYER_SELECTOR.fullmatch(spec)):
        # a bare preset means every layer, a bare layer everything in it
        selector, kinds = ("all", spec) if spec in PRESETS else (spec, "all")
    elif not (colon and _LAYER_SELECTOR.fullmatch(selector)):
        return _by_glob(catalogue, spec)
    wanted: list[str] = []
    for name in (k.strip() for k in kinds.split(",")):
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            raise GradvarError(
                f"target {spec!r}: {name!r} is not a kind of projection; expected {', '.join(PRESETS)}"
                + (f" (did you mean {near[0]}?)" if near else "")
            )
        wanted += PRESETS[name]
    layers = _layer_numbers(spec, selector, len(catalogue.layers))
    if not catalogue.adapters:  # a quantised model's adapters are measured
        inside = [path for path in catalogue.refused if _layer_of(catalogue, path) in layers]
        _refuse_part_quantised(catalogue, spec, [path for path in inside if catalogue.kind(path) in wanted])
    if set(MLP_KINDS) & set(wanted):
        _refuse_part_of_the_experts(catalogue, spec, wanted, layers)
    found = []
    for target in catalogue.by_preset():
        if target.layer in layers:
            # a fused matrix is cut up before its kind is asked for, so that `v` finds the rows of a c_attn
            parts = catalogue.parts(target)
            found += [part for part in parts if part.kind in wanted]
    if not found:
        kinds_here = sorted({p.kind for t in catalogue.by_preset() if t.layer in layers for p in catalogue.parts(t)})
        refused = [
            f"{path} {why}"
            for path, why in catalogue.refused.items()
            if _layer_of(catalogue, path) in layers and not why.endswith(NO_MATRIX)
        ]
        raise GradvarError(
            f"target {spec!r} matches nothing: "
            + (f"these layers have {', '.join(kinds_here)}" if kinds_here else "these layers have no measurable matrix")
            + (f"; {'; '.join(refused[:3])}" if refused else "")
            + f"; measurable: {catalogue.describe()}"
        )
    return found


def _layer_of(catalogue: TargetCatalogue, path: str) -> int | None:
    return next((i for i, (outer, _) in enumerate(catalogue.layers) if path.startswith(f"{outer}.")), None)


def _refuse_part_quantised(catalogue: TargetCatalogue, spec: str, paths: Sequence[str]) -> None:
    """Refuse a spec that names quantised matrices beside others, which alone would be measured unsaid."""
    left_out = [path for path in paths if "quantised" in catalogue.refused[path]]
    if left_out:
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise GradvarError(
            f"target {spec!r}: {left_out[0]} {catalogue.refused[left_out[0]]} and is not measured{more}; name the "
            "others alone, by their layers or by a glob"
        )


def _refuse_part_of_the_experts(
    catalogue: TargetCatalogue, spec: str, wanted: Sequence[str], layers: Sequence[int]
) -> None:
    """Refuse an MLP preset that would leave experts out unsaid: quantised ones, gate or up rows of a fused tensor."""
    for path, why in catalogue.refused.items():
        if "expert" in path.lower() and re.search("quantised|no values", why) and _layer_of(catalogue, path) in layers:
            raise GradvarError(
                f"target {spec!r}: {path} {why} and is not measured; choose attention, or single matrices by a glob: "
                f"{catalogue.describe()}"
            )
    halves = {"gate", "up"} & set(wanted)
    for target in catalogue.whole.values():
        if halves and "gate_up" not in wanted and target.direct and target.kind == "gate_up" and target.layer in layers:
            raise GradvarError(
                f"target {spec!r}: {target.key} holds the experts' gate and up rows in one: choose mlp, or the tensor "
                "by a glob"
            )


def _layer_numbers(spec: str, selector: str, count: int) -> list[int]:
    numbers: set[int] = set()
    for part in selector.split(","):
        if part == "all":
            numbers.update(range(count))
            continue
        names = {"first": 0, "middle": count // 2, "last": count - 1}
        low, _, high = part.partition("-")
        first = names[low] if low in names else int(low)
        last = int(high) if high else first
        if first > last or last >= count:
            raise GradvarError(f"target {spec!r}: the model has layers 0 to {count - 1}, received {part}")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def _by_glob(catalogue: TargetCatalogue, spec: str) -> list[Target]:
    blocks = ":" in spec
    if blocks:
        stem = spec.rpartition(":")[0]
        named = [t for t in catalogue.whole.values() if fnmatchcase(t.key, stem)]
        candidates = [part for t in named for part in (catalogue.experts(t) or catalogue.parts(t))]
    else:
        candidates = list(catalogue.whole.values())
    found = [t for t in candidates if fnmatchcase(t.key, spec)]
    if found:
        _refuse_part_quantised(catalogue, spec, [path for path in catalogue.refused if fnmatchcase(path, spec)])
        return found
    for path, why in catalogue.refused.items():
        if fnmatchcase(path, spec):
            raise GradvarError(
                f"target {spec!r}: {path} {why} and cannot be measured; measurable: {catalogue.describe()}"
            )
    if blocks and candidates:
        rows = _some([t.key.rpartition(":")[2] for t in candidates if t.rows])
        fused = named[0].kind in ("qkv", "gate_up")
        raise GradvarError(
            f"target {spec!r} matches nothing: "
            + (
                f"the rows of {named[0].key} that can be measured alone are {rows or 'none (not contiguous)'}"
                if rows or fused
                else f"{named[0].key} is one matrix and has no parts: name it as {stem}"
            )
        )
    lower = spec.lower()
    if lower != spec and _LAYER_SELECTOR.fullmatch(lower.partition(":")[0]):
        raise GradvarError(f"target {spec!r} matches nothing: did you mean {lower}?")
    near = difflib.get_close_matches(spec, list(catalogue.whole), n=3, cutoff=0.5)
    raise GradvarError(
        f"target {spec!r} matches nothing: "
        + (f"nearest are {', '.join(near)}" if near else f"measurable: {catalogue.describe()}")
        + "; expected LAYERS:KINDS such as last:qkv, or a glob over module names"
    )


def _some(names: Sequence[str]) -> str:
    """Return names joined by commas, the middle of a long list left out."""
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:3])} ... {names[-1]}"
