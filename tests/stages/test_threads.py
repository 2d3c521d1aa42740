"""Same seed, same numbers, on one thread or two."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from benchmarks.synthetic import simulated_prompt, write_run
from tests.conftest import ROOT

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
CODE = """
import sys
from gradvar.runs import open_run
from gradvar.stages import alpha, audit, cv, fit
run = open_run(sys.argv[1])
for stage in (fit, cv, alpha, audit):
    stage(run, {"seed": 11})
"""


@pytest.mark.slow
def test_tables_do_not_depend_on_threads(tmp_path):
    found = {}
    for threads in ("1", "2"):
        path = tmp_path / threads
        prompts = [simulated_prompt(str(q), 64, TARGETS, signal=2.0, rng=np.random.default_rng(q)) for q in range(4)]
        write_run(path, prompts, probed=True)
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads)}
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(path)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[threads] = {file.stem: pd.read_parquet(file) for file in sorted((path / "tables").glob("*.parquet"))}
    assert (
        set(found["1"])
        == set(found["2"])
        >= {"law", "identity", "proxies", "cv", "alpha", "forms", "planning", "audit"}
    )
    for name, one in found["1"].items():
        two = found["2"][name]
        numbers = one.select_dtypes("number").columns
        # Words, verdicts, permutation counts: the same. BLAS may add in another order: numbers to 1e-9.
        words = [column for column in one.columns if column not in numbers]
        pd.testing.assert_frame_equal(one[words], two[words])
        for column in numbers:
            left, right = one[column].astype(float).to_numpy(), two[column].astype(float).to_numpy()
            np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-12, err_msg=f"{name}.{column}")
