"""Commands that turn Grams into numbers: fit, cv, alpha."""

from __future__ import annotations

import typer

from . import options as o


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(fit)
    app.command()(cv)
    app.command()(alpha)


def fit(
    run: o.RunPath,
    level: o.Level = None,
    margin: o.Margin = None,
    advantage: o.Advantage = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    as_json: o.Json = False,
) -> None:
    """Fit variance against length: the exponent with its interval, and the verdict.

    Deviation is the squared distance from the mean gradient (the paper's figures); within-length variance is what
    remains among responses of like length, and what least-variance weights depend on.
    """
    settings = o.given(config, level=level, margin=margin, advantage=advantage, seed=seed)

    from gradvar.runs import open_run
    from gradvar.stages import fit as stage

    from . import console, verdicts

    target = open_run(run)
    with target.locked():
        stage(target, settings, console.Terminal())
    verdicts.show_law(target, as_json=as_json)


def cv(
    run: o.RunPath,
    group_size: o.GroupSize = None,
    advantage: o.Advantage = None,
    rule: o.Rules = None,
    alpha: o.Alphas = None,
    batch_prompts: o.BatchPrompts = None,
    extras: o.Extras = False,
    overlong_buffer: o.OverlongBuffer = None,
    level: o.Level = None,
    equality_margin: o.EqualityMargin = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    as_json: o.Json = False,
) -> None:
    """Estimate the coefficient of variation of each aggregator's update: sqrt(variance) over the mean's norm.

    Total CV, lengths random, at one group size. Where the signal cannot be told from zero the CV is unresolved: its
    lower bound is given, and the number of responses that would resolve it. Where `gradvar measure --cross` made
    products between prompts, batches of several prompts too: variance within and between prompts, and what weights
    over the whole batch change.
    """
    settings = o.given(
        config,
        group_size=group_size,
        advantage=advantage,
        rules=tuple(rule) if rule else None,
        alphas=tuple(alpha) if alpha else None,
        batch_prompts=tuple(batch_prompts) if batch_prompts else None,
        overlong_buffer=overlong_buffer,
        level=level,
        equality_margin=equality_margin,
        seed=seed,
    )

    from gradvar.runs import open_run
    from gradvar.stages import cv as stage

    from . import console, verdicts

    target = open_run(run)
    with target.locked():
        stage(target, settings, console.Terminal(), extras=extras)
    verdicts.show_cv(target, extras=extras, as_json=as_json)


def alpha(
    run: o.RunPath,
    group_size: o.GroupSize = None,
    advantage: o.Advantage = None,
    rule: o.Rules = None,
    plan_rule: o.PlanRules = None,
    level: o.Level = None,
    equality_margin: o.EqualityMargin = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    as_json: o.Json = False,
) -> None:
    """Say which alpha to use: efficiency, bias and noise of VL Norm over alpha, beside the other aggregators.

    Efficiency eta is cos² rho, between 0 and 1: 1 - eta is the least relative squared error of one update, whatever the
    learning rate. Also: the CV in its three forms (lengths given with Var = V L, lengths given as measured, lengths at
    random), whether the paper's order holds in each, CV and efficiency against group size, and the noise scale of the
    gradient itself.
    """
    settings = o.given(
        config,
        group_size=group_size,
        advantage=advantage,
        rules=tuple(rule) if rule else None,
        plan_rules=tuple(plan_rule) if plan_rule else None,
        level=level,
        equality_margin=equality_margin,
        seed=seed,
    )

    from gradvar.runs import open_run
    from gradvar.stages import alpha as stage

    from . import choices, console

    target = open_run(run)
    with target.locked():
        stage(target, settings, console.Terminal())
    choices.show_alpha(target, as_json=as_json)
