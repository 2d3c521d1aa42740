"""Finished runs of simulated gradients, made by the public writers: what benchmarks and tests of the estimates read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradvar.runs import (
    GradientSketch,
    MeasureConfig,
    Measures,
    PrefixNorms,
    Prompt,
    PromptScores,
    Rollout,
    Run,
    SampleConfig,
    ScoreGram,
    TauEstimate,
    create_run,
    rollouts_digest,
)

MAX_TOKENS = 1024
RANK = 20
"""Dimensions of the simulated gradients."""


def simulated_prompt(
    name: str,
    n: int,
    targets: Sequence[str],
    *,
    beta: float = 1.0,
    signal: float = 1.5,
    success: float = 0.4,
    rng: np.random.Generator,
) -> list[PromptScores]:
    """One prompt on every target: Var(s | L) = (L/150)^beta C, binary rewards, E[s | r] along the quietest axis.

    Args:
        name: The prompt's id.
        n: Responses.
        targets: Names; each has gradients of its own for the same responses.
        beta: Exponent of the variance law.
        signal: Length of the mean gradient's step between a wrong and a right response.
        success: Share of reward 1.
        rng: Draws everything.
    """
    lengths = np.clip(np.round(150.0 * np.exp(rng.normal(0.0, 0.6, n))), 2, MAX_TOKENS)
    rewards = (rng.random(n) < success).astype(np.float64)
    scale = 0.8 ** np.arange(RANK)
    found = []
    for target in targets:
        scores = rng.normal(size=(n, RANK)) * scale / np.linalg.norm(scale)
        scores *= np.sqrt((lengths / 150.0) ** beta)[:, None]
        scores[:, -1] += signal * (rewards - success)
        found.append(
            PromptScores(
                prompt_id=name,
                target=target,
                gram=scores @ scores.T,
                rewards=rewards,
                lengths=lengths,
                truncated=lengths >= 500,
                max_length=MAX_TOKENS,
            )
        )
    return found


def write_run(
    path: Path, prompts: Sequence[Sequence[PromptScores]], *, texts: Sequence[str] | None = None, probed: bool = False
) -> Run:
    """Write a run whose estimates are those of the given prompts; tokens and log-probabilities are made up.

    Args:
        path: New folder.
        prompts: One prompt a row, its targets in it.
        texts: What the prompts say; their ids where None.
        probed: Whether tau (the whole squared norm, give or take a tenth) and prefix norms (growing as the length to
            the power 1.5) are in it.
    """
    run = create_run(path)
    run.begin(
        "sample", SampleConfig(model="simulated", max_tokens=MAX_TOKENS, rollouts=max(2, len(prompts[0][0].lengths)))
    )
    spoken = texts or [f"prompt {targets[0].prompt_id}" for targets in prompts]
    run.write_prompts(
        [
            Prompt(prompt_id=targets[0].prompt_id, text=text, token_ids=(1, 2, 3))
            for targets, text in zip(prompts, spoken, strict=True)
        ]
    )
    for number, targets in enumerate(prompts):
        first, rng = targets[0], np.random.default_rng([7, number])
        rollouts = [
            Rollout(
                rollout_id=i,
                token_ids=tuple(rng.integers(0, 1000, int(length)).tolist()),
                text="",
                finish_reason="length" if cut else "stop",
            )
            for i, (length, cut) in enumerate(zip(first.lengths, first.truncated, strict=True))
        ]
        run.write_rollouts(first.prompt_id, rollouts)
        ids = tuple(range(len(rollouts)))
        digest = rollouts_digest(rollouts)
        run.write_rewards(first.prompt_id, ids, first.rewards, label=(digest, "simulated"))
        logprobs = [-rng.exponential(0.5, int(length)).astype(np.float32) for length in first.lengths]
        run.write_measures(
            first.prompt_id,
            Measures(
                rollout_ids=ids,
                policy_logprobs=logprobs,
                entropy=np.array([0.5 * len(values) + rng.normal() for values in logprobs]),
                proxy=np.array([float((1.0 - np.exp(values)).sum()) for values in logprobs]),
                taus={one.target: _tau(one, rng) for one in targets} if probed else {},
                prefixes={one.target: _prefixes(one) for one in targets} if probed else {},
            ),
        )
        grams = {
            one.target: ScoreGram(
                target=one.target,
                matrix=one.gram,
                rollout_ids=ids,
                dtype="float64",
                include_bias=True,
                temperature=1.0,
            )
            for one in targets
        }
        run.write_grams(first.prompt_id, grams, rollouts_digest=digest)
    run.finish("sample")
    run.begin("reward")
    run.finish("reward")
    run.begin("measure", MeasureConfig(targets=tuple(one.target for one in prompts[0])))
    run.finish("measure", targets=[one.target for one in prompts[0]])
    return run


def write_sketches(run: Run, prompts: Sequence[Sequence[PromptScores]], *, dimension: int = 4096) -> None:
    """Write sketches as `--cross sketch` does, of gradients whose products within a prompt are its Gram's.

    How prompts lie to one another is made up: each prompt's gradients are known from its Gram but for a rotation.
    """
    for targets in prompts:
        made = {}
        for number, one in enumerate(targets):
            values, axes = np.linalg.eigh(one.gram)
            root = axes[:, -RANK:] * np.sqrt(np.maximum(values[-RANK:], 0.0))
            signs = np.random.default_rng([11, number]).choice([-1.0, 1.0], (root.shape[1], dimension))
            matrix = (root @ signs / np.sqrt(dimension)).astype(np.float32)
            ids = tuple(range(len(matrix)))
            made[one.target] = GradientSketch(
                target=one.target, matrix=matrix, rollout_ids=ids, seed=0, parts=8, include_bias=True
            )
        name = targets[0].prompt_id
        run.write_sketches(name, made, rollouts_digest=rollouts_digest(run.rollouts(name)))


def _tau(one: PromptScores, rng: np.random.Generator) -> TauEstimate:
    norms = np.diagonal(one.gram)
    error = 0.1 * norms
    return TauEstimate(
        target=one.target, value=norms + error * rng.normal(size=len(norms)), error=error, probes=4, seed=0
    )


def _prefixes(one: PromptScores) -> PrefixNorms:
    lengths = np.maximum(np.round(one.lengths[:, None] * np.array([0.25, 0.5, 1.0])), 1).astype(np.int64)
    shares = (lengths / one.lengths[:, None]) ** 1.5
    return PrefixNorms(target=one.target, lengths=lengths, value=np.diagonal(one.gram)[:, None] * shares)
