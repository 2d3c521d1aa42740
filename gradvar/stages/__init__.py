"""One function a stage: read the run, call one room, write that stage's files.

A stage loads what it needs on first use: those that estimate load neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradvar.stages.agreement import disagreement, sampler_agreements
    from gradvar.stages.audit import audit
    from gradvar.stages.check import check
    from gradvar.stages.compare import Comparison, compare
    from gradvar.stages.estimate import advice, alpha, cv, fit
    from gradvar.stages.figures import draw_figures
    from gradvar.stages.listener import Listener, Silent
    from gradvar.stages.measure import measure
    from gradvar.stages.plan import MeasurementPlan, PlannedPrompt, plan_measure
    from gradvar.stages.report import report
    from gradvar.stages.reward import reward
    from gradvar.stages.sample import Preparation, import_rollouts, prepare, sample
    from gradvar.stages.targets import targets
    from gradvar.stages.whole import demo, run_all

__all__ = [
    "Comparison",
    "Listener",
    "MeasurementPlan",
    "PlannedPrompt",
    "Preparation",
    "Silent",
    "advice",
    "alpha",
    "audit",
    "check",
    "compare",
    "cv",
    "demo",
    "disagreement",
    "draw_figures",
    "fit",
    "import_rollouts",
    "measure",
    "plan_measure",
    "prepare",
    "report",
    "reward",
    "run_all",
    "sample",
    "sampler_agreements",
    "targets",
]

_HOMES = {
    "Comparison": "gradvar.stages.compare",
    "Listener": "gradvar.stages.listener",
    "MeasurementPlan": "gradvar.stages.plan",
    "PlannedPrompt": "gradvar.stages.plan",
    "Preparation": "gradvar.stages.sample",
    "Silent": "gradvar.stages.listener",
    "advice": "gradvar.stages.estimate",
    "alpha": "gradvar.stages.estimate",
    "audit": "gradvar.stages.audit",
    "check": "gradvar.stages.check",
    "compare": "gradvar.stages.compare",
    "cv": "gradvar.stages.estimate",
    "demo": "gradvar.stages.whole",
    "disagreement": "gradvar.stages.agreement",
    "draw_figures": "gradvar.stages.figures",
    "fit": "gradvar.stages.estimate",
    "import_rollouts": "gradvar.stages.sample",
    "measure": "gradvar.stages.measure",
    "plan_measure": "gradvar.stages.plan",
    "prepare": "gradvar.stages.sample",
    "report": "gradvar.stages.report",
    "reward": "gradvar.stages.reward",
    "run_all": "gradvar.stages.whole",
    "sample": "gradvar.stages.sample",
    "sampler_agreements": "gradvar.stages.agreement",
    "targets": "gradvar.stages.targets",
}


class _Stages(ModuleType):
    """Keeps a stage's name for its function: importing the file of that name would put the file in its place."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'gradvar.stages' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Stages
