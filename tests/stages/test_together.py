"""Tables made in processes of their own: the same tables, the same errors, the same rules."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from joblib import cpu_count

from benchmarks.synthetic import simulated_prompt, write_run
from gradvar.errors import GradvarError
from gradvar.estimators import aggregation, cv_table, extras_table
from gradvar.runs import open_run
from gradvar.runs.config import ALPHAS, RULES
from gradvar.stages import alpha, cv, fit, together
from gradvar.stages.groups import estimated_groups

pytestmark = pytest.mark.skipif(cpu_count() < 2, reason="one core: nothing is made in another process")
TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("together") / "run"
    prompts = [simulated_prompt(str(q), 32, TARGETS, signal=2.0, rng=np.random.default_rng(q)) for q in range(2)]
    write_run(path, prompts)
    return open_run(path)


@pytest.fixture
def processes(monkeypatch):
    """However small a run is."""
    monkeypatch.setattr(together, "WORTH", 0)


def test_small_runs_stay_in_this_process_and_large_ones_do_not(run, monkeypatch):
    groups = estimated_groups(run)
    assert list(together.together([os.getpid, os.getpid], groups)) == [os.getpid()] * 2
    monkeypatch.setattr(together, "WORTH", sum(len(group.lengths) for group in groups))
    assert os.getpid() not in list(together.together([os.getpid, os.getpid], groups))


def test_the_tables_are_the_same(run, monkeypatch):
    given = {"group_size": 4, "seed": 3}
    here = {**fit(run, given), **alpha(run, given)}
    monkeypatch.setattr(together, "WORTH", 0)
    there = {**fit(run, given), **alpha(run, given)}
    assert list(here) == list(there) == ["law", "identity", "proxies", "alpha", "forms", "planning"]
    for name, table in here.items():
        # To the last bit at one thread of BLAS; it may have two here and one there.
        pd.testing.assert_frame_equal(table, there[name], rtol=1e-9, atol=1e-12)


def test_extras_made_target_by_target_are_those_of_all_targets(run, processes):
    table = cv(run, {"group_size": 4, "seed": 3}, extras=True)
    found = run.table("extras")
    options = {"rules": RULES, "alphas": ALPHAS, "group_size": 4, "seed": 3}
    whole = extras_table(estimated_groups(run), **options)
    labels = ["target", "quantity", "rule", "alpha", "extra", "prompt_id"]
    assert not found.duplicated(labels).any()
    found, whole = (one.set_index(labels).sort_index() for one in (found, whole))
    assert found.index.equals(whole.index)
    for name in ("value", "low", "high", "n"):
        np.testing.assert_array_equal(found[name], whole[name], err_msg=name)
    pd.testing.assert_frame_equal(table, cv_table(estimated_groups(run), **options), rtol=1e-9, atol=1e-12)


def test_results_come_in_the_order_of_the_tasks(run, processes):
    tasks = [partial(pow, 2, k) for k in range(9)]
    assert list(together.together(tasks, estimated_groups(run))) == [2**k for k in range(9)]


def test_a_rule_registered_here_is_known_there(run, processes, monkeypatch):
    for name in ("RULES", "_BY_ANY_NAME"):
        monkeypatch.setattr(aggregation, name, dict(getattr(aggregation, name)))
    monkeypatch.setattr(together, "RULES", aggregation.RULES)
    mine = aggregation.Rule(name="mine", label="mine", formula=lambda lengths, n, total, m, a: lengths**-0.25 / n)
    aggregation.register_rule(mine)
    groups = estimated_groups(run)
    make = partial(cv_table, groups, rules=("mine", "grpo"), group_size=4, seed=0)
    there, process = together.together([make, os.getpid], groups)
    assert process != os.getpid()
    pd.testing.assert_frame_equal(there, make(), rtol=1e-9, atol=1e-12)
    assert (there["rule"] == "mine").any()


def test_an_error_there_is_the_error_here(run, processes):
    groups = estimated_groups(run)
    tasks = [os.getpid, partial(cv_table, groups, group_size=20, seed=0)]
    with pytest.raises(GradvarError, match=r"group size 20 needs at least 40 verified responses"):
        list(together.together(tasks, groups))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_process_is_left_when_all_is_done_or_the_caller_stops(run, processes):
    groups = estimated_groups(run)
    pids = set(together.together([os.getpid] * 4, groups))
    assert os.getpid() not in pids
    assert not [pid for pid in pids if is_alive(pid)]
    results = together.together([os.getpid, partial(time.sleep, 60)], groups)
    pid = next(results)
    start = time.monotonic()
    with pytest.warns(UserWarning, match="cancelled"):  # joblib's
        results.close()
    assert not is_alive(pid)
    assert time.monotonic() - start < 30, "closing waits for tasks that nobody wants"


KILLED = """
import os, sys, time
from gradvar.runs import open_run
from gradvar.stages import together
from gradvar.stages.groups import estimated_groups

together.WORTH = 0
def task():
    open(os.path.join(sys.argv[2], str(os.getpid())), "w").close()
    time.sleep(120)
list(together.together([task, task], estimated_groups(open_run(sys.argv[1]))))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_a_killed_parent(run, tmp_path, how):
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(run.path), str(tmp_path)])
    try:
        wait(lambda: len(list(tmp_path.iterdir())) == 2, "two workers, by a script without a main guard")
    finally:
        parent.send_signal(how)
        parent.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait(lambda: not any(map(is_alive, pids)), "the workers' end")


def wait(until, what, seconds=90.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
