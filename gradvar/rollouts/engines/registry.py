"""The sampling engines by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from gradvar.errors import GradvarError
from gradvar.rollouts.engines.requests import (
    OnProgress,
    OnPrompt,
    SamplingEngine,
    SamplingRequest,
    SamplingSettings,
)

ENGINES = {
    "transformers": "gradvar.rollouts.engines.transformers_engine",
    "vllm": "gradvar.rollouts.engines.vllm_engine",
}
"""Engine name to the module whose `sample_requests` it is; loaded when used."""


def check_engine(name: str) -> None:
    """Raises GradvarError for an engine that does not exist or is not installed."""
    if name not in ENGINES:
        raise GradvarError(f"--engine: expected one of {', '.join(ENGINES)}, received {name!r}")
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise GradvarError("--engine vllm: vLLM is not installed; pip install gradvar[vllm], or --engine transformers")


def default_engine() -> str:
    """Returns "vllm" where it is installed and a CUDA device is there, else "transformers"."""
    if importlib.util.find_spec("vllm") is None:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def sample(
    engine_name: str,
    settings: SamplingSettings,
    requests: Sequence[SamplingRequest],
    *,
    on_prompt: OnPrompt,
    on_progress: OnProgress | None = None,
) -> None:
    """Samples every request with an engine, from the policy's own distribution at the temperature asked for.

    No top-k, top-p, min-p, penalty, forced or forbidden token acts, whatever the model's generation_config says.

    Args:
        engine_name: A name of `ENGINES`.
        settings: How to sample.
        requests: The prompts with count and seed. The transformers engine takes them one after the other, and a
            request's rollouts depend on itself, the settings and the machine alone; vLLM takes all at once.
        on_prompt: Called with a request and its rollouts, in id order, as soon as the last of them is finished.
        on_progress: Called with the number of responses finished since its last call.

    Raises:
        GradvarError: Unknown or missing engine, a model that cannot be loaded, memory that does not suffice, or an
            engine process that died.
    """
    check_engine(engine_name)
    if not requests:
        return
    module = importlib.import_module(ENGINES[engine_name])
    engine: SamplingEngine = module.sample_requests
    engine(settings, requests, on_prompt, on_progress or (lambda finished: None))
