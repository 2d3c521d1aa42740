import json
import math

import pandas as pd
import pytest

from gradvar.errors import GradvarError
from gradvar.rollouts.imports import read_rollouts
from tests.rollouts.tiny import make_tokenizer

ROW = {"prompt_token_ids": [2, 3], "response_token_ids": [4, 5, 0]}


def write(folder, rows, suffix=".jsonl"):
    path = folder / f"rollouts{suffix}"
    if suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **options):
    return read_rollouts(path, **({"vocab_size": 8, "max_positions": 10, "tokenizer": make_tokenizer()} | options))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_everything_a_file_may_hold(tmp_path, suffix):
    full = {
        **ROW,
        "prompt_id": "p-1",
        "loss_mask": [1, 0, 1],
        "reward": 1.0,
        "logprobs": [-0.5, -1.0, -0.25],
        "finish_reason": "stop",
        "data_source": "mine",
        "ground_truth": {"target": 3},
        "text": "given",
        "extra_info": {"index": 4},
    }
    (one,) = read(write(tmp_path, [full, {**full, "reward": 0.0, "text": "other"}], suffix))
    assert (one.prompt.prompt_id, one.prompt.token_ids, one.prompt.text) == ("p-1", (2, 3), "ab")
    assert (one.prompt.data_source, one.prompt.ground_truth) == ("mine", {"target": 3})
    assert one.prompt.extra == {"index": 4}
    first, second = one.rollouts
    assert (first.rollout_id, second.rollout_id) == (0, 1)
    assert (first.token_ids, first.loss_mask, first.length) == ((4, 5, 0), (1, 0, 1), 2)
    assert (first.sampler_logprobs, first.text) == ((-0.5, -1.0, -0.25), "given")
    assert one.rewards == [1.0, 0.0]


def test_what_is_left_out_has_defaults(tmp_path):
    rows = [ROW, {"prompt_token_ids": [3], "response_token_ids": [1]}, {**ROW, "response_token_ids": [4]}]
    first, second = read(write(tmp_path, rows))
    assert (first.prompt.prompt_id, second.prompt.prompt_id) == ("0", "1")
    assert [r.finish_reason for r in first.rollouts] == ["stop", "length"]
    assert [r.text for r in first.rollouts] == ["cd", "c"]
    assert first.rollouts[0].loss_mask is None
    assert first.rollouts[0].sampler_logprobs is None
    assert first.rewards is None
    assert first.prompt.data_source == "unknown"
    assert second.rollouts[0].finish_reason == "length"
    assert read(write(tmp_path, rows), end_token_ids=(0, 1))[1].rollouts[0].finish_reason == "stop"


def test_rewards_may_be_null_or_bool(tmp_path):
    (one,) = read(write(tmp_path, [{**ROW, "reward": None}, {**ROW, "reward": True}]))
    assert math.isnan(one.rewards[0])
    assert one.rewards[1] == 1.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"response_token_ids": [4, 8]}, "response_token_ids holds 8, and the model knows the token ids 0 to 7"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids holds -1"),
        ({"response_token_ids": []}, "response_token_ids is empty"),
        ({"response_token_ids": None}, "expected a list, received None"),
        ({"response_token_ids": [4.5]}, "expected whole numbers, received 4.5"),
        ({"response_token_ids": ["a"]}, "expected whole numbers, received 'a'"),
        ({"response_token_ids": [4] * 9}, "have 11 tokens, the model's context is 10"),
        ({"loss_mask": [1, 1]}, "loss_mask has 2 entries for 3 response tokens"),
        ({"loss_mask": [1, 2, 1]}, "loss_mask may hold only 0 and 1"),
        ({"loss_mask": [0, 0, 0]}, "loss_mask is 0 everywhere"),
        ({"logprobs": [-1.0]}, "logprobs has 1 entries for 3 response tokens"),
        ({"logprobs": [-1.0, 0.5, -1.0]}, "logprobs: expected log-probabilities in nats, at most 0, received 0.5"),
        ({"logprobs": [-1.0, None, -1.0]}, "logprobs: expected log-probabilities"),
        ({"reward": "good"}, "reward: expected a number, or null"),
        ({"finish_reason": "abort"}, "finish_reason: expected stop or length, received 'abort'"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, changes, match):
    path = write(tmp_path, [ROW, {**ROW, **changes}])
    with pytest.raises(GradvarError, match=match) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, row 1 (the first is 0): ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", None, 1.5])
def test_prompt_ids_are_safe_as_file_names(tmp_path, name):
    with pytest.raises(GradvarError, match="prompt_id: expected a number or a name"):
        read(write(tmp_path, [{**ROW, "prompt_id": name}]))
    (one,) = read(write(tmp_path, [{**ROW, "prompt_id": 12}]))
    assert one.prompt.prompt_id == "12"


def test_rows_of_one_prompt_must_agree(tmp_path):
    named = {**ROW, "prompt_id": "a"}
    with pytest.raises(GradvarError, match=r"row 1 .*'a' had other prompt_token_ids"):
        read(write(tmp_path, [named, {**named, "prompt_token_ids": [3]}]))
    with pytest.raises(GradvarError, match=r"row 1 .*another data_source or ground_truth"):
        read(write(tmp_path, [{**named, "ground_truth": "1"}, {**named, "ground_truth": "2"}]))


def test_missing_columns_and_files(tmp_path):
    with pytest.raises(
        GradvarError, match=r"expected the columns prompt_token_ids and response_token_ids.*prompt, text"
    ):
        read(write(tmp_path, [{"prompt": "a", "text": "b"}]))
    with pytest.raises(GradvarError, match=r"expected a file ending in \.parquet or \.jsonl"):
        read(tmp_path / "rollouts.csv")
