"""A tiny random Qwen2 with a character tokenizer, and the exact distribution of what it says."""

import json
from pathlib import Path

import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = ["<end>", "<stop>", *"abcdef"]
END_IDS = (0, 1)
"""<end> is the tokenizer's end token; generation_config adds <stop>."""
VOCABULARY = len(CHARACTERS)
CONTEXT = 64

HOSTILE = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.8,
    "top_k": 2,
    "min_p": 0.2,
    "typical_p": 0.7,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 3,
    "bad_words_ids": [[4]],
    "suppress_tokens": [3],
    "begin_suppress_tokens": [2],
    "max_length": 5,
    "eos_token_id": [0, 1],
}
"""A generation_config.json that changes the policy in every way it can."""


def make_tokenizer(characters=CHARACTERS, **options):
    words = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=characters[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<end>", "additional_special_tokens": ["<stop>"]} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model_folder(path: Path) -> Path:
    """Write the model, float32, peaked enough for temperature to matter, with an end about every tenth token."""
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.12,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:2] *= 0.2
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(HOSTILE))
    return path


def token_logprobs(model, prompt_ids, token_ids, temperature):
    """Log-probability of each response token by one plain forward pass [nats]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *token_ids]])).logits[0].double()
    logprobs = torch.log_softmax(logits / temperature, -1)
    start = len(prompt_ids) - 1
    return [float(logprobs[start + step, token]) for step, token in enumerate(token_ids)]


def first_two_probabilities(model, prompt_ids, temperature):
    """Exact probability of every beginning: (end,) or (token, token)."""
    found = {}
    for first in range(VOCABULARY):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt_ids, first]])).logits[0].double()
        probabilities = torch.softmax(logits / temperature, -1)
        chance = float(probabilities[-2, first])
        if first in END_IDS:
            found[(first,)] = chance
            continue
        for second in range(VOCABULARY):
            found[(first, second)] = chance * float(probabilities[-1, second])
    return found


def chi_square_p(counts, probabilities):
    """p-value of observed beginnings against exact probabilities; cells expected below 5 are put together."""
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    cells = sorted(probabilities, key=probabilities.get)
    observed, expected, rest = [], [], [0.0, 0.0]
    for cell in cells:
        if probabilities[cell] * total < 5:
            rest[0] += counts.get(cell, 0)
            rest[1] += probabilities[cell] * total
        else:
            observed.append(counts.get(cell, 0))
            expected.append(probabilities[cell] * total)
    if rest[1] > 0:
        observed.append(rest[0])
        expected.append(rest[1])
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(stats.chi2.sf(statistic, len(observed) - 1))
