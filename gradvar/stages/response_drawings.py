"""Figures of the responses themselves: lengths, rewards, growth along the response, sampler against policy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from gradvar.figures import (
    Drawing,
    NotDrawn,
    Panel,
    plot_lengths,
    plot_log_probs,
    plot_prefix_curves,
    plot_prompts,
    plot_rewards,
)
from gradvar.runs import SampleConfig, target_label
from gradvar.runs.rows import overall, row_of
from gradvar.stages.held import Held

Drawn = list[Drawing | NotDrawn]


def responses(held: Held) -> Drawn:
    """Lengths and rewards of all responses, and prompt by prompt."""
    names = list(held.rollouts)
    lengths = [np.array([r.length for r in rollouts], dtype=np.float64) for rollouts in held.rollouts.values()]
    rewards = [held.rewards[name] for name in names]
    limit = float(held.run.config(SampleConfig).max_tokens)
    every, scored = np.concatenate(lengths), np.concatenate(rewards)
    unscored = bool(np.isnan(scored).all())
    panels = [
        Panel(
            draw=partial(
                plot_lengths, lengths=every, rewards=None if unscored else scored, limit=limit, title="lengths"
            )
        )
    ]
    if not unscored:
        panels.append(Panel(draw=partial(plot_rewards, rewards=scored, title="rewards")))
        if len(names) > 1:
            draw = partial(plot_prompts, names=names, lengths=lengths, rewards=rewards, title="prompts")
            panels.append(Panel(draw=draw))
    return [
        Drawing(
            stem="responses",
            title="Lengths and rewards",
            alt="How long the responses are by reward class, how often each reward came, and each prompt's mean reward "
            "over its median length.",
            panels=panels,
            numbers=prompt_summary(held),
        )
    ]


def prompt_summary(held: Held) -> pd.DataFrame:
    """Return one row a prompt: responses, lengths in tokens, truncated, mean reward, unverified."""
    rows = []
    for name, rollouts in held.rollouts.items():
        lengths, rewards = np.array([r.length for r in rollouts]), held.rewards[name]
        known = rewards[~np.isnan(rewards)]
        low, middle, high = np.quantile(lengths, (0.25, 0.5, 0.75))
        rows.append(
            {
                "prompt_id": name,
                "responses": len(rollouts),
                "shortest": int(lengths.min()),
                "quarter": low,
                "median": middle,
                "three_quarters": high,
                "longest": int(lengths.max()),
                "truncated": sum(r.finish_reason == "length" for r in rollouts),
                "mean_reward": float(known.mean()) if known.size else np.nan,
                "unverified": int(np.isnan(rewards).sum()),
            }
        )
    return pd.DataFrame(rows)


def sampler_against_policy(held: Held) -> Drawn:
    """Log-probabilities of the sampled tokens under sampler and policy."""
    title = "Sampler against policy, token by token"
    sampler, policy = held.log_probs
    held_both = np.isfinite(sampler) & np.isfinite(policy)
    if not held_both.any():
        why = (
            "the sampler's log-probabilities are not in this run: `gradvar sample RUN --from FILE` takes them from a "
            "column `logprobs`; `gradvar sample` keeps its own"
        )
        return [NotDrawn(stem="sampler_policy", title=title, why=why)]
    differences = (sampler - policy)[held_both]
    size = np.abs(differences)
    numbers = pd.DataFrame(
        {
            "quantity": ["mean |difference|", "99th percentile", "largest", "mean difference (KL a token)"],
            "value": [size.mean(), np.quantile(size, 0.99), size.max(), differences.mean()],
            "n": len(size),
        }
    )
    note = f"mean |difference| {size.mean():.2g} nats\n{len(size)} tokens"
    panel = Panel(draw=partial(plot_log_probs, sampler=sampler, policy=policy, note=note))
    alt = "Log-probability of every sampled token under the policy over that under the sampler; all belong on the line."
    return [Drawing(stem="sampler_policy", title=title, alt=alt, panels=[panel], numbers=numbers)]


def prefixes(held: Held) -> Drawn:
    """How the squared score grows along responses."""
    title = "Growth of the score along the response"
    measured = held.run.prefixes()
    names = [name for name in held.prompt_ids if all((name, t) in measured for t in held.run.targets)]
    if not names:
        run = held.run.path
        why = f"no prefix norms in this run: `gradvar measure {run} --prefixes 8`, then `gradvar audit {run}`"
        return [NotDrawn(stem="prefixes", title=title, why=f"{why} makes it")]
    table = held.table("prefixes")
    panels, numbers = [], []
    for name in names[:3]:
        parts = [measured[name, target] for target in held.run.targets]
        squares, lengths = np.sum([part.value for part in parts], axis=0), parts[0].lengths.astype(np.float64)
        note = "" if table is None else _growth(table[table["prompt_id"] == name], held.last)
        draw = partial(
            plot_prefix_curves,
            prefix_lengths=lengths,
            prefix_squares=squares,
            title=f"prompt {name}: {target_label(held.last)}",
            note=note,
        )
        panels.append(Panel(draw=draw))
        rows = np.repeat(np.arange(len(lengths)), lengths.shape[1])
        columns = {"response": rows, "tokens": lengths.ravel().astype(int), "squared_norm": squares.ravel()}
        numbers.append(pd.DataFrame({"prompt_id": name, **columns}))
    points = pd.concat(numbers, ignore_index=True)
    drawn = points if table is None else overall(table[table["target"] == held.last])
    alt = "Squared norm of the score of each response's prefixes over their length, whole responses as points."
    return [Drawing(stem="prefixes", title=title, alt=alt, panels=panels, numbers=drawn)]


def _growth(table: pd.DataFrame, target: str) -> str:
    rows = table[table["target"] == target]
    lines = []
    for quantity, words in (("prefix_within", "along"), ("prefix_between", "between")):
        row = row_of(rows, quantity=quantity)
        if row is not None and np.isfinite(row["value"]):
            lines.append(f"{words} {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")
    return "\n".join(lines)
