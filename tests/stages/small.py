"""A run on a tiny random model, made without sampling: what the measuring stage needs and nothing more."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from gradvar.models import find_model
from gradvar.runs import Prompt, Rollout, Run, SampleConfig, create_run, rollouts_digest
from tests.rollouts.tiny import make_model_folder

INFINITE, HUGE = 6, 7
"""Token ids: the embedding of the first is infinite; the second overflows the last layer's down_proj alone."""
TOKENS = range(2, 6)
"""Token ids of ordinary responses."""


def make_run(folder, lengths=(5, 9, 3, 7, 6, 8), *, spoil=False, prompts=2, dtype="float32") -> Run:
    """Return a run of `prompts` prompts with responses of these lengths, its rewards, and log-probs of a sampler."""
    model = make_model_folder(folder / "model")
    if spoil:
        _spoil(model)
    run = create_run(folder / "run")
    made = SampleConfig(
        model=str(model), rollouts=len(lengths), max_tokens=16, engine="imported", dtype=dtype, device="cpu"
    )
    found = find_model(str(model))
    run.info["model"] = {"path": str(model), "revision": None, "weights_sha256": found.weights_hash()}
    run.begin("sample", made, device="cpu")
    run.write_prompts([Prompt(prompt_id=str(k), text="ab", token_ids=(2 + k, 3)) for k in range(prompts)])
    for k in range(prompts):
        write_responses(run, str(k), responses(lengths, seed=k))
    run.finish("sample")
    return run


def responses(lengths, seed=0) -> list[list[int]]:
    """Return random token ids of these lengths, none of them special."""
    rng = np.random.default_rng(seed)
    return [[int(token) for token in rng.choice(list(TOKENS), size=length)] for length in lengths]


def write_responses(run, prompt_id, token_ids) -> None:
    """Write these responses with rewards 0, 1, 0.1, 1.1, ... by rollout id and a sampler's log-probs of -1."""
    rollouts = [
        Rollout(
            rollout_id=i,
            token_ids=tuple(ids),
            text="x",
            finish_reason="stop",
            sampler_logprobs=(-1.0,) * len(ids),
            loss_mask=(0, *(1,) * (len(ids) - 1)) if i % 2 else None,
        )
        for i, ids in enumerate(token_ids)
    ]
    run.write_rollouts(prompt_id, rollouts)
    rewards = np.array([i % 2 + 0.1 * (i // 2) for i in range(len(rollouts))])
    label = (rollouts_digest(rollouts), "test")
    run.write_rewards(prompt_id, [r.rollout_id for r in rollouts], rewards, label=label)


@torch.no_grad()
def _spoil(folder) -> None:
    """Dimension 0 of the states is 0 for every token but HUGE; up_proj makes 1e25 of it, which down_proj ignores."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 0.0
    embedding[HUGE, 0] = 1.0
    embedding[INFINITE] = torch.inf
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    mlp = model.model.layers[-1].mlp
    mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 0.0
    mlp.gate_proj.weight[0, 0] = 1.0
    mlp.up_proj.weight[0, 0] = 1e25
    mlp.down_proj.weight[:, 0] = 0.0
    model.save_pretrained(folder)
