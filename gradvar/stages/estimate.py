"""Stages fit, cv and alpha: score Grams to tables of estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from gradvar.estimators import (
    alpha_table,
    cv_table,
    extras_table,
    find_rule,
    form_table,
    identity_table,
    law_table,
    noise_scale_table,
    parse_variant,
    planning_table,
    proxy_table,
    recommendation,
    total_cv_form,
    total_form,
)
from gradvar.estimators.advice import EXPONENT
from gradvar.estimators.planning import SIZES
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run
from gradvar.runs.provenance import utc_now
from gradvar.stages.batch import write_batches
from gradvar.stages.entropy import entropy_rows
from gradvar.stages.groups import check_buffer, check_group_size, estimated_groups
from gradvar.stages.identity import agreed_config
from gradvar.stages.listener import Listener, Silent
from gradvar.stages.together import together


def fit(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> dict[str, pd.DataFrame]:
    """Fit the variance law, check the score identity, rate cheap proxies; write and return these three tables.

    `law`, `identity`, and `proxies`: how well length, A^2, W and the like predict the exact squared gradient.

    Args:
        run: A run with Grams.
        given: Settings of `EstimateConfig` given now.
        listener: Who is told.

    Raises:
        GradvarError: Nothing was measured.
    """
    listener = listener or Silent()
    config = agreed_config(run, EstimateConfig, given)
    started = utc_now()
    groups = estimated_groups(run, listener)
    common: dict[str, Any] = {"level": config.level, "seed": config.seed}
    known = _measured_proxies(run, groups)
    tasks = [
        partial(law_table, groups, advantages_studied=[kind], margin=config.margin, **common)
        for kind in dict.fromkeys(["score", config.advantage])
    ]
    tasks.append(partial(proxy_table, groups, proxies=known, advantage=config.advantage, **common))
    tasks.append(partial(identity_table, groups, **common))
    with listener.task("fit", len(tasks)) as advance:
        found = []
        for table in together(tasks, groups):
            found.append(table)
            advance(1)
    *laws, proxies, identity = found
    order = {target: k for k, target in enumerate(dict.fromkeys(group.target for group in groups))}
    law = pd.concat(laws).sort_values("target", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    balance = entropy_rows(run, groups, config.level, config.seed)
    identity = pd.concat([identity, balance], ignore_index=True) if len(balance) else identity
    run.begin("fit", config, started=started)  # nothing is written before the settings proved good
    tables = {"law": law, "identity": identity, "proxies": proxies}
    for name, table in tables.items():
        run.write_estimates(name, table)
    run.finish("fit")
    return tables


def _measured_proxies(run: Run, groups: Sequence[PromptScores]) -> dict[str, dict[str, Any]]:
    """What the measuring pass saw that may stand for a gradient's norm: W and the entropy of every response."""
    found: dict[str, dict[str, Any]] = {"w": {}, "entropy": {}}
    for name, ids in {group.prompt_id: group.rollout_ids for group in groups}.items():
        if run.file("measures", name).exists():
            measures = run.measures(name)
            if set(ids) <= set(measures.rollout_ids):
                kept = measures.select(ids)
                found["w"][name], found["entropy"][name] = kept.proxy, kept.entropy
    return {name: by_prompt for name, by_prompt in found.items() if by_prompt}


def cv(run: Run, given: Mapping[str, Any], listener: Listener | None = None, *, extras: bool = False) -> pd.DataFrame:
    """Estimate every aggregator's total CV; write and return the table `cv`.

    Where the run holds products between prompts, the table `batches` is written too: batches of several prompts.

    Args:
        run: A run with Grams and rewards.
        given: Settings of `EstimateConfig` given now.
        listener: Who is told.
        extras: Also set updates with DAPO's extras beside plain ones: table `extras`; else one of an earlier call is
            removed.

    Raises:
        GradvarError: Nothing was measured, the group is larger than the rollouts, or the buffer than a response may be.
    """
    listener = listener or Silent()
    config = agreed_config(run, EstimateConfig, given)
    started = utc_now()
    groups = estimated_groups(run, listener)
    check_group_size(groups, config)
    common: dict[str, Any] = {"rules": config.rules, "alphas": config.alphas, "group_size": config.group_size}
    common |= {"advantage": config.advantage, "level": config.level, "seed": config.seed}
    tasks = [partial(cv_table, groups, equality_margin=config.equality_margin, **common)]
    if extras:
        check_buffer(groups, config)
        for target in dict.fromkeys(group.target for group in groups):
            mine = [group for group in groups if group.target == target]
            tasks.append(partial(extras_table, mine, buffer=config.overlong_buffer, **common))
    with listener.task("cv", len(tasks) + 1) as advance:
        found: list[pd.DataFrame] = []
        for one in together(tasks, groups):
            found.append(one)
            advance(1)
        table, *beside = found
        run.begin("cv", config, started=started)
        run.write_estimates("cv", table)
        if beside:
            run.write_estimates("extras", pd.concat(beside, ignore_index=True))
        else:
            run.remove_estimates("extras")
        write_batches(run, groups, config, listener)
        advance(1)
    run.finish("cv")
    return table


def alpha(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> dict[str, pd.DataFrame]:
    """Estimate efficiency, bias and pressure over alpha, the paper's order, and CV against group size.

    Writes and returns the tables `alpha`, `forms` (the CV in three forms, and whether the paper's inequality holds in
    each) and `planning`.

    Args:
        run: A run with Grams and rewards.
        given: Settings of `EstimateConfig` given now.
        listener: Who is told.

    Raises:
        GradvarError: Nothing was measured, or too few rollouts for the group size.
    """
    listener = listener or Silent()
    config = agreed_config(run, EstimateConfig, given)
    started = utc_now()
    groups = estimated_groups(run, listener)
    check_group_size(groups, config)
    common: dict[str, Any] = {"advantage": config.advantage, "level": config.level, "seed": config.seed}
    rules = tuple(rule for rule in config.rules if not find_rule(rule).takes_alpha)
    for planned in config.plan_rules:
        parse_variant(planned)
    tasks = [
        partial(alpha_table, groups, rules=rules, group_size=config.group_size, **common),
        partial(_planning, groups, config, common),
        partial(_three_forms, groups, config, common),
        partial(_fitted_exponent, groups, config),
    ]
    with listener.task("alpha", len(tasks)) as advance:
        found = []
        for table in together(tasks, groups):
            found.append(table)
            advance(1)
    curves, planning, forms, beside = found
    beside = beside[[name for name in beside.columns if name in curves.columns]]
    tables = {"alpha": pd.concat([curves, beside], ignore_index=True), "forms": forms, "planning": planning}
    run.begin("alpha", config, started=started)
    for name, table in tables.items():
        run.write_estimates(name, table)
    run.finish("alpha")
    return tables


def _three_forms(groups: Sequence[PromptScores], config: EstimateConfig, common: dict[str, Any]) -> pd.DataFrame:
    """Forms 1, 2 and 3 of every rule's CV, and against grpo's and dapo's: the two ends of the paper's order."""
    options: dict[str, Any] = {"rules": config.rules, "alphas": config.alphas, **common}
    options |= {"equality_margin": config.equality_margin, "group_size": config.group_size}
    parts = [form_table(groups, further_references=("dapo",), **options)]
    total = cv_table(groups, further_references=("dapo",), **options)
    parts += [total_cv_form(total), total_form(total)]
    return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)


def _planning(groups: Sequence[PromptScores], config: EstimateConfig, common: dict[str, Any]) -> pd.DataFrame:
    """Every planned rule against group size, the one asked for among them, and the gradient's own noise scale."""
    (rule, alpha), *further = dict.fromkeys(map(parse_variant, config.plan_rules))
    parts = [
        planning_table(groups, rule=rule, alpha=alpha, further=further, sizes=(*SIZES, config.group_size), **common),
        noise_scale_table(groups, level=config.level, seed=config.seed),
    ]
    columns = list(dict.fromkeys(name for part in parts for name in part.columns))
    filled = [part.dropna(axis=1, how="all") for part in parts]  # pandas warns of columns that are all missing
    return pd.concat(filled, ignore_index=True).reindex(columns=columns)


def _fitted_exponent(groups: Sequence[PromptScores], config: EstimateConfig) -> pd.DataFrame:
    """Rows of the fitted exponent beside the best alpha, made here: the advice depends on no other command's table."""
    target = _spoken(groups)
    mine = [group for group in groups if group.target == target]
    options: dict[str, Any] = {"level": config.level, "margin": config.margin, "seed": config.seed}
    law = law_table(mine, advantages_studied=[config.advantage], subsets=False, exponents_only=True, **options)
    return law[law["quantity"] == EXPONENT]


def _spoken(groups: Sequence[PromptScores]) -> str:
    """Return the target that the advice is about: all together, or the only one."""
    targets = list(dict.fromkeys(group.target for group in groups))
    return SUM if SUM in targets else targets[0]


def advice(run: Run) -> str | None:
    """Return which alpha to use and what that rests on, in one sentence; None before `alpha` ran."""
    if not (run.path / "tables" / "alpha.parquet").exists():
        return None
    table = run.table("alpha")
    target = SUM if SUM in set(table["target"]) else str(table["target"].iloc[0])
    return recommendation(table, target=target)
