"""Stage audit: what the paper's theory takes for granted, each assumption with figure, interval, margin and verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gradvar.estimators import audit_table, prefix_table
from gradvar.estimators.audit_rows import NOT_MEASURED
from gradvar.runs import EstimateConfig, Run
from gradvar.runs.provenance import utc_now
from gradvar.stages.entropy import entropy_rows
from gradvar.stages.groups import check_rule, estimated_groups
from gradvar.stages.identity import agreed_config
from gradvar.stages.listener import Listener, Silent


def audit(
    run: Run,
    given: Mapping[str, Any],
    listener: Listener | None = None,
    *,
    rule: str = "grpo",
    alpha: float | None = None,
) -> dict[str, pd.DataFrame]:
    """Judge assumptions 0 to 4; write and return the table `audit`.

    Where the run was measured with probes also `token_covariance` (the audit's rows of assumption 1, by reward and
    length), with prefixes also `prefixes` (growth inside responses beside growth between them); else such tables of
    earlier calls are removed.

    Args:
        run: A run with Grams.
        given: Settings of `EstimateConfig` given now, the margins among them.
        listener: Who is told.
        rule: Aggregator of assumption 3.
        alpha: Its exponent, where it takes one.

    Raises:
        GradvarError: Nothing was measured, a setting is none, or an alpha of a rule that takes none.
    """
    listener = listener or Silent()
    config = agreed_config(run, EstimateConfig, given)
    check_rule(rule, alpha)
    started = utc_now()
    groups = estimated_groups(run, listener)
    taus, norms = run.taus(), run.prefixes()
    with listener.task("audit", 2) as advance:
        table = audit_table(
            groups,
            group_size=config.group_size,
            advantage=config.advantage,
            rule=rule,
            alpha=alpha,
            level=config.level,
            identity_margin=config.identity_margin,
            token_margin=config.token_margin,
            exponent_margin=config.margin,
            baseline_margin=config.baseline_margin,
            length_margin=config.length_margin,
            taus={key: tau.value for key, tau in taus.items()},
            tau_errors={key: tau.error for key, tau in taus.items()},
            seed=config.seed,
        )
        advance(1)
        balance = entropy_rows(run, groups, config.level, config.seed)
        if len(balance):
            balance = balance.assign(assumption=pd.array([0] * len(balance), dtype="Int64"))
            table = pd.concat([table, balance], ignore_index=True).sort_values(
                "assumption", kind="stable", ignore_index=True
            )
        advance(1)
    tables = {"audit": table}
    tokens = table[(table["assumption"] == 1) & (table["verdict"] != NOT_MEASURED)]
    if len(tokens):
        tables["token_covariance"] = tokens.reset_index(drop=True)
    if norms:
        curves = {key: (one.value, one.lengths) for key, one in norms.items()}
        tables["prefixes"] = prefix_table(curves, run.targets, level=config.level, seed=config.seed)
    run.begin("audit", config, started=started)
    for name in ("audit", "token_covariance", "prefixes"):
        if name in tables:
            run.write_estimates(name, tables[name])
        else:
            run.remove_estimates(name)
    run.finish("audit")
    return tables
