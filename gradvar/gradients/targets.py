"""What can be measured in a model, found in the model itself, and the short names users ask for it by.

A target is the weight matrix (and bias) of one Linear or Conv1D module, or a contiguous block of its rows. Roles come
from where a module sits (attention or MLP of a decoder layer) and from its own name; which models exist is not known
here. Row blocks of fused matrices come from a probe of the model (`fused.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradvar.errors import GradvarError
from gradvar.gradients.fused import split_gate_up, split_qkv

QKV_KINDS = ("q", "k", "v", "qkv", "kv")
MLP_KINDS = ("gate", "up", "gate_up", "down", "mlp")
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

_ATTENTION_NAMES = (
    ("qkv", r".*qkv.*|query_key_value|c_attn|att_proj|in_proj|fused_attn"),
    ("kv", r"kv_.*|.*_kv|kv"),
    ("q", r"q|q_.*|.*_q|wq|query|q\d?proj|to_q"),
    ("k", r"k|k_proj|k_lin|wk|key|to_k|linear_k"),
    ("v", r"v|v_proj|v_lin|wv|value|to_v|linear_v"),
    ("o", r"o|o_.*|out|out_.*|c_proj|dense|wo|proj|attn_out|output|to_out|linear_out"),
)
_MLP_NAMES = (
    ("gate_up", r"gate_up_proj|gate_and_up_proj|gate_up|w13|input_linear|wi_fused"),
    ("router", r"gate|router|shared_expert_gate|wg"),
    ("gate", r"gate_proj|w1|wi_0|linear_fc1_gate|v1_gate"),
    ("up", r"up_proj|w3|wi_1|fc1|c_fc|dense_h_to_4h|fc_in|linear_1|lin1|wi|dense_in"),
    ("down", r"down_proj|w2|fc2|c_proj|dense_4h_to_h|fc_out|wo|linear_2|lin2|output_linear|dense_out"),
)
_LORA = re.compile(r"\.(lora_[AB])\.[^.]+$")
_LAYER_SELECTOR = re.compile(r"(?:(?:last|first|middle|all|\d+(?:-\d+)?)(?:,(?!$)|$))+")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One weight matrix, or a contiguous block of its rows, whose score gradient is measured."""

    key: str
    """Full module path, with `:q` and the like for rows of a fused matrix."""
    module: str
    """Full path of the Linear or Conv1D module."""
    rows: tuple[int, int] | None
    """Output rows [start, stop) of the module that belong to the target; None means all."""
    in_features: int
    out_features: int
    """Output rows of the target (of the block, where `rows` is set)."""
    has_bias: bool
    kind: str
    """q, k, v, qkv, kv, o, attn (other Linear in attention), gate, up, gate_up, down, mlp, router, head or other."""
    layer: int | None
    """Index of the decoder layer; None outside them."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the target."""
        return (self.out_features, self.in_features)

    def parameter_count(self, include_bias: bool = True) -> int:
        """Return the number of parameters the target's gradient has."""
        return self.out_features * (self.in_features + int(include_bias and self.has_bias))


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is a Linear or a Conv1D (GPT-2's, weight transposed)."""
    return isinstance(module, (nn.Linear, Conv1D))


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a Linear or Conv1D."""
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def refusal(path: str, module: nn.Module) -> str | None:
    """Return why a module cannot be measured, or None where it can."""
    if not is_linear(module):
        return f"is a {type(module).__name__}, not a Linear or Conv1D"
    weight = module._parameters.get("weight")
    if weight is None:
        return "has a weight that is computed from other parameters (a parametrisation)"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"has quantised weights ({str(weight.dtype).removeprefix('torch.')}, {type(module).__name__})"
    if weight.ndim != 2:
        return f"has a weight of {weight.ndim} dimensions, not 2"
    if weight.is_meta:
        return "has weights on the meta device (no values)"
    if re.search(r"(^|\.)experts(\.|$)", path):
        return "is an expert that sees only the tokens routed to it"
    return None


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the paths and modules of the decoder layers, lowest first.

    The outermost ModuleList whose blocks hold the most parameters in Linear and Conv1D modules.

    Raises:
        GradvarError: The model has no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    accepted: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in accepted):
            continue
        size = sum(m.weight.numel() for m in module.modules() if is_linear(m) and isinstance(m.weight, torch.Tensor))
        if size == 0:
            continue
        accepted.append(path)
        if best is None or size > best[0]:
            best = (size, path, module)
    if best is None:
        raise GradvarError(
            f"no decoder layers found in {type(model).__name__}: expected a ModuleList of blocks with Linear or Conv1D "
            "modules; choose the modules by a glob over their names"
        )
    return [(f"{best[1]}.{i}", block) for i, block in enumerate(best[2])]


def _matches(table: Sequence[tuple[str, str]], name: str, default: str) -> str:
    return next((kind for kind, pattern in table if re.fullmatch(pattern, name)), default)


def _kind(layer: nn.Module, inside: str) -> str:
    """Return the role of the module at the path `inside` a decoder layer."""
    inside = _LORA.sub("", f".{inside}")[1:].removesuffix(".base_layer")
    parts = inside.split(".")
    classes = [type(layer.get_submodule(".".join(parts[: i + 1]))).__name__.lower() for i in range(len(parts) - 1)]
    holders = [*(p.lower() for p in parts[:-1]), *classes]
    if any("attn" in h or "attention" in h for h in holders):
        if parts[-2:] == ["output", "dense"]:
            return "o"
        return _matches(_ATTENTION_NAMES, parts[-1], "attn")
    if any(word in h for h in holders for word in ("mlp", "ffn", "feed_forward", "feedforward", "moe", "expert")):
        return _matches(_MLP_NAMES, parts[-1], "mlp")
    if len(parts) == 1:  # OPT keeps fc1 and fc2 in the layer itself
        return _matches(_MLP_NAMES, parts[-1], "other")
    if parts[-2:] in (["intermediate", "dense"], ["output", "dense"]):
        return "up" if parts[-2] == "intermediate" else "down"
    return "other"


def _whole(path: str, module: nn.Module, kind: str, layer: int | None) -> Target:
    n_in, n_out = features(module)
    return Target(
        key=path,
        module=path,
        rows=None,
        in_features=n_in,
        out_features=n_out,
        has_bias=getattr(module, "bias", None) is not None,
        kind=kind,
        layer=layer,
    )


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits, None where the model names none."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


class TargetCatalogue:
    """Everything measurable in one model: whole matrices and the row blocks of fused ones.

    Whole matrices are listed by `whole`; `parts` gives the row blocks of a fused matrix whose layout a probe of the
    model showed to be contiguous. The probes run when first needed, one for all layers of a class.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.whole: dict[str, Target] = {}
        self.refused: dict[str, str] = {}
        self._splits: dict[tuple[object, ...], tuple[tuple[str, int, int], ...]] = {}
        number = {path: i for i, (path, _) in enumerate(self.layers)}
        head = output_embeddings(model)
        for path, module in model.named_modules():
            if any(True for _ in module.children()) or "weight" not in dict(module.named_parameters(recurse=False)):
                self._refuse_expert_tensors(path, module)
                if not is_linear(module):
                    continue
            index = next((i for outer, i in number.items() if path.startswith(f"{outer}.")), None)
            why = refusal(path, module)
            if why is not None:
                self.refused[path] = why
                continue
            if module is head:
                kind = "head"
            elif index is None:
                kind = "other"
            else:
                outer, layer = self.layers[index]
                kind = _kind(layer, path[len(outer) + 1 :])
            self.whole[path] = _whole(path, module, kind, index)
        self.has_adapters = any(_LORA.search(path) for path in self.whole)

    def _refuse_expert_tensors(self, path: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and "expert" in f"{path}.{name}".lower():
                self.refused[f"{path}.{name}"] = "is a fused expert tensor"

    def parts(self, target: Target) -> list[Target]:
        """Return the row blocks of a fused target, or the target itself where it is not fused or not contiguous."""
        if target.kind not in ("qkv", "gate_up") or target.layer is None:
            return [target]
        path, layer = self.layers[target.layer]
        inside = target.module[len(path) + 1 :]
        memo = (type(layer), inside, target.shape)
        if memo not in self._splits:
            if target.kind == "qkv":
                self._splits[memo] = split_qkv(self.model, layer, layer.get_submodule(inside))
            else:
                parent, _, leaf = inside.rpartition(".")
                mlp = layer.get_submodule(parent)
                self._splits[memo] = split_gate_up(mlp, mlp.get_submodule(leaf), target.in_features)
        blocks = self._splits[memo]
        if not blocks:
            return [target]
        return [
            Target(
                key=f"{target.key}:{name}",
                module=target.module,
                rows=(start, stop),
                in_features=target.in_features,
                out_features=stop - start,
                has_bias=target.has_bias,
                kind=name,
                layer=target.layer,
            )
            for name, start, stop in blocks
        ]

    def everything(self) -> Iterator[Target]:
        """Yield every whole target, each fused one followed by its row blocks."""
        for target in self.whole.values():
            yield target
            blocks = self.parts(target)
            if len(blocks) > 1:
                yield from blocks

    def describe(self, limit: int = 12) -> str:
        """Return a short list of what can be measured, the layers folded into `*`."""
        seen: dict[str, None] = {}
        for target in self.whole.values():
            name = target.module
            if target.layer is not None:
                outer = self.layers[target.layer][0]
                name = f"{outer.rpartition('.')[0]}.*{name[len(outer) :]}"
            seen.setdefault(name)
        names = list(seen)
        return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def list_targets(model: nn.Module) -> list[Target]:
    """Return everything in the model that can be measured: whole matrices, then the row blocks of fused ones.

    Args:
        model: A transformers causal language model.

    Raises:
        GradvarError: The model has no decoder layers.
    """
    return list(TargetCatalogue(model).everything())


def resolve_targets(model: nn.Module, specs: str | Sequence[str]) -> list[Target]:
    """Return the targets that the specs name, without repeats, in the model's order.

    A spec is `LAYERS:KINDS`, with LAYERS among `last`, `first`, `middle`, `all`, a number, a range `0-3` or several
    joined by commas, and KINDS among qkv, attn (qkv and output), mlp, all, q, k, v, o, gate, up, down, router, joined
    by commas; or a glob over module paths (`*.o_proj`, `lm_head`) or over row blocks (`*.c_attn:q`).

    Raises:
        GradvarError: A spec matches nothing, or names something that cannot be measured.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    if not specs:
        raise GradvarError("no targets were given: expected for example last:qkv")
    catalogue = TargetCatalogue(model)
    chosen: dict[str, Target] = {}
    for spec in specs:
        for target in _resolve_one(catalogue, spec.strip()):
            chosen.setdefault(target.key, target)
    order = {path: i for i, path in enumerate(catalogue.whole)}
    return sorted(chosen.values(), key=lambda t: (order[t.module], t.rows or (-1, -1)))


def _resolve_one(catalogue: TargetCatalogue, spec: str) -> list[Target]:
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
    if set(MLP_KINDS) & set(wanted):
        _refuse_experts(catalogue, spec, layers)
    found = []
    for target in catalogue.whole.values():
        if target.layer in layers:
            # a fused matrix is cut up before its kind is asked for, so that `v` finds the rows of a c_attn
            if catalogue.has_adapters and not _LORA.search(target.module):
                continue  # an adapted policy trains its adapters alone; its frozen matrices are had by a glob
            parts = catalogue.parts(target)
            found += [part for part in parts if part.kind in wanted]
    if not found:
        kinds_here = sorted({p.kind for t in catalogue.whole.values() if t.layer in layers for p in catalogue.parts(t)})
        refused = [f"{p} {why}" for p, why in catalogue.refused.items() if _layer_of(catalogue, p) in layers]
        raise GradvarError(
            f"target {spec!r} matches nothing: "
            + (f"these layers have {', '.join(kinds_here)}" if kinds_here else "these layers have no measurable matrix")
            + (f"; {'; '.join(refused[:3])}" if refused else "")
            + f"; measurable: {catalogue.describe()}"
        )
    return found


def _layer_of(catalogue: TargetCatalogue, path: str) -> int | None:
    return next((i for i, (outer, _) in enumerate(catalogue.layers) if path.startswith(f"{outer}.")), None)


def _refuse_experts(catalogue: TargetCatalogue, spec: str, layers: list[int]) -> None:
    """Refuse an MLP preset where the layer's MLP is a mixture of experts: it would leave most weights out unsaid."""
    for path, why in catalogue.refused.items():
        if _layer_of(catalogue, path) in layers and "expert" in why:
            raise GradvarError(
                f"target {spec!r}: {path} {why} and is not measured; choose attention, or single matrices by a glob: "
                f"{catalogue.describe()}"
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
        candidates = [
            part for t in catalogue.whole.values() if fnmatchcase(t.module, stem) for part in catalogue.parts(t)
        ]
    else:
        candidates = list(catalogue.whole.values())
    found = [t for t in candidates if fnmatchcase(t.key, spec)]
    if found:
        return found
    for path, why in catalogue.refused.items():
        if fnmatchcase(path, spec):
            raise GradvarError(
                f"target {spec!r}: {path} {why} and cannot be measured; measurable: {catalogue.describe()}"
            )
    if blocks and candidates:
        raise GradvarError(
            f"target {spec!r} matches nothing: the rows of {candidates[0].module} that can be measured alone are "
            f"{', '.join(t.key.rpartition(':')[2] for t in candidates if t.rows) or 'none (not contiguous)'}"
        )
    near = difflib.get_close_matches(spec, list(catalogue.whole), n=3, cutoff=0.5)
    raise GradvarError(
        f"target {spec!r} matches nothing: "
        + (f"nearest are {', '.join(near)}" if near else f"measurable: {catalogue.describe()}")
        + "; expected LAYERS:KINDS such as last:qkv, or a glob over module names"
    )
