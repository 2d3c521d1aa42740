"""Part of stage measure: exact inner products between responses to different prompts, all prompts at one time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradvar.errors import GradvarError
from gradvar.gradients import cross_grams
from gradvar.runs import CrossGrams, MeasureConfig, Prompt, Run, SampleConfig
from gradvar.stages.listener import Listener


def measure_cross(
    run: Run,
    config: MeasureConfig,
    made: SampleConfig,
    model: Any,
    prompts: Sequence[Prompt],
    targets: Sequence[str],
    listener: Listener,
) -> None:
    """Measure the exact products that are missing: all again where a prompt or a response is new, else new targets.

    Args:
        run: A run whose prompts were measured.
        config: How to measure.
        made: How the rollouts were made.
        model: The policy.
        prompts: The prompts.
        targets: Keys of the targets.
        listener: Who is told.

    Raises:
        GradvarError: They do not fit the memory budget.
    """
    kept = {prompt.prompt_id: _in_all(run, prompt.prompt_id) for prompt in prompts}
    digests = {name: str(run.grams_label(name)) for name in kept}
    names = tuple((name, rollout_id) for name, ids in kept.items() for rollout_id in ids)
    there = run.cross_grams()
    if there is not None and (there.responses, dict(there.digests)) != (names, digests):
        there = None
    missing = [key for key in targets if there is None or key not in there.matrices]
    if not missing:
        return
    rollouts = [[r for r in run.rollouts(name) if r.rollout_id in set(ids)] for name, ids in kept.items()]
    with listener.task("cross", len(names)) as advance:
        seen = 0

        def progress(done: int) -> None:  # the engine counts up, the listener takes steps
            nonlocal seen
            advance(max(0, done - seen))
            seen = max(seen, done)

        try:
            found = cross_grams(
                model,
                [list(prompt.token_ids) for prompt in prompts],
                [[list(r.token_ids) for r in of_prompt] for of_prompt in rollouts],
                missing,
                loss_masks=[[r.loss_mask for r in of_prompt] for of_prompt in rollouts],
                temperature=made.temperature,
                include_bias=config.include_bias,
                token_budget=config.token_budget,
                memory_budget=None if config.memory_budget is None else int(config.memory_budget * 2**30),
                on_progress=progress,
                checkpointing=config.checkpointing,
            )
        except GradvarError as error:
            raise GradvarError(f"--cross exact: {error}; --cross sketch takes one prompt at a time") from error
    matrices = {**(there.matrices if there is not None else {}), **found}
    run.write_cross_grams(
        CrossGrams(matrices=matrices, responses=names, digests=digests, include_bias=config.include_bias)
    )
    run.log("products between prompts measured", responses=len(names), targets=missing)


def _in_all(run: Run, prompt_id: str) -> tuple[int, ...]:
    """Return the rollouts that every Gram of the prompt holds."""
    grams = list(run.grams(prompt_id).values())
    common = set.intersection(*[set(gram.rollout_ids) for gram in grams])
    return tuple(name for name in grams[0].rollout_ids if name in common)
