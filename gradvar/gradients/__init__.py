"""Responses to score Grams: targets, capture, log-probabilities, Gram, checks. Importing this loads torch."""

from gradvar.gradients.check import PrecisionCheck, PrecisionRow, check_precision, float32_reference
from gradvar.gradients.plan import Block, Plan
from gradvar.gradients.scores import ScoreMeasurement, measure_scores, score_grams
from gradvar.gradients.specs import PRESETS, resolve_targets
from gradvar.gradients.targets import Target, list_targets

__all__ = [
    # what can be measured
    "PRESETS",
    # how the work is split
    "Block",
    "Plan",
    # checking
    "PrecisionCheck",
    "PrecisionRow",
    # measuring
    "ScoreMeasurement",
    "Target",
    "check_precision",
    "float32_reference",
    "list_targets",
    "measure_scores",
    "resolve_targets",
    "score_grams",
]
