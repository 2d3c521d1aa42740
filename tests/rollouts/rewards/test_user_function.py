from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.rollouts.rewards import RewardResult, choose_reward, score_rollouts
from tests.rollouts.rewards.examples import a_prompt, some_rollouts

FORM = "(data_source, solution_str, ground_truth, extra_info=None)"


def score_with(path: Path, body: str, *texts: str, head: str = "", name: str = "compute_score") -> RewardResult:
    path.write_text(f"{head}\ndef {name}{FORM}:\n    {body}\n", encoding="utf-8")
    reward = choose_reward("anything", None, f"{path}:{name}")
    prompt = a_prompt({"gold": [1]}, data_source="anything", extra={"index": 3})
    return score_rollouts(reward, prompt, some_rollouts(*(texts or ("one", "three"))))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return len(solution_str)", [3, 5]),
        ("return len(solution_str) / 2", [1.5, 2.5]),
        ("return solution_str == 'one'", [1, 0]),
        ("return {'score': -1, 'acc': True, 'pred': 'x'}", [-1, -1]),
        ("return np.float32(0.25)", [0.25, 0.25]),
        ("return np.array(0.5)", [0.5, 0.5]),
        ("return np.bool_(True)", [1, 1]),
        ("return ground_truth['gold'][0] + extra_info['index'] + len(data_source)", [12, 12]),
    ],
)
def test_verls_form(tmp_path: Path, body: str, expected: list[float]) -> None:
    result = score_with(tmp_path / "mine.py", body, head="import numpy as np")
    assert result.rewards.tolist() == expected
    assert result.unverified == {}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('no\\nway')", ["raised ValueError: no way"]),
        ("raise SystemExit(3)", ["raised SystemExit: 3"]),
        ("if solution_str == 'one': return 1\n    assert False", ["rollout 11", "raised AssertionError"]),
        ("from math_verify.errors import TimeoutException; raise TimeoutException()", ["TimeoutException"]),
        ("pass", ["returned nothing"]),
        ("return {'score': None}", ["returned nothing"]),
        ("return {'acc': 1}", ["dict without 'score'", "acc"]),
        ("return float('nan')", ["returned nan"]),
        ("return {'score': float('-inf')}", ["returned -inf"]),
        ("return '1'", ["returned '1' (str)"]),
        ("return (1.0, 'x')", ["(tuple)"]),
        ("return 1j", ["(complex)"]),
        ("return 10**400", ["(int)"]),
    ],
)
def test_failures_name_prompt_and_rollout(tmp_path: Path, body: str, words: list[str]) -> None:
    with pytest.raises(GradvarError) as caught:
        score_with(tmp_path / "mine.py", body)
    message = str(caught.value)
    assert "\n" not in message
    for word in ["mine.py:compute_score", "prompt 7", "rollout 1", *words]:
        assert word in message


@pytest.mark.parametrize(
    ("source", "spec", "words"),
    [
        (None, "absent.py:f", ["expected a Python file", "No such file"]),
        ("def g(): ...", "mine.py:f", ["expected a function 'f'", "has g"]),
        ("f = 3", "mine.py:f", ["expected a function 'f'", "has none"]),
        ("def f(text): ...", "mine.py:f", ["expected the arguments (data_source, solution_str", "received (text)"]),
        ("def f(data_source, solution_str, ground_truth): ...", "mine.py:f", ["expected the arguments"]),
        ("async def f(**kwargs): ...", "mine.py:f", ["async"]),
        ("import nowhere_at_all", "mine.py:f", ["running it raised ModuleNotFoundError", "nowhere_at_all"]),
        ("def f(:", "mine.py:f", ["running it raised SyntaxError"]),
        ("raise SystemExit", "mine.py:f", ["running it raised SystemExit"]),
        ("def f(**kwargs): ...", "mine.txt:f", ["ends in .py", "mine.txt"]),
    ],
)
def test_files_that_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, spec: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if source is not None:
        Path(spec.partition(":")[0]).write_text(source, encoding="utf-8")
    with pytest.raises(GradvarError) as caught:
        choose_reward("unknown", None, spec)
    message = str(caught.value)
    assert "\n" not in message
    for word in [spec, *words]:
        assert word in message


def test_a_file_alone_means_compute_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def compute_score(**kwargs): return 1", encoding="utf-8")
    reward = choose_reward("unknown", None, "mine.py")
    assert reward.why == "mine.py, as asked"
    assert score_rollouts(reward, a_prompt(None), some_rollouts("x")).rewards.tolist() == [1]


def test_an_edited_file_is_loaded_again_and_labelled_anew(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    labels: list[Any] = []
    for value in (1, 2):
        result = score_with(path, f"return {value}")
        assert np.all(result.rewards == value)
        labels.append(choose_reward("unknown", None, f"{path}:compute_score").label)
    assert labels[0] != labels[1]


def test_a_file_is_run_once_for_all_prompts(tmp_path: Path) -> None:
    path, trace = tmp_path / "mine.py", tmp_path / "trace"
    path.write_text(
        f"with open({str(trace)!r}, 'a') as file: file.write('x')\ndef f(**kwargs): return 1\n", encoding="utf-8"
    )
    for _ in range(3):
        choose_reward("unknown", None, f"{path}:f")
    assert trace.read_text() == "x"


def test_classes_of_the_file_find_their_module(tmp_path: Path) -> None:
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 4"
    assert score_with(tmp_path / "mine.py", "return A().x", head=head).rewards.tolist() == [4, 4]
