"""Stage sample: problems to prompts, prompts to rollouts, whole prompts at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradvar.errors import GradvarError
from gradvar.models import ModelFolder, find_model, load_tokenizer, resolve_device, resolve_dtype
from gradvar.rollouts.engines import (
    SamplingRequest,
    SamplingSettings,
    check_engine,
    default_engine,
    end_token_ids,
    prompt_seed,
)
from gradvar.rollouts.engines import sample as sample_with
from gradvar.rollouts.imports import ImportedPrompt, read_rollouts
from gradvar.rollouts.problems import read_problems, select_problems
from gradvar.rollouts.templates import build_prompts, resolve_template
from gradvar.runs import Prompt, Rollout, Run, SampleConfig, rollouts_digest
from gradvar.runs.records import counted
from gradvar.stages.identity import agree_on_model, agreed_config, agreed_prompts
from gradvar.stages.listener import Listener, Silent

IMPORTED = "imported"
"""Engine and reward name of what was made elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that sampling needs, before anything is written."""

    config: SampleConfig
    folder: ModelFolder
    weights_hash: str
    prompts: list[Prompt]
    problems_read: dict[str, Any]
    """What the problems file held: file, schema, count, and the template used."""


def prepare(run: Run, given: Mapping[str, Any]) -> Preparation:
    """Read the problems, build the prompts and check everything against the run; writes nothing.

    Args:
        run: The run, new or not.
        given: Settings of `SampleConfig` given now; the run's own fill the rest.

    Raises:
        GradvarError: Bad input, or a change of the run's identity.
    """
    config = agreed_config(run, SampleConfig, given)
    stored = run.stored(SampleConfig)
    if config.engine == IMPORTED and stored.get("engine") != IMPORTED:
        raise GradvarError("--engine: expected vllm, transformers or auto, received 'imported'; use --from FILE")
    config = _settled(replace(config, rollouts=max(config.rollouts, stored.get("rollouts", 0))))
    if given.get("prompt_ids") and given.get("n_prompts") is None:
        config = replace(config, n_prompts=None)  # what was asked for last time gives way
    elif given.get("n_prompts") is not None and not given.get("prompt_ids"):
        config = replace(config, prompt_ids=())
    if config.engine == IMPORTED:
        raise GradvarError(
            f"the rollouts of {run.path} were imported: add to them with `gradvar sample RUN --from FILE`"
        )
    check_engine(config.engine)
    folder = find_model(config.model, config.revision)
    agree_on_model(run, config.model, digest := folder.weights_hash())
    tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    if config.prompts is None:
        raise GradvarError("no prompts given: expected --prompts with a jsonl, json, parquet or csv file")
    problems = read_problems(
        Path(config.prompts), prompt_column=config.prompt_column, answer_column=config.answer_column
    )
    chosen = select_problems(
        problems.problems,
        n_prompts=config.n_prompts,
        prompt_ids=config.prompt_ids or None,
        rng=np.random.default_rng(config.seed),
    )
    template = resolve_template(config.template, tokenizer)
    asked = build_prompts(
        chosen,
        template,
        tokenizer,
        max_positions=folder.max_positions(config.trust_remote_code),
        max_tokens=config.max_tokens,
    )
    return Preparation(
        config=config,
        folder=folder,
        weights_hash=digest,
        prompts=agreed_prompts(run, asked),
        problems_read={
            "file": config.prompts,
            "schema": problems.schema,
            "problems": len(problems.problems),
            "chosen": len(asked),
            "template": template.name,
        },
    )


def sample(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> None:
    """Sample what is missing: every prompt gets its rollouts, finished prompts stay as they are.

    Args:
        run: The run, new or not.
        given: Settings of `SampleConfig` given now; the run's own fill the rest.
        listener: Who is told.

    Raises:
        GradvarError: Bad input, a change of the run's identity, or a sampler that died.
    """
    listener = listener or Silent()
    ready = prepare(run, given)
    config, folder, prompts, digest = ready.config, ready.folder, ready.prompts, ready.weights_hash
    read = ready.problems_read
    if (given.get("rollouts") or config.rollouts) < config.rollouts:
        listener.say(f"the run holds {config.rollouts} rollouts a prompt: they stay, none is taken away")
    listener.say(
        f"{read['file']}: {read['schema']}, {read['problems']} problems, {read['chosen']} chosen, "
        f"template {read['template']}"
    )
    run.info["model"] = {"path": config.model, "revision": folder.revision, "weights_sha256": digest}
    run.begin("sample", config, device=config.device)
    run.write_prompts(prompts)
    rank = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
    requests, kept = [], {}
    for prompt in prompts:
        path = run.file("rollouts", prompt.prompt_id)
        kept[prompt.prompt_id] = run.rollouts(prompt.prompt_id) if path.exists() else []
        have = len(kept[prompt.prompt_id])
        if have < config.rollouts:
            seed = prompt_seed(config.seed, _row(prompt, rank[prompt.prompt_id]), have)
            requests.append(
                SamplingRequest(prompt=prompt, count=config.rollouts - have, first_rollout_id=have, seed=seed)
            )
    total, missing = config.rollouts * len(prompts), sum(request.count for request in requests)
    if requests:
        listener.say(
            f"sampling {missing} rollouts of {counted(len(requests), 'prompt')} with {config.engine} on {config.device}"
        )
    settings = SamplingSettings(
        model=folder,
        dtype=config.dtype,
        device=config.device,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        trust_remote_code=config.trust_remote_code,
        log_file=run.path / "vllm.log",
    )

    def land(request: SamplingRequest, rollouts: list[Rollout]) -> None:
        name = request.prompt.prompt_id
        run.write_rollouts(name, [*kept[name], *rollouts])
        run.log("rollouts written", prompt_id=name, count=len(kept[name]) + len(rollouts))

    if requests:
        with listener.task("sample", total, total - missing) as advance:
            sample_with(config.engine, settings, requests, on_prompt=land, on_progress=advance)
    run.finish("sample", prompts=len(prompts), rollouts=total, problems=read)


def import_rollouts(run: Run, source: Path, given: Mapping[str, Any], listener: Listener | None = None) -> None:
    """Take rollouts that were made elsewhere, with their rewards where the file holds them.

    Args:
        run: The run, new or not.
        source: parquet or jsonl with prompt and response token ids.
        given: Settings of `SampleConfig` given now: the model, the temperature.
        listener: Who is told.

    Raises:
        GradvarError: Bad input, ids that do not fit the model, or rollouts that contradict those in the run.
    """
    listener = listener or Silent()
    config = agreed_config(run, SampleConfig, {**given, "engine": None})
    if run.stored(SampleConfig) and config.engine != IMPORTED:
        raise GradvarError(f"the rollouts of {run.path} were sampled by {config.engine}: import into a new run folder")
    folder = find_model(config.model, config.revision)
    agree_on_model(run, config.model, digest := folder.weights_hash())
    tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    imported = read_rollouts(
        source,
        vocab_size=folder.vocab_size(config.trust_remote_code),
        max_positions=folder.max_positions(config.trust_remote_code),
        tokenizer=tokenizer,
        end_token_ids=end_token_ids(folder.path, tokenizer),
    )
    device = resolve_device(config.device)
    for one in imported:
        if len(one.rollouts) < 2:
            raise GradvarError(
                f"{source}: prompt {one.prompt.prompt_id!r} has 1 rollout, expected at least 2 (a variance needs two)"
            )
    longest = max(len(rollout.token_ids) for one in imported for rollout in one.rollouts)
    before = run.stored(SampleConfig)
    config = replace(
        config,
        prompts=str(source),
        rollouts=max(before.get("rollouts", 0), *(len(one.rollouts) for one in imported)),
        device=device,
        dtype=resolve_dtype(config.dtype, device),
        max_tokens=config.max_tokens if given.get("max_tokens") else max(before.get("max_tokens", 0), longest),
    )
    config = _as_imported(config)
    prompts = agreed_prompts(run, [one.prompt for one in imported])
    for one in imported:
        _agree_on_rollouts(run, one)
    run.info["model"] = {"path": config.model, "revision": folder.revision, "weights_sha256": digest}
    run.begin("sample", config, device=device)
    run.write_prompts(prompts)
    for one in imported:
        name = one.prompt.prompt_id
        run.write_rollouts(name, one.rollouts)
        if one.rewards is not None:
            label = (rollouts_digest(one.rollouts), IMPORTED)
            ids = [rollout.rollout_id for rollout in one.rollouts]
            run.write_rewards(name, ids, np.asarray(one.rewards, dtype=np.float64), label=label)
    count = sum(len(one.rollouts) for one in imported)
    listener.say(f"imported {count} rollouts of {counted(len(imported), 'prompt')} from {source}")
    run.finish("sample", prompts=len(prompts), rollouts=count)


def _settled(config: SampleConfig) -> SampleConfig:
    device = resolve_device(config.device)
    engine = default_engine() if config.engine == "auto" else config.engine
    return replace(config, device=device, dtype=resolve_dtype(config.dtype, device), engine=engine)


def _as_imported(config: SampleConfig) -> SampleConfig:
    return replace(config, engine=IMPORTED, template="none")


def _agree_on_rollouts(run: Run, one: ImportedPrompt) -> None:
    name = one.prompt.prompt_id
    if not run.file("rollouts", name).exists():
        return
    kept = run.rollouts(name)
    if rollouts_digest(one.rollouts[: len(kept)]) != rollouts_digest(kept):
        raise GradvarError(
            f"{run.path} holds other rollouts of prompt {name!r}: kept ones may not change; "
            "import into a new run folder"
        )


def _row(prompt: Prompt, index: int) -> int:
    return int(prompt.prompt_id) if prompt.prompt_id.isdecimal() else index
