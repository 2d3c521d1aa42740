"""What can be measured in a model, found in the model itself.

A target is the weight matrix (and bias) of one Linear or Conv1D module, or a contiguous block of its rows; in a mixture
of experts also a router's matrix or a fused expert tensor, of which one expert is a block of rows. Roles come from
where a module sits (attention or MLP of a decoder layer) and from its own name; which models exist is not known here.
Row blocks of fused matrices come from a probe of the model (`fused.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from gradvar.errors import GradvarError
from gradvar.gradients.devices import input_device, is_offloaded
from gradvar.gradients.experts import Direct, find_direct, is_one_expert
from gradvar.gradients.fused import Blocks, split_gate_up, split_qkv
from gradvar.gradients.states import Autocast

QKV_KINDS = ("q", "k", "v", "qkv", "kv")
MLP_KINDS = ("gate", "up", "gate_up", "down", "mlp")
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
_BESIDE = re.compile(r"indexer|encoder_?attn|cross_?att.*|inter_attention")
"""Inside attention but not its projections: what picks keys without a gradient, and what reads another sequence."""
_LORA = re.compile(r"\.(?:lora_[AB]|modules_to_save)\.([^.]+)$")


NO_MATRIX = "not a Linear or Conv1D"
_NO_VALUES = "has weights on the meta device (no values)"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One weight matrix, or a contiguous block of its rows, whose score gradient is measured."""

    key: str
    """Full module path, with `:q` and the like for rows of a fused matrix, `:3` for one expert of a fused tensor."""
    module: str
    """Full path of the Linear or Conv1D module, or of the one that holds a router's or the experts' weights."""
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
    direct: Direct | None = None
    """Where the gradient is autograd's own, each response alone: experts, and routers that are no Linear."""

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


def is_adapter(path: str) -> bool:
    """Return whether the path is that of a matrix peft trains: a low-rank adapter's own, or a copy of a whole one."""
    return _LORA.search(path) is not None


def _acts(model: nn.Module, path: str) -> bool:
    """Return whether an adapter's matrix takes part: its adapter is active, not switched off and not merged."""
    found = _LORA.search(path)
    if found is None:
        return False
    holder = model.get_submodule(path[: found.start()])
    if getattr(holder, "disable_adapters", False) is True or getattr(holder, "merged", False) is True:
        return False
    active = getattr(holder, "active_adapters", None)
    return active is None or found.group(1) in active


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
        return f"is a {type(module).__name__}, {NO_MATRIX}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "has a weight that is computed from other parameters (a parametrisation)"
    if why := _quantised(weight, module):
        return why
    if weight.ndim != 2:
        return f"has a weight of {weight.ndim} dimensions, not 2"
    return _NO_VALUES if weight.is_meta and not is_offloaded(module) else None


def _quantised(weight: torch.Tensor, module: nn.Module) -> str | None:
    if type(weight.data) is not torch.Tensor:  # torchao's say that they are float32
        return f"has quantised or sharded weights ({type(weight.data).__name__}, {type(module).__name__})"
    if weight.is_floating_point() and weight.element_size() > 1:
        return None
    return f"has quantised weights ({str(weight.dtype).removeprefix('torch.')}, {type(module).__name__})"


def _is_packed(module: nn.Module) -> bool:
    """Return whether the module is a library's own Linear over quantised weights."""
    return not is_linear(module) and "quant" in str(type(module)) and "Linear" in str(type(module))


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
        packed = next((path for path, module in model.named_modules() if _is_packed(module)), None)
        if packed is not None:
            raise GradvarError(
                f"{packed} has quantised weights ({type(model.get_submodule(packed)).__name__}) and no plain Linear is "
                "left: expected the model in bfloat16, float16 or float32"
            )
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
    if any(_BESIDE.fullmatch(h) for h in holders):
        return "other"
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
    bias = "bias" if getattr(module, "bias", None) is not None else None
    # PhiMoE's router is a Linear that gives the experts chosen, not its product
    alone = is_one_expert(path) or (kind == "router" and type(module).forward is not nn.Linear.forward)
    return Target(
        key=path,
        module=path,
        rows=None,
        in_features=n_in,
        out_features=n_out,
        has_bias=bias is not None,
        kind=kind,
        layer=layer,
        direct=Direct(weight="weight", bias=bias, transposed=False, experts=1) if alone else None,
    )


def _content(layer: nn.Module) -> Iterator[object]:
    """Yield what tells a layer from another of its class: its modules, their sizes and settings, not their number."""
    for path, module in layer.named_modules():
        yield path, type(module), *((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and not re.search("layer|training", name):
                yield name, value
            elif isinstance(value, PreTrainedConfig):
                yield name, id(value)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits, None where the model names none."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


class TargetCatalogue:
    """Everything measurable in one model: whole matrices and the row blocks of fused ones.

    Whole matrices are listed by `whole`; `parts` gives the row blocks of a fused matrix whose layout a probe of the
    model showed to be contiguous. The probes run when first needed, one for all layers of a class.
    """

    def __init__(self, model: nn.Module, *, shapes_only: bool = False) -> None:
        """List the model's matrices.

        Args:
            model: A causal language model.
            shapes_only: Take a model on the meta device, whose fused matrices cannot be probed: each then stands for
                itself and for every block it may have.
        """
        self.model = model
        self.shapes_only = shapes_only
        self.layers = decoder_layers(model)
        self.whole: dict[str, Target] = {}
        self.refused: dict[str, str] = {}
        self._splits: dict[tuple[object, ...], Blocks] = {}
        number = {path: i for i, (path, _) in enumerate(self.layers)}
        head = output_embeddings(model)
        for path, module in model.named_modules():
            index = next((i for outer, i in number.items() if path.startswith(f"{outer}.")), None)
            if not is_linear(module):
                self._add_direct(path, module, index)
                continue
            why = refusal(path, module)
            if why is not None and not (shapes_only and why == _NO_VALUES):
                self.refused[path] = why
                continue
            kind = "head" if module is head else self._kind(path, index)
            self.whole[path] = _whole(path, module, kind, index)
        self.adapters = {path for path in self.whole if _acts(model, path)}  # those that act

    def kind(self, path: str) -> str:
        """Return the role of a module, measured or refused, by where it sits."""
        number = next((i for i, (outer, _) in enumerate(self.layers) if path.startswith(f"{outer}.")), None)
        return self._kind(path, number)

    def _kind(self, path: str, index: int | None) -> str:
        if index is None:
            return "other"
        outer, layer = self.layers[index]
        return _kind(layer, path[len(outer) + 1 :])

    def _add_direct(self, path: str, module: nn.Module, index: int | None) -> None:
        """List what a module other than a Linear holds: an expert tensor or router, or else what is refused."""
        if _is_packed(module):
            self.refused[path] = f"has quantised weights ({type(module).__name__})"
            return
        own = dict(module.named_parameters(recurse=False))
        found = {direct.weight: direct for direct in find_direct(path, module)} if index is not None else {}
        for name, weight in own.items():
            key = path if name == "weight" else f"{path}.{name}"
            why = _quantised(weight, module) or (_NO_VALUES if weight.is_meta and not self.shapes_only else None)
            if name in found and why is None:
                direct = found[name]
                rows, columns = direct.shape(module)
                self.whole[key] = Target(
                    key=key,
                    module=path,
                    rows=None,
                    in_features=columns,
                    out_features=rows,
                    has_bias=direct.bias is not None,
                    kind=self._kind(key, index),
                    layer=index,
                    direct=direct,
                )
            elif name in found:
                self.refused[key] = why or ""
            elif name == "weight" and not any(True for _ in module.children()):
                self.refused[key] = refusal(path, module) or ""

    def by_preset(self) -> list[Target]:
        """Return the whole matrices that presets choose from.

        An adapted policy trains its active adapters alone; its frozen matrices, and other adapters, are had by a glob.
        """
        if self.adapters:
            return [self.whole[path] for path in self.whole if path in self.adapters]
        return [target for path, target in self.whole.items() if not is_adapter(path)]

    def experts(self, target: Target) -> list[Target]:
        """Return one target for each expert of a fused tensor, none for any other target."""
        if target.direct is None or target.direct.experts == 1:
            return []
        height = target.out_features // target.direct.experts
        return [
            replace(target, key=f"{target.key}:{i}", rows=(i * height, (i + 1) * height), out_features=height)
            for i in range(target.direct.experts)
        ]

    def parts(self, target: Target) -> list[Target]:
        """Return the row blocks of a fused target, or the target itself where it is not fused or not contiguous."""
        if target.kind not in ("qkv", "gate_up") or target.layer is None or target.direct is not None:
            return [target]
        if self.shapes_only:
            names = ("q", "k", "v") if target.kind == "qkv" else ("gate", "up")
            return [target, *[replace(target, key=f"{target.key}:{name}", kind=name) for name in names]]
        path, layer = self.layers[target.layer]
        inside = target.module[len(path) + 1 :]
        memo = (inside, *_content(layer))
        if memo not in self._splits:
            # its roundings would hide which rows matter to which
            with Autocast.current(input_device(self.model)).off():
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
            name = target.key
            if target.layer is not None:
                outer = self.layers[target.layer][0]
                name = f"{outer.rpartition('.')[0]}.*{name[len(outer) :]}"
            seen.setdefault(name)
        names = list(seen)
        return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def list_targets(model: nn.Module) -> list[Target]:
    """Return everything in the model that can be measured: whole matrices, each fused one followed by its row blocks.

    Single experts of a fused tensor, `KEY:0` and so on, can be measured too and are not listed: there may be thousands.

    Args:
        model: A transformers causal language model.

    Raises:
        GradvarError: The model has no decoder layers.
    """
    return list(TargetCatalogue(model).everything())
