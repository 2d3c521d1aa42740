"""What one run may hold one value of: given settings against those the run was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradvar.errors import GradvarError
from gradvar.runs.config import CONFIGS, IDENTITY, Config, EstimateConfig, MeasureConfig, resolve
from gradvar.runs.records import Prompt
from gradvar.runs.run import Run


def agreed_config(run: Run, kind: type[Config], given: Mapping[str, Any]) -> Config:
    """Return the settings of one section: the run's own, overridden by what was given now.

    How estimates are made is given each time: an earlier command's margin or advantage is no later one's default.

    Args:
        run: The run, new or not.
        kind: The section's dataclass.
        given: Settings from the file and the command line; None means not given.

    Raises:
        GradvarError: A setting of the run's identity was given another value, or a value is out of range.
    """
    stored = {} if kind is EstimateConfig else run.stored(kind)
    section = next(name for name, each in CONFIGS.items() if each is kind)
    asked = {name: value for name, value in given.items() if not (value == "auto" and name in stored)}
    config = resolve(kind, stored, asked)
    made = {"sample": "rollouts", "measure": "grams"}.get(section)
    if made is None or not any((run.path / made).glob("[!.]*")):
        return config  # nothing was made yet that another value would contradict
    for name in IDENTITY.get(section, ()):
        if name in stored and getattr(config, name) != getattr(resolve(kind, stored), name):
            raise GradvarError(
                f"{run.path} was made with {name} = {stored[name]!r}, received {getattr(config, name)!r}: one run "
                f"holds one {name}; leave the option out, or choose a new run folder"
            )
    return config


def agree_on_model(run: Run, name: str, weights_hash: str) -> None:
    """Refuse another model's weights in a run.

    Raises:
        GradvarError: The weights differ from those the run was made with.
    """
    stored = run.info["model"].get("weights_sha256")
    if stored is not None and stored != weights_hash:
        raise GradvarError(
            f"{run.path} was made with model {run.info['model']['path']} (weights {stored[:12]}), received {name} "
            f"(weights {weights_hash[:12]}): one run holds one model; choose a new run folder"
        )


def measured_attention(run: Run) -> str | None:
    """Return the attention implementation that the run's Grams were measured with, None where there are none."""
    if not any((run.path / "grams").glob("[!.]*")):
        return None
    known = run.info["stages"].get("measure", {}).get("attention") or run.stored(MeasureConfig).get("attention")
    return str(known) if known not in (None, "auto", "unknown", "None") else None


def agreed_prompts(run: Run, asked: Sequence[Prompt]) -> list[Prompt]:
    """Return the run's prompts with new ones added at the end.

    Raises:
        GradvarError: A prompt of the same id has another text, other tokens or another gold answer.
    """
    if not (run.path / "prompts.parquet").exists():
        return list(asked)
    kept = run.prompts()
    by_id = {prompt.prompt_id: prompt for prompt in kept}
    for prompt in asked:
        old = by_id.get(prompt.prompt_id)
        if old is None:
            continue
        for field in ("text", "token_ids", "data_source", "ground_truth"):
            before, now = getattr(old, field), getattr(prompt, field)
            if before != now:
                raise GradvarError(
                    f"{run.path} holds prompt {prompt.prompt_id!r} with {field} {_short(before)}, received "
                    f"{_short(now)}: kept prompts may not change; choose a new run folder"
                )
    return [*kept, *[prompt for prompt in asked if prompt.prompt_id not in by_id]]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
