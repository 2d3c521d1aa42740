"""gradvar: the variance of policy gradients against response length, and what every loss aggregator costs.

The public names load what they need on first use: `import gradvar` loads neither torch, transformers nor vllm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradvar.errors import GradvarError
    from gradvar.estimators import (
        VarianceLaw,
        advantages,
        aggregation_weights,
        aggregator_cv,
        deviations,
        fit_variance_law,
        within_length_variance,
    )
    from gradvar.gradients import score_grams
    from gradvar.losses import aggregate_loss
    from gradvar.runs import Estimate, Run, ScoreGram, open_run

__all__ = [
    # runs
    "Estimate",
    "GradvarError",
    "Run",
    "ScoreGram",
    "open_run",
    # gradients (loads torch)
    "score_grams",
    # estimators
    "VarianceLaw",
    "advantages",
    "aggregation_weights",
    "aggregator_cv",
    "deviations",
    "fit_variance_law",
    "within_length_variance",
    # losses (loads torch)
    "aggregate_loss",
]

_HOMES = {
    "Estimate": "gradvar.runs",
    "GradvarError": "gradvar.errors",
    "Run": "gradvar.runs",
    "ScoreGram": "gradvar.runs",
    "open_run": "gradvar.runs",
    "score_grams": "gradvar.gradients",
    "VarianceLaw": "gradvar.estimators",
    "advantages": "gradvar.estimators",
    "aggregation_weights": "gradvar.estimators",
    "aggregator_cv": "gradvar.estimators",
    "deviations": "gradvar.estimators",
    "fit_variance_law": "gradvar.estimators",
    "within_length_variance": "gradvar.estimators",
    "aggregate_loss": "gradvar.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradvar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
