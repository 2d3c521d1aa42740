"""What a model offers to be measured, alike layers folded together: from its modules' shapes alone, weights or none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients.specs import PRESETS, find_targets
from gradvar.gradients.targets import NO_MATRIX, Target, TargetCatalogue


@dataclass(frozen=True, kw_only=True)
class TargetGroup:
    """The same matrix in one or many layers."""

    pattern: str
    """The keys' common form, layer and expert numbers as `*`; a glob that finds them all."""
    kind: str
    layers: tuple[int, ...]
    """Layers that have it; empty outside the layers."""
    targets: tuple[Target, ...]

    @property
    def first(self) -> Target:
        """One of them; all have its shape and bias."""
        return self.targets[0]

    @property
    def parameters(self) -> int:
        """Parameters of all of them, biases included."""
        return sum(target.parameter_count() for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class TargetListing:
    """What can be measured in a model, what each preset picks, and what cannot."""

    layers: int
    """Decoder layers."""
    groups: tuple[TargetGroup, ...]
    presets: dict[str, tuple[str, ...]]
    """By preset name, the patterns it picks over all layers; empty where it matches nothing."""
    refused_presets: dict[str, str]
    """By preset name, why it is refused on this model."""
    refused: dict[str, str]
    """By pattern, why it cannot be measured."""
    others: dict[str, int]
    """By class, how many modules with weights are no matrix product: norms, embeddings."""
    quantised: str | None
    """Method by which the model's weights are quantised, None where they are not."""
    adapters: bool
    """Whether the model carries low-rank adapters, which the presets then pick alone."""

    @property
    def targets(self) -> list[Target]:
        """Every target by itself."""
        return [target for group in self.groups for target in group.targets]


def survey_targets(model: nn.Module, specs: Sequence[str] = ()) -> TargetListing:
    """Return what can be measured in a model, on the meta device or not.

    Args:
        model: A causal language model; nothing of it is run.
        specs: Only the targets that these name; none means all.

    Raises:
        GradvarError: The model has no decoder layers, or a spec matches nothing.
    """
    catalogue = TargetCatalogue(model, shapes_only=True)
    chosen = list(catalogue.whole.values())
    if specs:
        named = {target.module: None for spec in specs for target in find_targets(catalogue, spec.strip())}
        chosen = [target for target in chosen if target.module in named]
    presets: dict[str, tuple[str, ...]] = {}
    refused_presets: dict[str, str] = {}
    for name in PRESETS:
        try:
            found = find_targets(catalogue, f"all:{name}")
            presets[name] = tuple(dict.fromkeys(_pattern(catalogue, t.key.partition(":")[0], t.layer) for t in found))
        except GradvarError as error:
            if "matches nothing" not in str(error):
                refused_presets[name] = str(error)
    refused, others = _refused(catalogue)
    return TargetListing(
        layers=len(catalogue.layers),
        groups=_groups(catalogue, chosen),
        presets=presets,
        refused_presets=refused_presets,
        refused=refused,
        others=others,
        quantised=_quantisation(model),
        adapters=bool(catalogue.adapters),
    )


def _groups(catalogue: TargetCatalogue, targets: Sequence[Target]) -> tuple[TargetGroup, ...]:
    alike: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        pattern = _pattern(catalogue, target.key, target.layer)
        alike.setdefault((pattern, target.kind, target.shape, target.has_bias), []).append(target)
    return tuple(
        TargetGroup(
            pattern=str(pattern),
            kind=str(kind),
            layers=tuple(dict.fromkeys(t.layer for t in found if t.layer is not None)),
            targets=tuple(found),
        )
        for (pattern, kind, *_), found in alike.items()
    )


def _refused(catalogue: TargetCatalogue) -> tuple[dict[str, str], dict[str, int]]:
    refused: dict[str, str] = {}
    others: dict[str, int] = {}
    layer_of = {path: i for i, (path, _) in enumerate(catalogue.layers)}
    for path, why in catalogue.refused.items():
        if why.endswith(NO_MATRIX):
            name = why.removeprefix("is a ").partition(",")[0]
            others[name] = others.get(name, 0) + 1
        else:
            layer = next((i for outer, i in layer_of.items() if path.startswith(f"{outer}.")), None)
            refused.setdefault(_pattern(catalogue, path, layer), why)
    return refused, others


def _pattern(catalogue: TargetCatalogue, path: str, layer: int | None) -> str:
    if layer is not None:
        outer = catalogue.layers[layer][0]
        path = f"{outer.rpartition('.')[0]}.*{path[len(outer) :]}"
    return re.sub(r"\.experts\.\d+(?=\.)", ".experts.*", path)


def _quantisation(model: nn.Module) -> str | None:
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return None
    found = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(found, "value", found) or "an unknown method")
