"""Sampling engines: `sample` with a name of `ENGINES`. Neither torch nor an engine is loaded until one samples."""

from gradvar.rollouts.engines.registry import ENGINES, check_engine, default_engine, sample
from gradvar.rollouts.engines.requests import (
    SamplingRequest,
    SamplingSettings,
    end_token_ids,
    make_rollout,
    prompt_seed,
)

__all__ = [
    "ENGINES",
    "SamplingRequest",
    "SamplingSettings",
    "check_engine",
    "default_engine",
    "end_token_ids",
    "make_rollout",
    "prompt_seed",
    "sample",
]
