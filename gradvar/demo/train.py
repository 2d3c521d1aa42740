"""Trains the bundled policy on search traces and measures it: `python -m gradvar.demo.train`.

Everything is seeded. With the same number of steps, threads and packages on the same kind of processor the weights
come out the same; with `--minutes` the number of steps depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from gradvar.demo.batches import IGNORED_LABEL, Batch, trace_batches
from gradvar.demo.countdown import CountdownProblem
from gradvar.demo.measure import measure_prompt, summarise
from gradvar.demo.policy_model import MAX_POSITIONS, build_policy
from gradvar.demo.prompts import TEMPLATE, write_problems
from gradvar.demo.tokenizer import build_tokenizer
from gradvar.demo.traces import search_problems
from gradvar.demo.train_settings import TrainSettings, split_problems

_MAX_RESPONSE = 1024


def train(settings: TrainSettings, folder: Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and measures a policy; writes `policy/`, `problems.jsonl` and `template.txt` into a folder.

    Args:
        settings: How.
        folder: Where; made if it is missing.
        say: Takes one line of progress at a time.

    Returns:
        The card, as `policy/card.json` holds it.
    """
    policy_folder = folder / "policy"
    policy_folder.mkdir(parents=True, exist_ok=True)
    held_out, problems = split_problems(settings)
    write_problems(folder / "problems.jsonl", held_out)
    (folder / "template.txt").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = build_tokenizer(max_length=MAX_POSITIONS)
    tokenizer.save_pretrained(policy_folder)
    model = build_policy(settings.size, tokenizer, seed=settings.seed)

    held_out_keys = {problem.key for problem in held_out}
    easier = [problem for problem in search_problems(settings.short_traces()) if problem.key not in held_out_keys]
    short, full = (
        trace_batches(
            stage_problems,
            tokenizer,
            template=TEMPLATE,
            settings=traces,
            tokens_per_batch=settings.tokens_per_batch,
            rng=np.random.default_rng(np.random.SeedSequence((settings.seed, stream))),
        )
        for stream, traces, stage_problems in (
            (1, settings.short_traces(), easier),
            (2, settings.traces, problems),
        )
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    say(f"{parameters} parameters, {len(easier)} and {len(problems)} problems to train on, {len(held_out)} held out")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        training = _fit(model, settings, short, full, checkpoint=policy_folder, say=say)
        held_out_regime = _measure(model, tokenizer, settings, held_out, say=say)
    finally:
        torch.set_num_threads(threads_before)
    card = {
        "what": "A Qwen2-architecture policy trained on random search traces for CountDown (gradvar.demo.train).",
        "parameters": parameters,
        "training": {"settings": asdict(settings), **training},
        "prompt": {"template": TEMPLATE, "nums": "joined by one space"},
        "held_out": held_out_regime,
    }
    (policy_folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m gradvar.demo.train", description=__doc__)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument("--minutes", type=float, help="training time in minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--measured-prompts", type=int, default=16)
    parser.add_argument("--measured-responses", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this package")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("out")
    card = train(TrainSettings(**options), folder, say=lambda line: print(line, flush=True))
    summary = {key: value for key, value in card["held_out"].items() if key != "by_prompt"}
    print(json.dumps(summary, indent=1))


def _fit(
    model: transformers.Qwen2ForCausalLM,
    settings: TrainSettings,
    short: Iterator[Batch],
    full: Iterator[Batch],
    *,
    checkpoint: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains the model, saving it now and then and at the end; returns what the card says about the training."""
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    start, step, tokens, smooth_loss = time.monotonic(), 0, 0, float("nan")
    while (progress := settings.progress(step=step, seconds=time.monotonic() - start)) < 1:
        factor = min(1.0, (step + 1) / settings.warmup_steps) * max(0.02, 1 - progress)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * factor
        batch = next(short if progress < settings.short_share else full)
        loss = _step(model, optimiser, batch, bfloat16=settings.bfloat16)
        step += 1
        tokens += batch.token_ids.numel()
        smooth_loss = loss if step == 1 else 0.98 * smooth_loss + 0.02 * loss
        if step % 50 == 0:
            seconds = time.monotonic() - start
            say(f"step {step}, {progress:.0%}: loss {smooth_loss:.4f} nats, {tokens / seconds:.0f} tokens/s")
        if step % settings.checkpoint_steps == 0:
            model.save_pretrained(checkpoint)
    seconds = time.monotonic() - start
    model.save_pretrained(checkpoint)
    return {
        "steps": step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "final_loss_nats_per_token": smooth_loss,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _measure(
    model: transformers.Qwen2ForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    settings: TrainSettings,
    held_out: Sequence[CountdownProblem],
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Samples responses to the first held-out problems; returns what the card says about them."""
    model.eval()
    measured = []
    for index, problem in enumerate(held_out[: settings.measured_prompts]):
        measured.append(
            measure_prompt(
                model,
                tokenizer,
                problem,
                template=TEMPLATE,
                count=settings.measured_responses,
                max_tokens=_MAX_RESPONSE,
                seed=settings.seed + index,
            )
        )
        say(str(measured[-1]))
    return {"temperature": 1.0, "max_tokens": _MAX_RESPONSE, **summarise(measured)}


def _step(
    model: transformers.Qwen2ForCausalLM, optimiser: torch.optim.Optimizer, batch: Batch, *, bfloat16: bool
) -> float:
    """Takes one step down the mean loss of the responses' tokens; returns that loss [nats a token]."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=batch.token_ids, use_cache=False).logits
    loss = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
