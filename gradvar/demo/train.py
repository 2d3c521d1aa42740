"""Trains the bundled policy on search traces and measures it: `python -m gradvar.demo.train`.

Everything is seeded. With the same number of steps, threads and packages on the same kind of processor the weights
come out the same; with `--minutes` the number of steps depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from gradvar.demo.batches import IGNORED_LABEL, Batch, trace_batches
from gradvar.demo.countdown import CountdownProblem
from gradvar.demo.measure import measure_prompt, summarise
from gradvar.demo.policy_model import MAX_POSITIONS, PolicySize, build_policy
from gradvar.demo.prompts import TEMPLATE, write_problems
from gradvar.demo.tokenizer import build_tokenizer
from gradvar.demo.traces import TraceSettings, search_problems

_MAX_RESPONSE = 1024


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How the policy is trained and measured."""

    steps: int | None = None
    """Optimiser steps; None: until `minutes` are over."""
    minutes: float | None = None
    """Training time [minutes]; None: until `steps` are done."""
    seed: int = 0
    """Seed of problems, traces, initial weights and measured responses."""
    threads: int = 1
    """Threads of torch; more of them wait for one another on a busy machine."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16 while training; the weights stay float32."""
    tokens_per_batch: int = 2000
    """Most tokens in a batch, padding included."""
    learning_rate: float = 3e-3
    """Highest learning rate of AdamW; it falls linearly to a fiftieth."""
    warmup_steps: int = 60
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    short_share: float = 0.4
    """Share of the training, at its beginning, that sees short traces of easier problems only."""
    held_out: int = 64
    """Problems kept out of training."""
    measured_prompts: int = 16
    """Held-out problems measured, from the first on."""
    measured_responses: int = 128
    """Responses sampled to each of them."""
    checkpoint_steps: int = 500
    """Steps between two savings of the weights."""
    size: PolicySize = field(default_factory=PolicySize)
    """The policy's sizes."""
    traces: TraceSettings = field(default_factory=TraceSettings)
    """The problems and the search."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"expected either steps or minutes, received steps={self.steps}, minutes={self.minutes}.")

    def progress(self, *, step: int, seconds: float) -> float:
        """Returns the share of the training that is done."""
        if self.steps is not None:
            return step / self.steps
        return seconds / (60 * (self.minutes or 1.0))

    def short_traces(self) -> TraceSettings:
        """Returns the search of the first part of the training: easier problems and one to six attempts."""
        return TraceSettings(
            number_range=self.traces.number_range,
            target_range=self.traces.target_range,
            chance_range=(self.traces.chance_range[1], 1.0),
            budget_median=4.0,
            budget_sigma=0.5,
            budget_limit=6,
        )


def split_problems(settings: TrainSettings) -> tuple[list[CountdownProblem], list[CountdownProblem]]:
    """Shuffles all problems of the settings and returns those held out and those to train on.

    The numbers within a held-out problem are shuffled as well.
    """
    rng = np.random.default_rng(np.random.SeedSequence((settings.seed, 0)))
    problems = search_problems(settings.traces)
    problems = [problems[i] for i in rng.permutation(len(problems))]
    held_out = [
        CountdownProblem(tuple(problem.nums[i] for i in rng.permutation(len(problem.nums))), problem.target)
        for problem in problems[: settings.held_out]
    ]
    return held_out, problems[settings.held_out :]


def train(settings: TrainSettings, folder: Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and measures a policy; writes `policy/`, `problems.jsonl` and `template.txt` into a folder.

    Args:
        settings: How.
        folder: Where; made if it is missing.
        say: Takes one line of progress at a time.

    Returns:
        The card, as `policy/card.json` holds it.
    """
    torch.set_num_threads(settings.threads)
    policy_folder = folder / "policy"
    policy_folder.mkdir(parents=True, exist_ok=True)
    held_out, problems = split_problems(settings)
    write_problems(folder / "problems.jsonl", held_out)
    (folder / "template.txt").write_text(TEMPLATE, encoding="utf-8")
    held_out_keys = {problem.key for problem in held_out}
    easier = [problem for problem in search_problems(settings.short_traces()) if problem.key not in held_out_keys]
    tokenizer = build_tokenizer(max_length=MAX_POSITIONS)
    tokenizer.save_pretrained(policy_folder)
    model = build_policy(settings.size, tokenizer, seed=settings.seed)
    parameters = sum(weight.numel() for weight in model.parameters())
    say(f"{parameters} parameters, {len(easier)} and {len(problems)} problems to train on, {len(held_out)} held out")

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
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
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
            model.save_pretrained(policy_folder)
    seconds = time.monotonic() - start
    model.save_pretrained(policy_folder)

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
    card = {
        "what": "A Qwen2-architecture policy trained on random search traces for CountDown (gradvar.demo.train).",
        "parameters": parameters,
        "training": {
            "settings": asdict(settings),
            "steps": step,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "final_loss_nats_per_token": smooth_loss,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompt": {"template": TEMPLATE, "nums": "joined by one space"},
        "held_out": {"temperature": 1.0, "max_tokens": _MAX_RESPONSE, **summarise(measured)},
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
