"""The run directory: records, settings, reading and writing, provenance. Loads no torch."""

from gradvar.runs.config import EstimateConfig, MeasureConfig, RewardConfig, SampleConfig
from gradvar.runs.files import rollouts_digest
from gradvar.runs.measures import Measures, PrefixNorms, TauEstimate
from gradvar.runs.records import (
    TABLE_COLUMNS,
    Estimate,
    Prompt,
    PromptScores,
    Rollout,
    ScoreGram,
    TableRow,
    estimate_table,
    target_label,
)
from gradvar.runs.run import SUM, Run, create_run, open_run
from gradvar.runs.sketches import CrossGrams, GradientSketch

__all__ = [
    # the directory
    "SUM",
    "Run",
    "create_run",
    "open_run",
    "rollouts_digest",
    # settings
    "EstimateConfig",
    "MeasureConfig",
    "RewardConfig",
    "SampleConfig",
    # records
    "TABLE_COLUMNS",
    "CrossGrams",
    "Estimate",
    "GradientSketch",
    "Measures",
    "PrefixNorms",
    "Prompt",
    "PromptScores",
    "Rollout",
    "ScoreGram",
    "TableRow",
    "TauEstimate",
    "estimate_table",
    "target_label",
]
