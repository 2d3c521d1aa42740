"""The training script runs, says what it reached, and gives the same weights for the same seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from gradvar.demo.batches import IGNORED_LABEL, trace_batches
from gradvar.demo.countdown import CountdownProblem
from gradvar.demo.prompts import TEMPLATE, format_prompt, read_problems
from gradvar.demo.tokenizer import build_tokenizer
from gradvar.demo.traces import TraceSettings
from gradvar.demo.train import main
from gradvar.demo.train_settings import TrainSettings

SMALL = ["--steps", "3", "--measured-prompts", "2", "--measured-responses", "4"]


def test_some_steps_write_a_policy_problems_and_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--out", str(tmp_path / "a")])
    main([*SMALL, "--out", str(tmp_path / "b")])
    main([*SMALL, "--out", str(tmp_path / "c"), "--seed", "1"])
    assert "mean_reward" in capsys.readouterr().out
    a, b, c = (tmp_path / name / "policy" / "model.safetensors" for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    assert a.read_bytes() != c.read_bytes()
    card = json.loads((a.parent / "card.json").read_text(encoding="utf-8"))
    assert card["training"]["steps"] == 3
    assert card["held_out"]["prompts"] == 2
    assert len(read_problems(tmp_path / "a" / "problems.jsonl")) == 64
    model = AutoModelForCausalLM.from_pretrained(a.parent)
    assert sum(weight.numel() for weight in model.parameters()) == card["parameters"]


def test_training_can_be_limited_by_time(tmp_path: Path) -> None:
    main(["--minutes", "0.0001", "--measured-prompts", "1", "--measured-responses", "2", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "policy" / "card.json").read_text(encoding="utf-8"))["training"]["steps"] >= 1


def test_either_steps_or_minutes() -> None:
    with pytest.raises(ValueError, match="either steps or minutes"):
        TrainSettings()
    with pytest.raises(ValueError, match="either steps or minutes"):
        TrainSettings(steps=1, minutes=1.0)
    assert TrainSettings(steps=4).progress(step=1, seconds=1e9) == 0.25
    assert TrainSettings(minutes=2.0).progress(step=10**9, seconds=30.0) == 0.25


def test_batches_hold_whole_traces_and_take_loss_on_responses_only() -> None:
    tokenizer = build_tokenizer(max_length=2048)
    problem = CountdownProblem((3, 7, 12), 16)

    def draw(seed: int) -> list[tuple[list[list[int]], list[list[int]]]]:
        batches = trace_batches(
            [problem],
            tokenizer,
            template=TEMPLATE,
            settings=TraceSettings(),
            tokens_per_batch=1000,
            rng=np.random.default_rng(seed),
        )
        return [(batch.token_ids.tolist(), batch.labels.tolist()) for batch, _ in zip(batches, range(20), strict=False)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    prompt_length = len(tokenizer.encode(format_prompt(TEMPLATE, problem)))
    for token_ids, labels in draw(0):
        assert len(token_ids) * len(token_ids[0]) <= 1000 or len(token_ids) == 1
        for row, row_labels in zip(token_ids, labels, strict=True):
            end = row.index(tokenizer.eos_token_id) + 1
            assert set(row_labels[:prompt_length]) == {IGNORED_LABEL}
            assert row_labels[prompt_length:end] == row[prompt_length:end]
            assert set(row_labels[end:]) <= {IGNORED_LABEL}
            assert set(row[end:]) <= {tokenizer.pad_token_id}
            text = tokenizer.decode(row[:prompt_length])
            assert sorted(text.split("\n")[0].split()[1:]) == ["12", "3", "7"]
