"""Sampling with vLLM, in a process of its own.

The process (`vllm_worker`) ends with the sampling, so the GPU's memory is back before gradients are measured. A JSON
file tells it what to do, and it answers in JSON lines through a pipe, each prompt as soon as it is done; what it logs
goes to a file. Its standard input is a pipe that only this process holds open: when this process is killed, however
hard, the worker reads its end and ends itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any

from gradvar.errors import GradvarError
from gradvar.rollouts.engines.requests import (
    OnProgress,
    OnPrompt,
    SamplingRequest,
    SamplingSettings,
    end_token_ids,
    make_rollout,
)

WORKER_MODULE = "gradvar.rollouts.engines.vllm_worker"

LOWEST_TEMPERATURE = 0.01
"""vLLM samples at this temperature when asked for a lower one, with a line in its log (0.32, SamplingParams)."""
HIGHEST_TEMPERATURE = 2.0
"""vLLM 0.32 refuses higher ones."""


def sample_requests(
    settings: SamplingSettings, requests: Sequence[SamplingRequest], on_prompt: OnPrompt, on_progress: OnProgress
) -> None:
    """Samples all requests together; see `registry.sample`."""
    from gradvar.models import load_tokenizer

    if not LOWEST_TEMPERATURE <= settings.temperature <= HIGHEST_TEMPERATURE:
        raise GradvarError(
            f"--temperature {settings.temperature}: vLLM samples at {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE:g}; "
            "use --engine transformers"
        )
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    end_ids = end_token_ids(settings.model.path, tokenizer)
    finished = 0
    # Closed here and not when the garbage is collected: a caller's exception would keep the worker alive meanwhile.
    with contextlib.closing(_worker_messages(_job(settings, requests, end_ids), settings)) as messages:
        for message in messages:
            if "progress" in message:
                on_progress(message["progress"])
                continue
            request = requests[message["request"]]
            rollouts = [
                make_rollout(request.first_rollout_id + index, token_ids, logprobs, end_ids, tokenizer)
                for index, (token_ids, logprobs) in enumerate(message["responses"])
            ]
            on_prompt(request, rollouts)
            finished += 1
    if finished < len(requests):
        raise GradvarError(f"--engine vllm: expected {len(requests)} prompts from vLLM, received {finished}")


def _job(settings: SamplingSettings, requests: Sequence[SamplingRequest], end_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "engine": {
            "model": str(settings.model.path),
            "dtype": settings.dtype,
            "trust_remote_code": settings.trust_remote_code,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "max_model_len": max(len(request.prompt.token_ids) for request in requests) + settings.max_tokens,
        },
        "sampling": {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "stop_token_ids": list(end_ids),
        },
        "requests": [
            {"prompt_token_ids": list(request.prompt.token_ids), "n": request.count, "seed": request.seed}
            for request in requests
        ],
    }


def _worker_messages(job: dict[str, Any], settings: SamplingSettings) -> Generator[dict[str, Any]]:
    """Runs the worker and yields what it sends; kills whatever is left of it in the end, whatever happens."""
    environment = _environment(settings)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradvar-vllm-")))
        job_file = folder / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        log_file = settings.log_file or folder / "vllm.log"
        log = stack.enter_context(log_file.open("w", encoding="utf-8"))
        read_end, write_end = os.pipe()
        messages: IO[str] = stack.enter_context(os.fdopen(read_end, "r", encoding="utf-8"))
        try:
            worker = subprocess.Popen(
                [sys.executable, "-m", WORKER_MODULE, str(job_file), str(write_end)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        stack.callback(_end, worker)
        for line in messages:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                break  # the worker died while it wrote
            if "error" in message:
                raise GradvarError(
                    f"--engine vllm: {message['error']}{_cause(message['error'], log_file)}{_where(settings)}"
                )
            if "done" in message:
                return
            yield message
        code = worker.wait()
        raise GradvarError(
            f"--engine vllm: its process {_how_it_ended(code)}; finished prompts are kept; its log ends: "
            f"{_tail(log_file)}{_where(settings)}"
        )


def _environment(settings: SamplingSettings) -> dict[str, str]:
    """The worker's environment; what the user has set himself stays."""
    import torch

    from gradvar.models import BALANCED

    environment = dict(os.environ)
    # The worker finds gradvar where this process did, whatever its working directory.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if torch.cuda.is_available():
        if settings.device == "cpu":
            raise GradvarError("--engine vllm --device cpu: a GPU is used here; use --engine transformers for the CPU")
        index = None if settings.device == BALANCED else torch.device(settings.device).index
        if index is not None:
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
        return environment
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(cores))
    # Waiting threads that spin take the cores from each other: thirty times slower where something else runs too.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; the default is 0.9 of the machine's memory
    return environment


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Ends the worker and every process it started (they share its session)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    if worker.stdin is not None:
        with contextlib.suppress(OSError):
            worker.stdin.close()
    worker.wait()


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; often for memory: give a smaller --gpu-memory-utilization or fewer --max-tokens)"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _tail(log_file: Path, characters: int = 400) -> str:
    """Returns the end of the log as one line."""
    with contextlib.suppress(OSError):
        text = " | ".join(line.strip() for line in log_file.read_text("utf-8", "replace").splitlines()[-5:] if line)
        return repr(text[-characters:])
    return "''"


def _cause(error: str, log_file: Path) -> str:
    """Returns the root cause from the log where vLLM's error only says that there is one ("See root cause above")."""
    if "root cause" not in error:
        return ""
    with contextlib.suppress(OSError):
        found = re.findall(r"\b\w+(?:Error|Exception): .+", log_file.read_text("utf-8", "replace"))
        others = [line for line in found if "root cause" not in line]
        return f"; the cause: {others[-1][:400]}" if others else ""
    return ""


def _where(settings: SamplingSettings) -> str:
    return f"; the whole log: {settings.log_file}" if settings.log_file else ""
