"""The whole job, stage after stage; everything that can be checked early is, before the long work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradvar.errors import GradvarError
from gradvar.estimators import find_rule, parse_variant
from gradvar.gradients import check_targets
from gradvar.models import find_model, load_skeleton
from gradvar.rollouts.rewards import choose_reward
from gradvar.runs import EstimateConfig, MeasureConfig, RewardConfig, Run, SampleConfig
from gradvar.stages.agreement import disagreement
from gradvar.stages.audit import audit
from gradvar.stages.estimate import alpha, cv, fit
from gradvar.stages.figures import draw_figures
from gradvar.stages.identity import agreed_config
from gradvar.stages.listener import Listener, Silent
from gradvar.stages.measure import measure
from gradvar.stages.report import report
from gradvar.stages.reward import reward
from gradvar.stages.sample import IMPORTED, import_rollouts, prepare, sample

DEMO_PROMPTS = 16
DEMO_MAX_TOKENS = 1024


def run_all(
    run: Run, given: Mapping[str, Any], listener: Listener | None = None, *, source: Path | None = None
) -> list[Path]:
    """Sample, reward, measure, fit, compare, audit, draw and report; what is done already stays.

    Args:
        run: The run, new or not.
        given: Settings of every section given now.
        listener: Who is told.
        source: Rollouts made elsewhere, taken instead of sampling; a run that holds such rollouts needs none.

    Returns:
        Paths of the figures, and of the report at the end.

    Raises:
        GradvarError: Bad input; nothing is sampled before all of it was checked.
    """
    listener = listener or Silent()
    check_estimates(run, given)
    if source is not None:
        made = agreed_config(run, SampleConfig, given)
        skeleton = load_skeleton(find_model(made.model, made.revision), trust_remote_code=made.trust_remote_code)
        check_targets(skeleton, agreed_config(run, MeasureConfig, given).targets)
        import_rollouts(run, source, given, listener)
    elif run.stored(SampleConfig).get("engine") != IMPORTED:
        check_sampling(run, given)
        sample(run, given, listener)
    reward(run, given, listener)
    check_groups(run, given)
    measure(run, given, listener)
    line = disagreement(run)
    if line is not None:
        listener.warn(line)
    fit(run, given, listener)
    cv(run, given, listener)
    alpha(run, given, listener)
    audit(run, given, listener)
    return [*draw_figures(run, listener), report(run, listener)]


def check_estimates(run: Run, given: Mapping[str, Any]) -> None:
    """Check what is asked of the Grams before there are any; writes nothing.

    Raises:
        GradvarError: The first mistake found.
    """
    for rule in agreed_config(run, EstimateConfig, given).rules:
        find_rule(rule)
    for planned in agreed_config(run, EstimateConfig, given).plan_rules:
        parse_variant(planned)
    agreed_config(run, MeasureConfig, given)
    agreed_config(run, RewardConfig, given)


def check_sampling(run: Run, given: Mapping[str, Any]) -> None:
    """Check prompts, rewards and targets against the model and the run before anything is sampled; writes nothing.

    Raises:
        GradvarError: The first mistake found.
    """
    ready = prepare(run, given)
    group_size = agreed_config(run, EstimateConfig, given).group_size
    if 2 * group_size > ready.config.rollouts:
        raise GradvarError(
            f"--group-size: expected at most {ready.config.rollouts // 2}, half the {ready.config.rollouts} rollouts a "
            f"prompt (a CV needs two disjoint groups), received {group_size}"
        )
    override = agreed_config(run, RewardConfig, given).reward
    for prompt in ready.prompts:
        if prompt.ground_truth is not None or override is not None:
            choose_reward(prompt.data_source, prompt.ground_truth, override)
    skeleton = load_skeleton(ready.folder, trust_remote_code=ready.config.trust_remote_code)
    check_targets(skeleton, agreed_config(run, MeasureConfig, given).targets)


def check_groups(run: Run, given: Mapping[str, Any]) -> None:
    """Check that a prompt's responses make two groups before they are measured, which takes longest.

    Raises:
        GradvarError: No prompt holds as many verified responses (of any kind for the score).
    """
    config = agreed_config(run, EstimateConfig, given)
    sampled = [prompt.prompt_id for prompt in run.prompts() if run.file("rollouts", prompt.prompt_id).exists()]
    rewards = [run.rewards(prompt_id) for prompt_id in sampled]
    most = max(len(r) if config.advantage == "score" else int((~np.isnan(r)).sum()) for r in rewards)
    if 0 < most < 2 * config.group_size:  # without any the score alone is estimated
        raise GradvarError(
            f"--group-size: expected at most {most // 2}, half the {most} verified responses of the largest prompt (a "
            f"CV needs two disjoint groups), received {config.group_size}; nothing was measured"
        )


def demo(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> list[Path]:
    """Do the whole job on the bundled policy and its held-out CountDown problems.

    Args:
        run: The run, new or not.
        given: Settings that differ from the demo's own.
        listener: Who is told.

    Returns:
        Paths of the figures, and of the report at the end.
    """
    from gradvar.demo import policy_path, problems_path, template_path

    settings = {
        "model": str(policy_path()),
        "prompts": str(problems_path()),
        "template": str(template_path()),
        "n_prompts": DEMO_PROMPTS,
        "rollouts": 128,
        "max_tokens": DEMO_MAX_TOKENS,
        "engine": "transformers",
        "device": "cpu",
        "targets": ("last:qkv",),
    }
    return run_all(run, {**settings, **{k: v for k, v in given.items() if v is not None}}, listener)
