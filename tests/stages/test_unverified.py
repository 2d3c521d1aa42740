"""A run whose responses have no verified reward gives the score's results and says what is missing."""

import shutil

from gradvar.stages import fit
from gradvar.stages.listener import Silent
from gradvar.stages.measure import measure
from tests.stages.small import make_run


class Heard(Silent):
    def __init__(self):
        self.warned = []

    def warn(self, text):
        self.warned.append(text)


def test_no_verified_reward_is_told_with_the_command(tmp_path):
    run = make_run(tmp_path, (5, 9, 3, 7, 6, 8, 4, 5, 6, 7))
    measure(run, {"targets": ("last:q",)})
    heard = Heard()
    fit(run, {}, heard)
    assert not [line for line in heard.warned if "verified reward" in line]
    shutil.rmtree(run.path / "rewards")
    tables = fit(run, {}, heard)
    assert [f"run `gradvar reward {run.path}`" in line for line in heard.warned if "verified reward" in line] == [True]
    law = tables["law"]
    assert law[(law["quantity"] == "deviation_exponent") & (law["advantage"] == "score")]["value"].notna().any()
