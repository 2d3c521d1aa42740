"""Stage report: everything a run holds in one HTML file that explains itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradvar.estimators import advantages, deviations
from gradvar.figures import Drawing, NotDrawn
from gradvar.report import Material, PromptSample, Response, render_report
from gradvar.runs import PromptScores, Run, SampleConfig, storage, target_label
from gradvar.runs.config import CONFIGS, as_json
from gradvar.runs.records import counted
from gradvar.stages.agreement import disagreement, sampler_agreements
from gradvar.stages.estimate import advice
from gradvar.stages.figures import DRAWERS
from gradvar.stages.groups import left_out_line
from gradvar.stages.held import COMMANDS, Held
from gradvar.stages.law_drawings import atlas
from gradvar.stages.listener import Listener, Silent

SAMPLED = 8
"""Responses shown of each prompt."""
MOST_PROMPTS = 64
"""Prompts shown."""
_MAKING = ("sample", "reward", "measure")
_SEEDED = ("sample", "measure", "estimate")
_NOT_IN_REPORT = ("length_law_by_prompt",)


def report(run: Run, listener: Listener | None = None) -> Path:
    """Write RUN/report.html and return its path; a section whose data are missing says which command makes them.

    Args:
        run: A run with Grams.
        listener: Who is told.

    Raises:
        GradvarError: Nothing was measured yet.
    """
    listener = listener or Silent()
    held = Held(run)
    drawings: dict[str, Sequence[Drawing | NotDrawn]] = {}
    wanted = {name: drawer for name, drawer in DRAWERS.items() if name not in _NOT_IN_REPORT}
    with listener.task("report", len(wanted) + 2) as advance:
        for name, drawer in wanted.items():
            drawings[name] = drawer(held)
            advance(1)
        drawings["atlas"] = [one for one in atlas(held) if isinstance(one, Drawing)]
        material = _material(held, drawings)
        advance(1)
        path = run.path / "report.html"
        storage.write_bytes(path, render_report(material).encode("utf-8", errors="replace"))
        advance(1)
    run.log("report written")
    return path


def _material(held: Held, drawings: dict[str, Sequence[Drawing | NotDrawn]]) -> Material:
    run, law, cv = held.run, held.options("law"), held.options("cv")
    tables = {name: table for name in COMMANDS if (table := held.table(name)) is not None}
    agreements = sampler_agreements(run)
    groups = held.scores(held.last)
    return Material(
        name=run.path.resolve().name,
        path=str(run.path),
        tables=tables,
        missing={name: str(held.why_not(name)) for name in COMMANDS if name not in tables},
        drawings=drawings,
        target=held.last,
        advantage=law.advantage,
        cv_advantage=cv.advantage,
        group_size=cv.group_size,
        level=law.level,
        margin=law.margin,
        advice=advice(run),
        disagreement=disagreement(run),
        sampler=pd.DataFrame([{"prompt_id": name, **vars(one)} for name, one in agreements.items()]),
        samples=[_sample(held, group) for group in groups[:MOST_PROMPTS]],
        left_out=max(0, len(groups) - MOST_PROMPTS),
        facts=_facts(run),
        commands=_commands(run),
        config=json.dumps({**run.info["config"], **_estimates(run)}, indent=2, ensure_ascii=False),
        prompts=len(groups),
        responses=sum(len(group.lengths) for group in groups),
        notes=_notes(held, groups),
    )


def _sample(held: Held, scores: PromptScores) -> PromptSample:
    prompt = next(prompt for prompt in held.prompts if prompt.prompt_id == scores.prompt_id)
    rollouts = {rollout.rollout_id: rollout for rollout in held.rollouts[scores.prompt_id]}
    squares = deviations(scores.gram)
    weighted = np.full(len(squares), np.nan)
    known = ~np.isnan(scores.rewards)
    if known.sum() > 1:
        mine = scores.verified()
        factors = advantages(mine.rewards, held.options("law").advantage, lengths=mine.lengths)
        weighted[known] = deviations(mine.gram, factors)
    rewards = scores.rewards[known]
    return PromptSample(
        prompt_id=scores.prompt_id,
        text=prompt.text,
        n_tokens=len(prompt.token_ids),
        n_responses=len(squares),
        median_length=float(np.median(scores.lengths)),
        mean_reward=float(rewards.mean()) if rewards.size else float("nan"),
        responses=[
            Response(
                rollout_id=scores.rollout_ids[row],
                length=int(scores.lengths[row]),
                reward=float(scores.rewards[row]),
                deviation=float(squares[row]),
                weighted=float(weighted[row]),
                truncated=bool(scores.truncated[row]),
                text=rollouts[scores.rollout_ids[row]].text,
            )
            for row in _chosen(scores, squares)
        ],
    )


def _chosen(scores: PromptScores, squares: Any) -> list[int]:
    """Return which responses are shown: evenly by length, the largest deviation and a truncated one among them."""
    order = np.argsort(scores.lengths, kind="stable")
    wanted = {int(np.argmax(squares)), *np.flatnonzero(scores.truncated)[:1].tolist()}
    even = order[np.linspace(0, len(order) - 1, min(SAMPLED - len(wanted), len(order))).round().astype(int)]
    chosen = wanted | {int(row) for row in even}
    return [int(row) for row in order if int(row) in chosen]


def _notes(held: Held, groups: Sequence[PromptScores]) -> list[str]:
    unverified = sum(int(np.isnan(group.rewards).sum()) for group in groups)
    notes = []
    if unverified:
        notes.append(
            f"Unverified: {counted(unverified, 'response')}, kept for the score, left out where an advantage is used."
        )
    silent = [group.prompt_id for group in groups if len(set(group.rewards[~np.isnan(group.rewards)].tolist())) == 1]
    if silent:
        notes.append(f"Without gradient: {counted(len(silent), 'prompt')} with one reward for all responses.")
    truncated = sum(int(group.truncated.sum()) for group in groups)
    limit = held.run.config(SampleConfig).max_tokens
    notes.append(
        f"Cut at {limit} tokens: {counted(truncated, 'response')}; the law without them is among the reward classes."
    )
    waiting = len(held.run.prompt_ids) - len(groups)
    if waiting:
        notes.append(
            f"Not measured: {counted(waiting, 'prompt')} of the run; `gradvar measure {held.run.path}` takes them in."
        )
    if line := left_out_line(held.run):
        notes.append(line)
    return notes


def _facts(run: Run) -> list[tuple[str, str]]:
    info, sample = run.info, run.info["config"].get("sample", {})
    model = info["model"]
    facts = [
        ("model", f"{model.get('path')}" + (f", revision {model['revision']}" if model.get("revision") else "")),
        ("weights (sha256)", str(model.get("weights_sha256"))),
        ("problems", str(sample.get("prompts"))),
        (
            "sampling",
            f"{sample.get('engine')}, temperature {sample.get('temperature')}, "
            f"at most {sample.get('max_tokens')} tokens, {sample.get('dtype')} on {sample.get('device')}",
        ),
        ("targets", ", ".join(target_label(target) for target in run.targets)),
        (
            "seeds",
            ", ".join(
                f"{name} {run.options('fit').seed if name == 'estimate' else run.stored(kind).get('seed', 0)}"
                for name, kind in CONFIGS.items()
                if name != "reward"
            ),
        ),
        ("made", str(info.get("created"))),
    ]
    for name, stage in info["stages"].items():
        git = stage.get("git") or {}
        told = [f"{stage.get('status')}, {stage.get('started')} to {stage.get('finished', '–')}"]
        if stage.get("device"):
            told.append(f"on {stage['device']}")
        if git.get("commit"):
            told.append(f"commit {git['commit'][:12]}{' with changes' if git.get('dirty') else ''}")
        facts.append((f"stage {name}", ", ".join(told)))
    stages = list(info["stages"].values())
    if stages:
        packages = stages[-1].get("packages", {})
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in packages.items())))
        facts.append(("machine", " ".join(str(v) for v in stages[-1].get("host", {}).values())))
    return facts


def _estimates(run: Run) -> dict[str, Any]:
    """Return, by stage, the options its tables were made with."""
    made = {name: stage["options"] for name, stage in run.info["stages"].items() if "options" in stage}
    return {"estimates": made} if made else {}


def _commands(run: Run) -> list[str]:
    """Return the commands that make this run again, stage by stage."""
    path = shlex.quote(str(run.path))
    skipped = ("include_bias", "device", "dtype")
    made = {stage: _options(run.info["config"].get(stage, {}), CONFIGS[stage], skipped) for stage in _MAKING}
    lines = [f"gradvar {stage} {path}{words}" for stage, words in made.items()]
    lines += [
        f"gradvar {stage} {path}{_options(as_json(run.options(stage)), CONFIGS['estimate'], ())}"
        for stage in ("fit", "cv", "alpha", "audit")
    ]
    return [*lines, *(f"gradvar {stage} {path}" for stage in ("figures", "report"))]


def _options(stored: dict[str, Any], kind: type[Any], skipped: Sequence[str]) -> str:
    """Return a section's settings that differ from the defaults as options of the command line."""
    renamed = {"rules": "rule", "alphas": "alpha", "plan_rules": "plan_rule"}
    defaults = vars(kind())
    words = ""
    for name, value in stored.items():
        default = defaults.get(name)
        plain = list(default) if isinstance(default, tuple) else default
        if name in skipped or value == plain or value is None:
            continue
        option = f"--{renamed.get(name, name).replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += f" {option}" if one is True else f" {option} {shlex.quote(str(one))}"
    return words
