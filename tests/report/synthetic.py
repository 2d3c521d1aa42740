"""A small run made of random gradients: no model, no sampling, a second to fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradvar.runs import Measures, Prompt, Rollout, Run, SampleConfig, ScoreGram, create_run, rollouts_digest

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "&lt;b&gt; &amp; &#60;i&#62; \"quotes\" 'single' {{ 7 * 7 }} {% raw %}",
    "nul\x00 bell\x07 escape\x1b[31m delete\x7f c1\x9b",
    "right \u202e to left \u2066 isolate \u200f mark \ufeff",
    "x" * 100_000,
    "]]></svg></style></pre></details><!-- --> </body></html>",
    "lone surrogate comes as \ufffd, tag \U000e0041 and noncharacter \uffff",
)


def synthetic_run(
    path: Path,
    *,
    prompts: int = 3,
    n: int = 27,
    targets: tuple[str, ...] = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
    texts: tuple[str, ...] = ("some text",),
    shift: float = 0.0,
    prompt_text: str = "solve this",
    names: tuple[str, ...] | None = None,
) -> Run:
    """Make a run of random gradients whose variance is proportional to length, with a mean along the reward.

    Args:
        path: A new folder.
        prompts: How many.
        n: Responses a prompt.
        targets: Weight matrices.
        texts: Of the responses, in turn.
        shift: Nats by which the sampler's log-probabilities differ from the policy's.
        prompt_text: Of every prompt.
        names: Of the prompts.
    """
    rng = np.random.default_rng(0)
    run = create_run(path)
    run.info["model"] = {"path": "nowhere/model", "revision": None, "weights_sha256": "0" * 64}
    run.path.mkdir(parents=True, exist_ok=True)
    run.begin("sample", SampleConfig(model="nowhere/model", prompts="problems.jsonl", rollouts=n, max_tokens=400))
    run.finish("sample")
    ids = names or tuple(str(q) for q in range(prompts))
    run.write_prompts([Prompt(prompt_id=name, text=prompt_text, token_ids=(1, 2, 3)) for name in ids])
    for name in ids:
        lengths = np.clip(rng.lognormal(4, 0.6, n).round(), 2, 400).astype(int)
        rewards = (rng.random(n) < 0.4).astype(float)
        rollouts = [
            Rollout(
                rollout_id=i,
                token_ids=tuple(rng.integers(0, 9, length).tolist()),
                text=texts[i % len(texts)],
                finish_reason="length" if length == 400 else "stop",
                sampler_logprobs=tuple((np.full(length, -1.0) + shift).tolist()),
            )
            for i, length in enumerate(lengths)
        ]
        run.write_rollouts(name, rollouts)
        run.write_rewards(name, range(n), rewards, label=(rollouts_digest(rollouts), "test"))
        grams = {}
        for target in targets:
            noise = rng.normal(size=(n, 60)) * np.sqrt(lengths / 60)[:, None]
            noise[:, 0] += 12 * (rewards - rewards.mean())
            grams[target] = ScoreGram(
                target=target,
                matrix=noise @ noise.T,
                rollout_ids=tuple(range(n)),
                dtype="float32",
                include_bias=True,
                temperature=1.0,
            )
        run.write_measures(
            name,
            Measures(
                rollout_ids=tuple(range(n)),
                policy_logprobs=[np.full(length, -1.0, dtype=np.float32) for length in lengths],
                entropy=lengths + rng.normal(size=n) * np.sqrt(lengths),
                proxy=lengths.astype(float),
            ),
        )
        run.write_grams(name, grams, rollouts_digest=rollouts_digest(rollouts))
    return run
