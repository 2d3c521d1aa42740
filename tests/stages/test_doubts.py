"""What the engine could not look at, or saw late, is one line each in what the user reads and in the log."""

import importlib
import json
from dataclasses import replace

import pytest

from gradvar.stages import measure
from tests.stages.small import make_run
from tests.stages.test_left_out import Heard


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, prompts=3)


def doubted(monkeypatch, doubts):
    """Let the measurements of the prompts say so, one after another."""
    stage = importlib.import_module("gradvar.stages.measure")  # the package's name is the function
    own, left = stage.measure_scores, iter(doubts)
    monkeypatch.setattr(stage, "measure_scores", lambda *args, **options: replace(own(*args, **options), **next(left)))


def events(run, name):
    found = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


def test_targets_that_were_not_held_against_autograd_are_named(run, monkeypatch):
    doubted(monkeypatch, [{}, {"unheld": {"a": "no room", "b": "offloaded"}}, {"unheld": {"a": "no room"}}])
    heard = Heard()
    measure(run, {"targets": ("last:qkv",)}, heard)
    (line,) = [line for line in heard.lines if "autograd" in line]
    assert line == "2 targets not held against autograd's own gradient: a (no room) and 1 more, in log.jsonl"
    assert [event["targets"] for event in events(run, "not held against autograd")] == [
        {"a": "no room", "b": "offloaded"}
    ]


def test_prompts_measured_before_a_batch_was_seen_to_change_responses_are_named(run, monkeypatch):
    doubted(monkeypatch, [{}, {"changed_in_batches": True}, {"changed_in_batches": True}])
    heard = Heard()
    measure(run, {"targets": ("last:qkv",)}, heard)
    (line,) = [line for line in heard.lines if "batch" in line]
    assert line.startswith(
        "prompt '1': a batch changes what a response gives, so each is measured alone from here on; 1 "
    )
    assert "--token-budget 1" in line
    assert [event["measured_before"] for event in events(run, "changed in batches")] == [["0"]]


def test_nothing_is_said_where_there_is_no_doubt(run):
    heard = Heard()
    measure(run, {"targets": ("last:qkv",)}, heard)
    assert not [line for line in heard.lines if "autograd" in line or "batch" in line]
