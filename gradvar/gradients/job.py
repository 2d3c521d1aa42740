"""One checked request on a model that is held ready: what the passes, the probes and the planner share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gradvar.gradients.batches import Batch, Probe, make_batches
from gradvar.gradients.logprobs import Head
from gradvar.gradients.plan import Block, Plan
from gradvar.gradients.resident import Resident
from gradvar.gradients.reweighted import Reweightings
from gradvar.gradients.states import Autocast
from gradvar.gradients.targets import Target

TokenValues = list[NDArray[np.float64]]


@dataclass(kw_only=True, eq=False)
class TokenColumns:
    """Per-token results as they come in, by response."""

    logprobs: list[NDArray[np.float64] | None]
    entropy: list[NDArray[np.float64] | None]
    collision: list[NDArray[np.float64] | None]

    def copy(self) -> TokenColumns:
        """Return columns of their own with the same values."""
        return TokenColumns(logprobs=list(self.logprobs), entropy=list(self.entropy), collision=list(self.collision))


@dataclass(kw_only=True, eq=False)
class Job:
    """One checked request on a model held ready."""

    model: nn.Module
    targets: list[Target]
    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[int]]
    ids: tuple[int, ...]
    temperature: float
    head: Head
    autocast: Autocast
    device: torch.device
    """Where token ids go."""
    padding_side: str
    packed: bool
    dtype: torch.dtype
    tied: str | None
    """Path of the input embedding where it shares the chosen head's weight."""
    tied_scale: float
    """Its output is this times the weight's rows."""
    tokens: TokenColumns
    report: Callable[[int], None]
    extra: Reweightings
    """Other weights on the same tokens: `run_pass` adds the squared norms of their scores. None unless set."""
    plan: Plan
    probe: Probe | None = None
    """A short batch, where padding changes nothing."""
    resident: Resident = field(default_factory=lambda: Resident(None, 0))
    """Gives freed host memory back where the budget asks for it."""
    done: int = field(default=0)
    changed_in_batches: bool = False
    """Whether a batch was seen to change what a response of this model gives, so that each goes alone."""
    unheld: dict[str, str] = field(default_factory=dict)
    """By target key, why its gradient was not held against autograd's own."""

    def dtype_of(self, target: Target) -> torch.dtype:
        """Return the dtype of a target's weights; those of one model may differ."""
        parameters = self.model.get_submodule(target.module).parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), self.dtype)

    @property
    def factor_dtype(self) -> torch.dtype:
        """The widest dtype that the targets' factors come in: peft keeps adapters in float32 beside bfloat16."""
        modules = (self.model.get_submodule(target.module) for target in self.targets)
        kinds = [p.dtype for module in modules for p in module.parameters(recurse=False) if p.is_floating_point()]
        return max([self.dtype, *kinds], key=lambda kind: kind.itemsize)

    @property
    def lengths(self) -> list[int]:
        """Tokens fed for each response, the prompt's included."""
        return [len(self.prompt) + len(response) - 1 for response in self.responses]

    def batches(self, token_budget: int) -> list[Batch]:
        """Return the batches of a pass."""
        return make_batches(self.prompt, self.responses, token_budget, self.device, self.padding_side, self.packed)

    def tapped_paths(self, blocks: Sequence[Block] | None = None) -> tuple[str, ...]:
        """Return the modules whose factors the blocks (None: all targets) need, a tied input embedding among them."""
        targets = self.targets if blocks is None else [block.target for block in blocks]
        paths = {target.module for target in targets if target.kind != "head" and target.direct is None}
        if self.tied is not None and any(target.kind == "head" for target in targets):
            paths.add(self.tied)
        return tuple(sorted(paths))

    def direct_parameters(self, blocks: Sequence[Block] | None = None) -> dict[str, nn.Parameter]:
        """Return, by full name, the parameters whose gradients the blocks (None: all targets) take from autograd."""
        found = {}
        for target in self.targets if blocks is None else [block.target for block in blocks]:
            if target.direct is not None:
                for name in (target.direct.weight, target.direct.bias):
                    if name is not None:
                        found[f"{target.module}.{name}"] = self.model.get_parameter(f"{target.module}.{name}")
        return found
