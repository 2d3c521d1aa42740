"""Commands that do the whole job: run, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(demo)
    app.command()(run)


def demo(
    run: Annotated[Path, typer.Argument(metavar="[RUN]", help="The run directory.")] = Path("demo-run"),
    n_prompts: o.NPrompts = None,
    rollouts: o.Rollouts = None,
    engine: o.Engine = None,
    seed: o.Seed = None,
    as_json: o.Json = False,
) -> None:
    """Do the whole job on the bundled policy: a small model trained to search for CountDown solutions.

    Samples, scores, measures, fits, compares, audits, draws and reports, in some minutes on two cores, with no network
    and no GPU.
    """
    settings = o.given(None, n_prompts=n_prompts, rollouts=rollouts, engine=engine, seed=seed)

    from gradvar.runs import create_run
    from gradvar.stages import demo as stage

    from . import console, verdicts

    target = create_run(run)
    with target.locked():
        paths = stage(target, settings, console.Terminal())
    verdicts.show_results(target, paths, as_json=as_json)


def run(
    run: o.RunPath,
    source: o.Source = None,
    config: o.ConfigFile = None,
    model: o.Model = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    prompts: o.Prompts = None,
    prompt_column: o.PromptColumn = None,
    answer_column: o.AnswerColumn = None,
    template: o.Template = None,
    n_prompts: o.NPrompts = None,
    prompt_ids: o.PromptIds = None,
    rollouts: o.Rollouts = None,
    temperature: o.Temperature = None,
    max_tokens: o.MaxTokens = None,
    engine: o.Engine = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = None,
    tensor_parallel_size: o.TensorParallel = None,
    gpu_memory_utilization: o.GpuMemory = None,
    reward: o.Reward = None,
    targets: o.Targets = None,
    bias: o.Bias = None,
    attention: o.Attention = None,
    packing: o.Packing = None,
    token_budget: o.TokenBudget = None,
    memory_budget: o.MemoryBudget = None,
    host_memory_budget: o.HostMemoryBudget = None,
    checkpointing: o.Checkpointing = None,
    probes: o.Probes = None,
    prefixes: o.Prefixes = None,
    cross: o.Cross = None,
    sketch_dim: o.SketchDim = None,
    leave_out_non_finite: o.LeaveOut = None,
    logprob_limit: o.LogprobLimit = None,
    group_size: o.GroupSize = None,
    advantage: o.Advantage = None,
    rule: o.Rules = None,
    alpha: o.Alphas = None,
    batch_prompts: o.BatchPrompts = None,
    level: o.Level = None,
    margin: o.Margin = None,
    equality_margin: o.EqualityMargin = None,
    plan_rule: o.PlanRules = None,
    as_json: o.Json = False,
) -> None:
    """Sample, reward, measure, fit, compare, audit, draw and report: the whole job on any Hugging Face causal LM.

    Kill it at any moment and type the same command again: it goes on where it was. The options of the
    estimates hold for this command alone: `gradvar fit RUN` later takes the defaults.
    """
    options = dict(locals())
    renamed = {"bias": "include_bias", "rule": "rules", "alpha": "alphas", "plan_rule": "plan_rules"}
    skipped = ("run", "source", "as_json", "config")
    settings = o.given(config, **{renamed.get(k, k): v for k, v in options.items() if k not in skipped})

    from gradvar.runs import create_run
    from gradvar.stages import run_all

    from . import console, verdicts

    target = create_run(run)
    with target.locked():
        paths = run_all(target, settings, console.Terminal(), source=source)
    verdicts.show_results(target, paths, as_json=as_json)
