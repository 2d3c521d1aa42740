"""The process in which vLLM runs: `python -m gradvar.rollouts.engines.vllm_worker JOB.json FD`.

Started by `vllm_engine`. Reads the job, samples, writes one JSON line a message to the file descriptor:
{"progress": responses}, {"request": index, "responses": [[token_ids, logprobs], ...]}, {"error": text}, {"done": true}.

Facts of vLLM this rests on (read in 0.32): `logprobs_mode="processed_logprobs"` gives log-probabilities at the sampling
temperature (the default, raw, is a nat off at 0.5); `logprobs=0` returns the sampled token's alone; the i-th of n
responses gets the seed `seed + i`; a stop token is kept in `token_ids`; sampling defaults of the model's
generation_config reach only requests without SamplingParams of their own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Any


def main(job_file: str, descriptor: int) -> None:
    """Runs one job."""
    die_with_parent()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    with os.fdopen(descriptor, "w", encoding="utf-8") as messages:
        try:
            _sample(job, messages)
            _send(messages, {"done": True})
        except Exception as error:
            import traceback

            traceback.print_exc()
            _send(messages, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"})


def _sample(job: dict[str, Any], messages: IO[str]) -> None:
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    options = dict(job["engine"])
    if on_cpu:
        options["enforce_eager"] = True  # compiling takes longer than a small model's sampling
        # A prompt may not be split over steps: vLLM then rewinds the request's generator, which on the CPU raises
        # "CPU Generator does not use offset" (0.32, gpu_model_runner._bookkeeping_sync).
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(8192, options["max_model_len"])
    llm = LLM(
        **options,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        seed=0,
    )
    engine = llm.llm_engine

    def add(index: int) -> None:
        request = job["requests"][index]
        params = SamplingParams(
            n=request["n"],
            seed=request["seed"],
            **job["sampling"],
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            min_tokens=0,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=request["prompt_token_ids"]), params)

    def run() -> None:
        running = engine.get_num_unfinished_requests()  # counts responses, not prompts
        while running:
            outputs = engine.step()
            before, running = running, engine.get_num_unfinished_requests()
            if running < before:
                _send(messages, {"progress": before - running})
            for output in outputs:
                if output.finished:
                    _send_request(messages, output)

    # On the CPU a prompt's responses fill the machine, so prompts go one after the other, each from an empty prefix
    # cache: what a prompt gets does not depend on which others are sampled beside it, down to the last bit.
    if on_cpu:
        for index in range(len(job["requests"])):
            add(index)
            run()
            engine.reset_prefix_cache()
    else:
        for index in range(len(job["requests"])):
            add(index)
        run()


def _send_request(messages: IO[str], output: Any) -> None:
    responses = []
    for completion in sorted(output.outputs, key=lambda completion: completion.index):
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a response for the reason {completion.finish_reason!r}")
        token_ids = list(completion.token_ids)
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]
        responses.append([token_ids, logprobs])
    _send(messages, {"request": int(output.request_id), "responses": responses})


def _send(messages: IO[str], message: dict[str, Any]) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


def die_with_parent() -> None:
    """Ends this session's processes when standard input ends, which is when the parent does."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
