"""Responses to score Grams: targets, capture, log-probabilities, Gram, checks. Importing this loads torch."""

from gradvar.gradients.check import PrecisionCheck, PrecisionRow, check_precision, float32_reference
from gradvar.gradients.cross import cross_grams
from gradvar.gradients.finite import measure_finite
from gradvar.gradients.listing import TargetGroup, TargetListing, survey_targets
from gradvar.gradients.passes import NonFiniteError
from gradvar.gradients.plan import Block, Cost, Plan
from gradvar.gradients.prepare import plan_measurement
from gradvar.gradients.scores import ScoreMeasurement, measure_scores, score_grams
from gradvar.gradients.sketch import SketchPlan
from gradvar.gradients.specs import PRESETS, check_targets, resolve_targets
from gradvar.gradients.targets import Target, list_targets
from gradvar.runs.measures import PrefixNorms, TauEstimate

__all__ = [
    # measuring
    "NonFiniteError",
    "PrefixNorms",
    "ScoreMeasurement",
    "SketchPlan",
    "cross_grams",
    "TauEstimate",
    "measure_finite",
    "measure_scores",
    "score_grams",
    # what can be measured
    "PRESETS",
    "Target",
    "TargetGroup",
    "TargetListing",
    "check_targets",
    "list_targets",
    "resolve_targets",
    "survey_targets",
    # how the work is split
    "Block",
    "Cost",
    "Plan",
    "plan_measurement",
    # checking
    "PrecisionCheck",
    "PrecisionRow",
    "check_precision",
    "float32_reference",
]
