"""Text to token ids and back, character for character."""

import string
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gradvar.demo import policy_path
from gradvar.demo.countdown import CountdownProblem
from gradvar.demo.tokenizer import WORDS, build_tokenizer
from gradvar.demo.traces import TraceSettings, search_trace


@pytest.fixture(scope="module", params=["built", "saved", "bundled"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    built = build_tokenizer(max_length=2048)
    if request.param == "built":
        return built
    folder: Path = policy_path()
    if request.param == "saved":
        folder = tmp_path_factory.mktemp("tokenizer")
        built.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_traces_come_back_as_they_were(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        text = search_trace(CountdownProblem((3, 7, 12), 16), settings=TraceSettings(), rng=rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_every_ascii_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(1)
    texts = ["", string.printable, "100 1005 007", "<answer>\n1 + 2\n</answer>", *WORDS, *(w * 2 for w in WORDS)]
    texts += ["".join(rng.choice(list(string.printable), size=200)) for _ in range(20)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.encode("12+3") == tokenizer.convert_tokens_to_ids(["12", "+", "3"])
    assert tokenizer.decode([tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == ""
    assert len(tokenizer.encode("99 left 4 99 low\n<answer>(99-4)</answer>")) == 13
