"""Commands that make data: sample, reward, measure."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(sample)
    app.command()(reward)
    app.command()(measure)


def sample(
    run: o.RunPath,
    source: o.Source = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first prompt as the model sees it; no sampling.")
    ] = False,
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
    as_json: o.Json = False,
) -> None:
    """Sample rollouts of every prompt, exactly from the policy (no top-k, no top-p, no penalties).

    Run it again to go on after an interruption, with more `--rollouts` or `--n-prompts` to add to the run.
    """
    options = {name: value for name, value in locals().items() if name not in ("run", "source", "dry_run", "as_json")}
    settings = o.given(**options)

    from gradvar.runs import create_run
    from gradvar.stages import import_rollouts, prepare
    from gradvar.stages import sample as stage

    from . import console, views

    target = create_run(run)
    if dry_run:
        views.show_preparation(prepare(target, settings), as_json=as_json)
        return
    with target.locked():
        if source is not None:
            import_rollouts(target, source, settings, console.Terminal())
        else:
            stage(target, settings, console.Terminal())
    views.show_rollouts(target, as_json=as_json)


def reward(run: o.RunPath, reward: o.Reward = None, config: o.ConfigFile = None, as_json: o.Json = False) -> None:
    """Score the rollouts, again at any time with another reward.

    A response whose check hangs or crashes is unverified: null, counted, never zero.
    """
    settings = o.given(config, reward=reward)

    from gradvar.runs import open_run
    from gradvar.stages import reward as stage

    from . import console, views

    target = open_run(run)
    with target.locked():
        stage(target, settings, console.Terminal())
    views.show_rollouts(target, as_json=as_json)


def measure(
    run: o.RunPath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan: batches, passes, bytes, FLOP; measure and write nothing.")
    ] = False,
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
    seed: o.Seed = None,
    leave_out_non_finite: o.LeaveOut = None,
    logprob_limit: o.LogprobLimit = None,
    config: o.ConfigFile = None,
    as_json: o.Json = False,
) -> None:
    """Measure every response's gradient on the chosen weights, as the exact Gram matrix of inner products.

    Targets add: `--targets all:mlp` on a measured run measures these too and keeps the others; `--probes`, `--prefixes`
    and `--cross` add likewise. `gradvar targets MODEL` lists what can be measured.
    """
    settings = o.given(
        config,
        targets=tuple(targets) if targets else None,
        include_bias=bias,
        attention=attention,
        packing=packing,
        token_budget=token_budget,
        memory_budget=memory_budget,
        host_memory_budget=host_memory_budget,
        checkpointing=checkpointing,
        probes=probes,
        prefixes=prefixes,
        cross=cross,
        sketch_dim=sketch_dim,
        seed=seed,
        leave_out_non_finite=leave_out_non_finite,
        logprob_limit=logprob_limit,
    )

    from gradvar.runs import open_run
    from gradvar.stages import measure as stage
    from gradvar.stages import plan_measure

    from . import console, plans, views

    target = open_run(run)
    if dry_run:
        plans.show_plan(plan_measure(target, settings, console.Terminal()), as_json=as_json)
        return
    with target.locked():
        stage(target, settings, console.Terminal())
    views.show_measured(target, as_json=as_json)
