"""The bundled policy's tokenizer: numbers up to 99 and the words of a search trace, single bytes for all other text.

It is a Qwen2 tokenizer, since transformers 5 makes one of whatever a Qwen2 model's folder holds
(MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in its tokenization_auto.py), and a Qwen2 tokenizer cuts numbers into digits.
Numbers and words are therefore added tokens, which are matched before anything is cut, the longest first; the
byte-level alphabet has no merges. Every text (in Unicode's composed form) comes back exactly as it went in.
"""

from __future__ import annotations

import string

from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Tokenizer

END_TOKEN = "<|end|>"  # noqa: S105 - the name of a token, not a secret
PAD_TOKEN = "<|pad|>"  # noqa: S105

WORDS = ("<answer>", "</answer>", "Numbers: ", "Target: ", " left ", " high\n", " low\n", " yes\n", "give up")
"""Texts of several characters that are one token."""


def build_tokenizer(*, max_length: int) -> Qwen2Tokenizer:
    """Builds the tokenizer; nothing in it is learned.

    Args:
        max_length: Longest text the policy takes [tokens].

    Returns:
        The tokenizer, with an end and a padding token. It adds no token to a text by itself.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD_TOKEN, END_TOKEN, *alphabet])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=None,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    numbers = [tens + ones for tens in string.digits for ones in string.digits]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in [*numbers, *WORDS]])
    return tokenizer
