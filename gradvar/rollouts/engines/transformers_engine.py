"""Sampling with a transformers model, on any device.

The responses of one prompt are decoded together from one copy of the prompt's key-value cache, with a decoding loop of
our own: `model.generate` merges the model's generation_config into whatever it is given (top_p 0.8, top_k 20 and
repetition_penalty 1.05 for Qwen2.5), keeps finished responses in the batch until the longest one ends, and returns
log-probabilities only with every step's whole vocabulary. Here logits / temperature are all there is, and a response
leaves the batch when it ends. No padding is needed: at any step all responses in the batch have the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradvar.errors import GradvarError
from gradvar.models import load_model, load_tokenizer, token_device
from gradvar.rollouts.engines.requests import (
    OnProgress,
    OnPrompt,
    SamplingRequest,
    SamplingSettings,
    end_token_ids,
    make_rollout,
)


def sample_requests(
    settings: SamplingSettings, requests: Sequence[SamplingRequest], on_prompt: OnPrompt, on_progress: OnProgress
) -> None:
    """Samples the requests one after the other; see `registry.sample`."""
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    end_ids = end_token_ids(settings.model.path, tokenizer)
    model = load_model(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        attention=settings.attn_implementation,
    )
    for request in requests:
        generator = torch.Generator(token_device(model)).manual_seed(request.seed)
        responses: list[tuple[list[int], list[float]]] = []
        while len(responses) < request.count:
            try:
                responses += decode_batch(
                    model,
                    request.prompt.token_ids,
                    min(settings.batch_size, request.count - len(responses)),
                    temperature=settings.temperature,
                    max_tokens=settings.max_tokens,
                    end_ids=end_ids,
                    generator=generator,
                    on_progress=on_progress,
                )
            except torch.OutOfMemoryError as error:
                raise GradvarError(
                    f"prompt {request.prompt.prompt_id}: sampling {settings.batch_size} responses at once does not fit "
                    "into the device's memory; give a smaller --batch-size"
                ) from error
        rollouts = [
            make_rollout(request.first_rollout_id + index, token_ids, logprobs, end_ids, tokenizer)
            for index, (token_ids, logprobs) in enumerate(responses)
        ]
        on_prompt(request, rollouts)


@torch.inference_mode()
def decode_batch(
    model: Any,
    prompt_ids: Sequence[int],
    count: int,
    *,
    temperature: float,
    max_tokens: int,
    end_ids: Sequence[int],
    generator: torch.Generator,
    on_progress: OnProgress,
) -> list[tuple[list[int], list[float]]]:
    """Samples responses of one prompt from softmax(logits / temperature), in float32 whatever the model's dtype.

    Shape letters: B responses still running, V tokens of the vocabulary.

    Args:
        model: A causal LM with a key-value cache.
        prompt_ids: The prompt.
        count: Responses to sample.
        temperature: Softmax temperature.
        max_tokens: Longest response [tokens], the end token included.
        end_ids: Tokens that end a response; they are kept.
        generator: Source of all randomness, on the model's device.
        on_progress: Called with the number of responses that ended at a step.

    Returns:
        Token ids and their log-probabilities at this temperature [nats], a pair a response.

    Raises:
        GradvarError: The model keeps no cache that can be carried on, or its logits are not numbers.
    """
    device = generator.device
    ends = torch.tensor(end_ids, device=device)
    tokens = torch.empty((count, max_tokens), dtype=torch.long, device=device)
    logprobs = torch.empty((count, max_tokens), dtype=torch.float32, device=device)
    lengths = torch.full((count,), max_tokens, device=device)
    running = torch.arange(count, device=device)

    prompt = torch.tensor([list(prompt_ids)], device=device)
    output = model(input_ids=prompt, use_cache=True)
    cache: Any = getattr(output, "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):
        raise GradvarError(
            f"--engine transformers: a {type(model).__name__} keeps no key-value cache that can be carried on; "
            "use --engine vllm"
        )
    cache.batch_repeat_interleave(count)
    logits = output.logits[:, -1].expand(count, -1)  # (B, V)
    for step in range(max_tokens):
        step_logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
        if step_logprobs.isnan().any():
            raise GradvarError(
                f"the model's logits are not numbers at response token {step} in {model.dtype}; give another --dtype"
            )
        chosen = torch.multinomial(step_logprobs.exp(), 1, generator=generator)  # (B, 1)
        tokens[running, step] = chosen[:, 0]
        logprobs[running, step] = step_logprobs.gather(1, chosen)[:, 0]
        going_on = ~torch.isin(chosen[:, 0], ends)
        if not going_on.all():
            lengths[running[~going_on]] = step + 1
            on_progress(int((~going_on).sum()))
            running, chosen = running[going_on], chosen[going_on]
            if len(running) == 0:
                break
            if step + 1 < max_tokens:
                cache.batch_select_indices(going_on.nonzero()[:, 0].cpu())  # layers may be on other devices
        if step + 1 < max_tokens:
            logits = model(input_ids=chosen, past_key_values=cache, use_cache=True).logits[:, -1]
    if len(running):
        on_progress(len(running))
    return [
        (row_tokens[:length], row_logprobs[:length])
        for row_tokens, row_logprobs, length in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    ]
