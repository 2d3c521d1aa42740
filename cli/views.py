"""What each command prints: readable tables, or the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradvar.report.numbers import number
from gradvar.runs.records import counted

from . import console

if TYPE_CHECKING:
    from gradvar.runs import Run
    from gradvar.stages import Preparation


def show_preparation(ready: Preparation, *, as_json: bool) -> None:
    """Show what was read and the first prompt exactly as the model will see it."""
    first = ready.prompts[0]
    if as_json:
        prompt = {"prompt_id": first.prompt_id, "text": first.text, "token_ids": list(first.token_ids)}
        console.print_json({"problems": ready.problems_read, "prompts": len(ready.prompts), "first_prompt": prompt})
        return
    read = ready.problems_read
    console.result.print(f"{read['file']}: {read['schema']}, {read['problems']} problems, {read['chosen']} chosen")
    _print_prompt(first.prompt_id, first.text, len(first.token_ids))


def show_rollouts(run: Run, *, as_json: bool) -> None:
    """Show one line a prompt: lengths, truncation, rewards."""
    rows = [_prompt_summary(run, prompt_id) for prompt_id in run.prompt_ids]
    if as_json:
        console.print_json({"run": str(run.path), "prompts": rows})
        return
    _print_prompts(rows)
    step = "measure" if any(run.file("rewards", row["prompt_id"]).exists() for row in rows) else "reward"
    console.result.print(f"next: gradvar {step} {run.path}", markup=False)


def show_measured(run: Run, *, as_json: bool) -> None:
    """Show the measured targets and how well the sampler agrees with the policy."""
    from gradvar.stages import disagreement, sampler_agreements

    agreements = sampler_agreements(run)
    if as_json:
        rows = {name: vars(one) for name, one in agreements.items()}
        console.print_json(
            {
                "run": str(run.path),
                "targets": run.targets,
                "left_out": run.left_out(),
                "sampler": rows,
                "disagreement": disagreement(run),
            }
        )
        return
    _print_disagreement(run)
    taus, prefixes = run.taus().values(), run.prefixes().values()
    more = [f", tau by {n} probes" for n in sorted({tau.probes for tau in taus})]
    more += [f", {n} prefixes" for n in sorted({norms.count for norms in prefixes})]
    console.result.print(
        f"{counted(len(run.measured_prompt_ids()), 'prompt')} measured on {', '.join(run.targets)}{''.join(more)}",
        markup=False,
    )
    if agreements:
        worst = max(one.max_abs for one in agreements.values())
        mean = np.mean([one.mean_abs for one in agreements.values()])
        console.result.print(
            f"sampler against policy: {number(mean)} nats per token on average, at most {number(worst)}", markup=False
        )
    console.result.print(f"next: gradvar fit {run.path}; gradvar cv {run.path}", markup=False)


def measured_how(run: Run) -> str:
    """Return dtype, attention and bias choice of the run's gradients, in words."""
    how = run.info["stages"].get("measure", {})
    if "dtype" not in how:
        return "not measured yet"
    biases = run.info["config"].get("measure", {}).get("include_bias", True)
    return f"{how['dtype']}, {how['attention']} attention, biases {'counted' if biases else 'not counted'}"


def show_paths(paths: Sequence[Path], *, as_json: bool, then: str) -> None:
    """Show which files were written, and where to look next."""
    if as_json:
        console.print_json({"files": [str(path) for path in paths]})
        return
    for path in paths:
        console.result.print(str(path), markup=False, soft_wrap=True)
    console.result.print(f"next: {then}", markup=False, soft_wrap=True)


def show_info(run: Run, *, as_json: bool) -> None:
    """Show what the run holds."""
    rows = [_prompt_summary(run, prompt_id) for prompt_id in run.prompt_ids]
    first = run.prompts()[0]
    if as_json:
        prompt = {"prompt_id": first.prompt_id, "text": first.text, "token_ids": list(first.token_ids)}
        console.print_json(
            {
                "run": str(run.path),
                **{key: run.info.get(key) for key in ("status", "model", "config", "stages")},
                "targets": run.targets,
                "prompts": rows,
                "first_prompt": prompt,
            }
        )
        return
    sample = run.info["config"].get("sample", {})
    read = run.info["stages"].get("sample", {}).get("problems", {})
    facts = {
        "status": run.info["status"],
        "model": f"{run.info['model'].get('path')} (weights {str(run.info['model'].get('weights_sha256'))[:12]})",
        "problems": ", ".join(f"{k} {v}" for k, v in read.items()) or sample.get("prompts"),
        "sampling": f"{sample.get('engine')}, temperature {sample.get('temperature')}, at most "
        f"{sample.get('max_tokens')} tokens, {sample.get('dtype')} on {sample.get('device')}, "
        f"seed {sample.get('seed')}",
        "targets": ", ".join(run.targets) or "none measured yet",
        "measured": measured_how(run),
        **({"left out": f"{sum(map(len, left_out.values()))} responses"} if (left_out := run.left_out()) else {}),
    }
    for name, value in facts.items():
        console.result.print(f"{name:<9} {value}", markup=False, soft_wrap=True)
    _print_prompts(rows)
    _print_prompt(first.prompt_id, first.text, len(first.token_ids))


def _prompt_summary(run: Run, prompt_id: str) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt_id": prompt_id, "rollouts": 0}
    if run.file("rollouts", prompt_id).exists():
        rollouts = run.rollouts(prompt_id)
        lengths = np.array([rollout.length for rollout in rollouts])
        row |= {
            "rollouts": len(rollouts),
            "shortest": int(lengths.min()),
            "mean_length": float(lengths.mean()),
            "longest": int(lengths.max()),
            "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts),
        }
    if run.file("rewards", prompt_id).exists():
        rewards = run.rewards(prompt_id)
        known = rewards[~np.isnan(rewards)]
        row |= {
            "mean_reward": float(known.mean()) if known.size else None,
            "unverified": int(np.isnan(rewards).sum()),
        }
    return row


def _print_prompts(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["rollouts", "shortest", "mean_length", "longest", "truncated", "mean_reward", "unverified"]
    shown = [[str(row["prompt_id"]), *[number(row.get(column)) for column in columns]] for row in rows]
    names = ["rollouts", "shortest", "mean", "longest", "truncated", "reward", "unverified"]
    console.table("Prompts: lengths in tokens, mean reward", ["prompt", *names], shown)


def _print_prompt(prompt_id: str, text: str, n_tokens: int) -> None:
    console.result.print(f"prompt {prompt_id} as the model sees it ({n_tokens} tokens):", markup=False)
    console.result.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_disagreement(run: Run) -> None:
    from gradvar.stages import disagreement

    line = disagreement(run)
    if line is not None:
        console.result.print(line, style="bold red", markup=False)
