"""Responses to score Grams: targets, capture, log-probabilities, Gram, checks. Importing this loads torch."""

from gradvar.gradients.plan import Block, Plan
from gradvar.gradients.scores import ScoreMeasurement, measure_scores, score_grams
from gradvar.gradients.targets import PRESETS, Target, list_targets, resolve_targets

__all__ = [
    # measuring
    "ScoreMeasurement",
    "measure_scores",
    "score_grams",
    # what can be measured
    "PRESETS",
    "Target",
    "list_targets",
    "resolve_targets",
    # how the work is split
    "Block",
    "Plan",
]
