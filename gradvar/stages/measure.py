"""Stage measure: rollouts to score Grams and policy log-probabilities, one prompt at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.gradients import (
    NonFiniteError,
    ScoreMeasurement,
    SketchPlan,
    measure_finite,
    measure_scores,
    resolve_targets,
)
from gradvar.models import find_model, load_model
from gradvar.runs import (
    MeasureConfig,
    Measures,
    PrefixNorms,
    Prompt,
    Rollout,
    Run,
    SampleConfig,
    TauEstimate,
    rollouts_digest,
)
from gradvar.runs.records import counted
from gradvar.stages.batch import sketch_error_line, sketch_errors
from gradvar.stages.cross import measure_cross
from gradvar.stages.groups import left_out_line
from gradvar.stages.identity import agree_on_model, agreed_config, measured_attention
from gradvar.stages.listener import Advance, Listener, Silent


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is missing of one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]
    """All that the run holds of the prompt."""
    fresh: bool
    """Whether the Grams and measures in the run belong to these rollouts, so that they are kept."""
    left_out: Mapping[int, str]
    """Rollouts left out so far; they stay out."""
    grams: list[str]
    """Targets whose Gram is missing."""
    taus: list[str]
    """Targets whose taus are missing, or were made with other probes."""
    prefixes: list[str]
    """Targets whose prefix norms are missing, or were made at another number of lengths."""
    sketches: list[str]
    """Targets whose sketches are missing, or were made with another seed or dimension."""

    @property
    def targets(self) -> list[str]:
        """Targets that the model has to be run for."""
        return list(dict.fromkeys([*self.grams, *self.taus, *self.prefixes, *self.sketches]))

    @property
    def kept(self) -> list[Rollout]:
        """The rollouts to measure."""
        return [rollout for rollout in self.rollouts if rollout.rollout_id not in self.left_out]

    def options(self, config: MeasureConfig, temperature: float) -> dict[str, Any]:
        """Return how the engine is to measure this prompt: arguments of `measure_scores`."""
        kept = self.kept
        return {
            "loss_masks": None if all(r.loss_mask is None for r in kept) else [_mask(r) for r in kept],
            "temperature": temperature,
            "include_bias": config.include_bias,
            "token_budget": config.token_budget,
            "memory_budget": _bytes(config.memory_budget),
            "host_memory_budget": _bytes(config.host_memory_budget),
            "rollout_ids": [rollout.rollout_id for rollout in kept],
            "probes": config.probes if self.taus else 0,
            "seed": config.seed,
            "prefixes": config.prefixes if self.prefixes else 0,
            "sketch": SketchPlan(dimension=config.sketch_dim, seed=config.seed) if self.sketches else None,
            "checkpointing": config.checkpointing,
            "packing": config.packing,
        }


@dataclass(frozen=True, kw_only=True)
class MeasuringPlan:
    """What `measure` is about to do: the settings, the model, what is missing."""

    config: MeasureConfig
    made: SampleConfig
    model: Any
    targets: list[str]
    """Keys of the targets asked for now."""
    work: list[Work]
    """By prompt; nothing missing is told by an empty `targets`."""


def measure(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> None:
    """Measure what is missing: Grams of new prompts, grown prompts and new targets, taus and prefixes asked for now.

    Args:
        run: A run with rollouts.
        given: Settings of `MeasureConfig` given now, and `device`.
        listener: Who is told.

    Raises:
        GradvarError: No rollouts, targets that match nothing, or a gradient that is not finite.
    """
    listener = listener or Silent()
    ready = find_work(run, given)
    made, config = ready.made, ready.config
    before = run.stored(MeasureConfig)
    if before:  # targets are additive: the run keeps the specs it was measured on
        config = replace(config, targets=tuple(dict.fromkeys([*before["targets"], *config.targets])))
    run.begin("measure", config, device=made.device)
    total = sum(len(work.rollouts) for work in ready.work)
    done = sum(len(work.rollouts) for work in ready.work if not work.targets)
    unheld: dict[str, str] = {}
    in_batches: list[str] = []
    changed = False
    if done < total:
        listener.say(f"measuring {total - done} responses on {', '.join(ready.targets)} ({made.dtype}, {made.device})")
    with listener.task("measure", total, done) as advance:
        for work in ready.work:
            if work.targets:
                measured = _measure_prompt(run, config, made, ready.model, work, advance)
                unheld |= measured.unheld
                if measured.changed_in_batches and not changed:
                    changed = True
                    _say_changed(run, listener, work.prompt.prompt_id, in_batches)
                in_batches.append(work.prompt.prompt_id)
    if config.cross == "exact":
        measure_cross(run, config, made, ready.model, [work.prompt for work in ready.work], ready.targets, listener)
    if (line := left_out_line(run)) is not None:
        listener.warn(line)
    if unheld:
        _say_unheld(run, listener, unheld)
    if config.cross == "sketch":
        errors = sketch_errors(run)
        for target, error in errors.items():
            run.log("sketch checked", target=target, measured=error.measured, stated=error.stated)
        listener.say(sketch_error_line(errors))
    attention = str(getattr(ready.model.config, "_attn_implementation", "unknown"))
    run.finish("measure", targets=ready.targets, dtype=made.dtype, attention=attention, bias=config.include_bias)


def find_work(run: Run, given: Mapping[str, Any]) -> MeasuringPlan:
    """Return what measuring with these settings would do; writes nothing. Loads the model.

    Raises:
        GradvarError: As in `measure`.
    """
    config = agreed_config(run, MeasureConfig, given)
    made = run.config(SampleConfig)
    prompts = [prompt for prompt in run.prompts() if run.file("rollouts", prompt.prompt_id).exists()]
    if not prompts:
        raise GradvarError(f"{run.path} holds no rollouts: run `gradvar sample {run.path}` first")
    folder = find_model(made.model, made.revision)
    agree_on_model(run, made.model, folder.weights_hash())
    known = measured_attention(run)
    if known is not None and config.attention not in ("auto", known):
        raise GradvarError(
            f"{run.path} was measured with {known} attention, received --attention {config.attention}: one run holds "
            "one; leave the option out, or choose a new run folder"
        )
    model = load_model(
        folder, dtype=made.dtype, device=made.device, trust_remote_code=made.trust_remote_code,
        attention=known or config.attention,
    )  # fmt: skip
    config = replace(config, attention=str(getattr(model.config, "_attn_implementation", "auto")))
    targets = [target.key for target in resolve_targets(model, list(config.targets))]
    work = [_missing(run, config, prompt, targets) for prompt in prompts]
    return MeasuringPlan(config=config, made=made, model=model, targets=targets, work=work)


def _missing(run: Run, config: MeasureConfig, prompt: Prompt, targets: Sequence[str]) -> Work:
    name = prompt.prompt_id
    rollouts = run.rollouts(name)
    there = run.file("measures", name).exists() and run.file("grams", name).exists()
    fresh = there and run.grams_label(name) == rollouts_digest(rollouts)
    have = list(run.grams(name)) if run.file("grams", name).exists() else []
    measures = run.measures(name) if fresh else None
    grams = [key for key in targets if key not in have] if fresh else list(dict.fromkeys([*have, *targets]))
    asked = targets if fresh else grams  # what is done again is done whole
    taus, prefixes, sketches = [], [], []
    made = run.sketches(name) if fresh else {}
    for key in asked:
        tau = measures.taus.get(key) if measures else None
        if config.probes and (tau is None or (tau.probes, tau.seed) != (config.probes, config.seed)):
            taus.append(key)
        norms = measures.prefixes.get(key) if measures else None
        if config.prefixes and (norms is None or norms.count != config.prefixes):
            prefixes.append(key)
        sketch = made.get(key)
        if config.cross == "sketch" and (
            sketch is None or (sketch.dimension, sketch.seed) != (config.sketch_dim, config.seed)
        ):
            sketches.append(key)
    return Work(
        prompt=prompt,
        rollouts=rollouts,
        fresh=fresh,
        left_out=measures.left_out if measures else {},
        grams=grams,
        taus=taus,
        prefixes=prefixes,
        sketches=sketches,
    )


def _measure_prompt(
    run: Run, config: MeasureConfig, made: SampleConfig, model: Any, work: Work, advance: Advance
) -> ScoreMeasurement:
    """Measure and write what is missing of one prompt."""
    name, kept = work.prompt.prompt_id, work.kept
    seen = 0

    def progress(done: int) -> None:  # the engine counts up, the listener takes steps
        nonlocal seen
        advance(max(0, done - seen))
        seen = max(seen, done)

    request = (model, list(work.prompt.token_ids), [list(rollout.token_ids) for rollout in kept], work.targets)
    options = {**work.options(config, made.temperature), "on_progress": progress}
    try:
        if config.leave_out_non_finite:
            measured, left_out = measure_finite(*request, **options)
        else:
            measured, left_out = measure_scores(*request, **options), {}
    except NonFiniteError as error:
        raise GradvarError(f"prompt {name!r}: {error}; --leave-out-non-finite goes on without them") from error
    except GradvarError as error:
        raise GradvarError(f"prompt {name!r}: {error}") from error
    advance(len(work.rollouts) - seen)  # those left out too
    old = run.measures(name) if work.fresh else None
    run.write_measures(name, _measures(work, measured, {**work.left_out, **left_out}, old))
    new = {key: measured.grams[key] for key in work.grams}
    grams = {**(run.grams(name) if work.fresh else {}), **new}
    if new or not work.fresh:
        ids = [rollout.rollout_id for rollout in work.rollouts]
        run.write_grams(name, grams, rollouts_digest=rollouts_digest(work.rollouts), rollout_ids=ids)
    if work.sketches:
        made_now = {key: measured.sketches[key] for key in work.sketches}
        sketches = {**(run.sketches(name) if work.fresh else {}), **made_now}
        run.write_sketches(name, sketches, rollouts_digest=rollouts_digest(work.rollouts))
    for rollout_id, why in left_out.items():
        run.log("response left out", prompt_id=name, rollout_id=rollout_id, why=why)
    run.log("measured", prompt_id=name, grams=list(new), taus=work.taus, prefixes=work.prefixes)
    return measured


def _say_unheld(run: Run, listener: Listener, unheld: Mapping[str, str]) -> None:
    """Say whose gradients could not be held against autograd, and why."""
    run.log("not held against autograd", targets=unheld)
    key, why = next(iter(unheld.items()))
    listener.warn(
        f"{counted(len(unheld), 'target')} not held against autograd's own gradient: {key} ({why})"
        + (f" and {len(unheld) - 1} more, in log.jsonl" if len(unheld) > 1 else "")
    )


def _say_changed(run: Run, listener: Listener, prompt_id: str, before: Sequence[str]) -> None:
    """Say that batches change responses, and which prompts were measured in batches until it showed."""
    run.log("changed in batches", prompt_id=prompt_id, measured_before=list(before))
    listener.warn(
        f"prompt {prompt_id!r}: a batch changes what a response gives, so each is measured alone from here on"
        + (
            f"; {counted(len(before), 'prompt')} measured in batches before may be off (in log.jsonl): measure them "
            "again in a new run folder with --token-budget 1"
            if before
            else ""
        )
    )


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 2**30)


def _mask(rollout: Rollout) -> list[int]:
    return [1] * len(rollout.token_ids) if rollout.loss_mask is None else list(rollout.loss_mask)


def _measures(work: Work, measured: ScoreMeasurement, left_out: Mapping[int, str], old: Measures | None) -> Measures:
    """Return the prompt's measures: the old ones with what is new, or all of them."""
    ids = next(iter(measured.grams.values())).rollout_ids
    place = {rollout.rollout_id: row for row, rollout in enumerate(work.rollouts)}
    rows = [place[name] for name in ids]

    def spread(values: NDArray[Any]) -> NDArray[Any]:  # what was left out has no value
        whole = np.full((len(work.rollouts), *values.shape[1:]), np.nan)
        whole[rows] = values
        return whole

    taus = {
        key: replace(measured.taus[key], value=spread(measured.taus[key].value), error=spread(measured.taus[key].error))
        for key in work.taus
    }
    prefixes = {}
    for key in work.prefixes:
        norms = measured.prefixes[key]
        lengths = np.zeros((len(work.rollouts), norms.count), dtype=np.int64)
        lengths[rows] = norms.lengths
        prefixes[key] = PrefixNorms(target=key, lengths=lengths, value=spread(norms.value))
    if old is not None:
        return replace(
            old, taus={**old.taus, **taus}, prefixes={**old.prefixes, **prefixes}, left_out=dict(left_out)
        )  # fmt: skip
    return _new_measures(work.rollouts, measured, rows, taus, prefixes, left_out)


def _new_measures(
    rollouts: Sequence[Rollout],
    measured: ScoreMeasurement,
    rows: Sequence[int],
    taus: Mapping[str, TauEstimate],
    prefixes: Mapping[str, PrefixNorms],
    left_out: Mapping[int, str],
) -> Measures:
    logprobs = [np.full(len(rollout.token_ids), np.nan, dtype=np.float32) for rollout in rollouts]
    entropy, proxy = np.full(len(rollouts), np.nan), np.full(len(rollouts), np.nan)
    for k, row in enumerate(rows):
        mask = np.array(_mask(rollouts[row]), dtype=np.float64)
        logprobs[row] = measured.logprobs[k].astype(np.float32)
        entropy[row] = mask @ measured.entropy[k]
        proxy[row] = mask @ (1 - 2 * np.exp(measured.logprobs[k].astype(np.float64)) + measured.collision[k])
    return Measures(
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        policy_logprobs=logprobs,
        entropy=entropy,
        proxy=proxy,
        taus=taus,
        prefixes=prefixes,
        left_out=left_out,
    )
