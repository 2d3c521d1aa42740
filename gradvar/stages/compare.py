"""Stage compare: several runs side by side, checkpoints of one training or models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators import compare_table
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run, rollouts_digest
from gradvar.runs.provenance import utc_now
from gradvar.runs.records import counted
from gradvar.stages.groups import check_rule, estimated_groups
from gradvar.stages.identity import agreed_config
from gradvar.stages.listener import Listener, Silent


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side, and what they share."""

    table: pd.DataFrame
    """The table `compare`."""
    shared: dict[str, int]
    """Prompts that each run shares, by their text, with the first."""
    prompts: dict[str, int]
    """Measured prompts of each run."""
    notes: tuple[str, ...]
    """What could not be compared, and why, one line each."""


def compare(
    runs: Sequence[Run],
    given: Mapping[str, Any],
    listener: Listener | None = None,
    *,
    rule: str = "grpo",
    alpha: float | None = None,
) -> Comparison:
    """Compare runs with the first; write the table `compare` in the first run, and return it.

    Prompts are the same where their texts are (the k-th of several with one text with the k-th): ids only name rows.
    Weights are compared target by target where runs share targets, and all measured weights together.

    Args:
        runs: At least two runs with Grams, the reference first; only the first is written to.
        given: Settings of `EstimateConfig` given now; what is not given takes its default, whatever
            the runs' tables were made with.
        listener: Who is told.
        rule: Aggregator whose CV, noise scale and efficiency are compared.
        alpha: Its exponent, where it takes one.

    Raises:
        GradvarError: Fewer than two runs, a run twice, nothing measured, a group too large for a run, or an alpha of a
            rule that takes none.
    """
    listener = listener or Silent()
    if len(runs) < 2:
        raise GradvarError("compare: expected at least two runs, received 1: name another one")
    names = run_names(runs)
    first = runs[0]
    config = agreed_config(first, EstimateConfig, given)
    check_rule(rule, alpha)
    started = utc_now()
    notes: list[str] = []
    texts = {name: {p.prompt_id: p.text for p in run.prompts()} for name, run in zip(names, runs, strict=True)}
    measured = {name: estimated_groups(run, listener) for name, run in zip(names, runs, strict=True)}
    chosen = _common_targets(measured, notes)
    matched = matched_ids(
        {name: {g.prompt_id: texts[name][g.prompt_id] for g in groups} for name, groups in chosen.items()}, notes
    )
    groups = {name: [replace(g, prompt_id=matched[name][g.prompt_id]) for g in found] for name, found in chosen.items()}
    for name, run in list(zip(names, runs, strict=True))[1:]:
        again = same_rollouts(first, run, matched[name])
        if again:
            notes.append(
                f"{name} holds the same rollouts as {names[0]} of {counted(again, 'prompt')}: differences are exact "
                "for these rollouts, and their intervals, which take the runs for independent, do not hold"
            )
    with listener.task("compare", 1) as advance:
        table = compare_table(
            groups,
            rule=rule,
            alpha=alpha,
            group_size=config.group_size,
            advantage=config.advantage,
            level=config.level,
            seed=config.seed,
        )
        advance(1)
    ids = {name: {g.prompt_id for g in found} for name, found in groups.items()}
    first.begin("compare", config, started=started)
    first.write_estimates("compare", table)
    first.finish("compare", runs={name: str(run.path.resolve()) for name, run in zip(names, runs, strict=True)})
    return Comparison(
        table=table,
        shared={name: len(ids[name] & ids[names[0]]) for name in names[1:]},
        prompts={name: len(found) for name, found in ids.items()},
        notes=tuple(notes),
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a name for every run: its folder's, or the path as it was given where folders are named alike.

    Raises:
        GradvarError: One run is given twice.
    """
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise GradvarError(f"compare: expected different runs, received {path} twice: leave one out")
    short = [path.name for path in paths]
    return [name if short.count(name) == 1 else str(run.path) for name, run in zip(short, runs, strict=True)]


def matched_ids(texts: Mapping[str, Mapping[str, str]], notes: list[str]) -> dict[str, dict[str, str]]:
    """Return, for each run, its prompt ids to ids that are equal exactly where the texts are.

    Args:
        texts: Run to prompt id to text, the reference first, whose ids stay.
        notes: Gets a line where ids agree and texts do not, and where nothing is shared.
    """
    reference = next(iter(texts))
    taken = set(texts[reference])
    found = {reference: {name: name for name in texts[reference]}}
    for run, prompts in list(texts.items())[1:]:
        waiting: dict[str, list[str]] = defaultdict(list)
        for name, text in texts[reference].items():
            waiting[text].append(name)
        ids: dict[str, str] = {}
        for name, text in prompts.items():
            same = waiting.get(text)
            ids[name] = same.pop(0) if same else name if name not in taken else f"{run}:{name}"
        found[run] = ids
        differing = [name for name in prompts if name in taken and prompts[name] != texts[reference][name]]
        if differing:
            notes.append(
                f"{counted(len(differing), 'prompt id')} of {run} (first: {differing[0]}) with another text in "
                f"{reference}: prompts are matched by text, so these are not compared under that id"
            )
        if not taken & set(ids.values()):
            notes.append(f"{run} shares no prompt text with {reference}: no differences, each run has its own numbers")
    return found


def same_rollouts(first: Run, second: Run, matched: Mapping[str, str]) -> int:
    """Return how many prompts' rollouts are the same tokens in both runs.

    Args:
        first: The reference.
        second: Another run.
        matched: Ids of the second's prompts to ids of the first's, which holds some of them.
    """
    held = {p.prompt_id for p in first.prompts()}
    pairs = [(own, name) for own, name in matched.items() if name in held]
    digests = ((rollouts_digest(second.rollouts(own)), rollouts_digest(first.rollouts(name))) for own, name in pairs)
    return sum(one == two for one, two in digests)


def _common_targets(measured: Mapping[str, list[PromptScores]], notes: list[str]) -> dict[str, list[PromptScores]]:
    """Keep the targets that every run holds, and the sum of what is kept; of other weights only the sum."""
    targets = {name: list(dict.fromkeys(g.target for g in groups)) for name, groups in measured.items()}
    held = [set(found) - {SUM} for found in targets.values()]
    if all(one == held[0] for one in held):
        return dict(measured)
    common = set.intersection(*held)
    if common:
        left = sorted(set.union(*held) - common)
        notes.append(f"only targets that every run holds are compared; left out: {', '.join(left)}")
        return {name: [g for g in groups if g.target in common] for name, groups in measured.items()}
    notes.append("no target is in every run: all measured weights of each run together are compared")
    return {
        name: [replace(g, target=SUM) for g in groups if g.target == (SUM if SUM in targets[name] else g.target)]
        for name, groups in measured.items()
    }
