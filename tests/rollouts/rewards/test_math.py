"""The math reward: what it counts as right, and that nothing a model writes can stop it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradvar
from gradvar.errors import GradvarError
from gradvar.rollouts.rewards import MathPool, RewardResult, choose_reward, score_rollouts, worker_pool
from gradvar.rollouts.rewards.worker_pool import MathTask
from tests.rollouts.rewards.examples import a_prompt, some_rollouts

TOWER = r"\boxed{9^{9^{9^9}}}"
# Math-Verify issue 65: hangs in the C of Python's integers, where a signal handler never runs.
ISSUE_65 = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"
GCD = r"\gcd(10^{10^{10}}, 3)"  # hangs while it is parsed, before any comparison


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    with MathPool(workers=2, time_limit=20) as shared:
        yield shared


@pytest.fixture(scope="module")
def hasty() -> Iterator[MathPool]:
    with MathPool(workers=2, time_limit=1.5) as shared:
        yield shared


def score(ground_truth: Any, *texts: str, pool: MathPool | None, **kwargs: Any) -> RewardResult:
    reward = choose_reward("math", ground_truth)
    return score_rollouts(reward, a_prompt(ground_truth), some_rollouts(*texts), pool=pool, **kwargs)


def run_python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run an interpreter that finds gradvar, from any folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(gradvar.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=check, env=environment)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("42", ["so it is $42$", r"\boxed{42}", "the answer is 42.0", "<answer> 42 </answer>"], [r"\boxed{-42}", "no"]),
        (r"\frac{1}{2}", [r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", "1/2"], [r"\boxed{2}"]),
        (0.5, [r"\boxed{\frac12}"], [r"\boxed{5}"]),
        (r"$\sqrt{8}$", [r"\boxed{2\sqrt{2}}"], [r"\boxed{2}"]),
        (r"We find \boxed{7}.", [r"\boxed{7}"], [r"\boxed{8}"]),
        (r"\text{(C)}", [r"\boxed{\text{(C)}}"], [r"\boxed{\text{(D)}}"]),
        ("east", [r"\boxed{east}", r"\boxed{\text{east}}"], [r"\boxed{seat}"]),
        ("12,345", [r"\boxed{12345}"], [r"\boxed{12}"]),
        (r"(3, \frac{\pi}{2})", [r"$\left(3, \frac{\pi}{2}\right)$"], [r"\boxed{(3, \pi)}"]),
        (["2", "3"], [r"\boxed{2}", r"\boxed{3}"], [r"\boxed{4}"]),
    ],
)
def test_right_and_wrong(gold: Any, right: list[str], wrong: list[str], pool: MathPool) -> None:
    result = score(gold, *right, *wrong, pool=pool)
    assert result.rewards.tolist() == [1.0] * len(right) + [0.0] * len(wrong)
    assert result.unverified == {}


def test_the_box_goes_before_other_numbers_and_the_tag_before_all(pool: MathPool) -> None:
    texts = [
        r"\boxed{7}, final answer is 8",
        r"<answer>\boxed{7}</answer> or rather \boxed{8}",
        r"\boxed{8} so $x=\boxed{7}$",
    ]
    assert score("7", *texts, pool=pool).rewards.tolist() == [1, 1, 1]


def test_rewards_stand_in_the_rollouts_order(pool: MathPool) -> None:
    slow = "\\boxed{" + "9" * 100_000 + "}"
    texts = [slow if row % 5 == 0 else rf"\boxed{{{row}}}" for row in range(40)]
    done: list[int] = []
    result = score("3", *texts, pool=pool, on_progress=done.append)
    assert np.flatnonzero(result.rewards == 1).tolist() == [3]
    assert np.flatnonzero(result.rewards == 0).size == 39
    assert done == [1] * 40


@pytest.mark.parametrize(
    "text",
    [
        "x = 3 + 4 and $y=2$. " * 5000,
        "\\boxed{" + "9" * 100_000 + "}",
        "a" * 100_000,
        "$" * 100_000,
        "the answer is " * 7000,
        r"\boxed{x+1}" * 8000,
        "\\boxed{\ud800五\x00}",
        "",
    ],
)
def test_long_and_odd_texts_are_simply_wrong(text: str, pool: MathPool) -> None:
    assert score("5", text, pool=pool).rewards.tolist() == [0]


def test_hangs_are_unverified_and_the_rest_is_scored(hasty: MathPool) -> None:
    texts = [TOWER, r"\boxed{5}", ISSUE_65, "the answer is 10**10**10", r"\boxed{6}"]
    start = time.monotonic()
    result = score("5", *texts, pool=hasty)
    assert time.monotonic() - start < 20
    np.testing.assert_array_equal(result.rewards, [np.nan, 1, np.nan, np.nan, 0])
    assert sorted(result.unverified) == [10, 12, 13]
    for reason in result.unverified.values():  # a fast machine may meet the memory limit first
        assert re.search("^math-verify (did not finish within 1.5 s|used more than)", reason), reason


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_check_that_takes_too_much_memory_is_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    with MathPool(workers=1, time_limit=20) as single:
        single.run([MathTask(gold=("5",), response=None)])
        monkeypatch.setattr(worker_pool, "MEMORY_LIMIT", 2**20)
        verdict = single.run([MathTask(gold=("5",), response=TOWER)])[0]
    assert np.isnan(verdict.score)
    assert verdict.reason is not None
    assert verdict.reason.startswith("math-verify used more than")


def test_deep_nesting_ends_in_time(hasty: MathPool) -> None:
    start = time.monotonic()
    result = score("5", "\\boxed{" + "(" * 20_000 + ")" * 20_000 + "}", "1+" * 20_000 + "1", pool=hasty)
    assert time.monotonic() - start < 15
    assert not np.any(result.rewards == 1)
    assert len(result.unverified) == np.isnan(result.rewards).sum()


@pytest.mark.parametrize(("gold", "words"), [("}{", "no expression"), (GCD, "did not finish within|used more than")])
def test_a_gold_that_cannot_be_read_leaves_all_unverified(gold: str, words: str, hasty: MathPool) -> None:
    done: list[int] = []
    result = score(gold, r"\boxed{5}", r"\boxed{6}", "x", pool=hasty, on_progress=done.append)
    assert np.isnan(result.rewards).all()
    assert sorted(result.unverified) == [10, 11, 12]
    assert sum(done) == 3
    # On a fast machine the hanging gold reaches the memory limit before the time limit: both are right.
    for reason in result.unverified.values():
        assert re.search(words, reason), reason
        assert repr(gold)[:20] in reason


def test_a_killed_worker_costs_one_response() -> None:
    with MathPool(workers=1, time_limit=20) as single:
        single.run([MathTask(gold=("5",), response="5")])
        killer = threading.Timer(0.3, os.kill, (single.pids[0], signal.SIGKILL))
        killer.start()
        verdicts = single.run([MathTask(gold=("5",), response=text) for text in (TOWER, r"\boxed{5}", r"\boxed{6}")])
        killer.join()
    assert verdicts[0].reason == "math-verify's process died (SIGKILL)"
    assert np.isnan(verdicts[0].score)
    assert [v.score for v in verdicts[1:]] == [1, 0]


def test_a_worker_killed_between_prompts_costs_nothing() -> None:
    with MathPool(workers=1, time_limit=20) as single:
        assert score("5", "5", pool=single).rewards.tolist() == [1]
        os.kill(single.pids[0], signal.SIGKILL)
        time.sleep(0.1)
        assert score("5", "5", "6", "5", pool=single).rewards.tolist() == [1, 0, 1]


def test_off_the_main_thread(pool: MathPool) -> None:
    results: list[RewardResult] = []
    threads = [
        threading.Thread(target=lambda text=text: results.append(score("5", text, "6", pool=pool)))
        for text in ("5", r"\boxed{5}")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.rewards.tolist() for r in results] == [[1, 0], [1, 0]]


def test_prompts_share_the_workers_and_none_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with MathPool(workers=2, time_limit=20) as pool:
        assert pool.pids == ()
        seen = set()
        for gold in ("5", "6"):
            score(gold, "5", "6", "7", pool=pool)
            seen.add(pool.pids)
        assert len(seen) == 1
        pids = pool.pids
        assert len(pids) == 2
        if sys.platform == "linux":
            maps = Path(f"/proc/{pids[0]}/maps").read_text()
            assert "torch" not in maps
    assert not any(alive(pid) for pid in pids), "a zombie is left"
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_caller_leaves_no_stale_verdicts(pool: MathPool) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score("5", *["5"] * 6, pool=pool, on_progress=stop)
    assert pool.pids == ()
    assert score("5", "6", "5", pool=pool).rewards.tolist() == [0, 1]


def test_without_a_pool_one_is_made() -> None:
    assert score("5", "5", "6", pool=None).rewards.tolist() == [1, 0]


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gradvar.rollouts.rewards.worker_pool import MathPool, MathTask\n"
        "with MathPool(workers=2) as pool:\n"
        "    print(pool.run([MathTask(gold=('5',), response='5')])[0].score)\n",
        encoding="utf-8",
    )
    done = run_python(str(script))
    assert done.stdout == "1.0\n"
    assert done.stderr == ""


def test_workers_end_with_a_killed_parent() -> None:
    script = (
        "import os, signal\n"
        "from gradvar.rollouts.rewards.worker_pool import MathPool, MathTask\n"
        "pool = MathPool(workers=1)\n"
        "pool.run([MathTask(gold=('5',), response='5')])\n"
        "print(pool.pids[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_python("-c", script, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        if not running(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlives its parent")


def running(pid: int) -> bool:
    """Whether a process still runs (one that nobody has reaped yet does not)."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return state.stdout.strip() not in ("", "Z")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_an_abandoned_hang_ends_itself() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-P", str(worker_pool._SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker:
        assert worker.stdout.readline() == b'{"ready": true}\n'
        worker.stdin.write(b'{"gold": ["5"], "response": "10**10**10", "limit": -4.0}\n')  # and 5 s of grace
        worker.stdin.flush()
        assert worker.wait(timeout=20) == -signal.SIGALRM


def test_math_verify_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such thing')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with MathPool() as pool, pytest.raises(GradvarError, match="ImportError: no such thing"):
        pool.run([MathTask(gold=("5",), response="5")])


@pytest.mark.parametrize("kwargs", [{"workers": 0}, {"time_limit": 0}, {"time_limit": float("nan")}])
def test_pool_settings(kwargs: dict[str, Any]) -> None:
    with pytest.raises(GradvarError, match="expected"):
        MathPool(**kwargs)
