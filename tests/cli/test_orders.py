"""The paper's order as it is printed: relations, verdicts, digits that do not contradict them."""

import math

import pandas as pd
import pytest

from cli.orders import print_forms, relations
from gradvar.report.numbers import interval


def row(rule, alpha, against, paper, holds, form=3, low=0.9, high=1.1, needs=math.nan):
    return {
        "target": "sum", "prompt_id": None, "estimand": "these prompts", "quantity": f"cv_ratio_form_{form}",
        "rule": rule, "alpha": alpha, "against": against, "paper": paper, "holds": holds, "holds_needs": needs,
        "value": 1.05, "low": low, "high": high,
    }  # fmt: skip


def printed(rows, capsys, margin=0.05):
    print_forms(pd.DataFrame(rows), margin=margin)
    return " ".join(capsys.readouterr().out.split())


def test_the_relations_tested_are_said_each_once(capsys):
    rows = [
        row("dapo", None, "grpo", "at least 1", "violated"),
        row("vl_norm", 1.0, "grpo", "equal", "undetermined", needs=400.0),
        row("vl_norm", 2.0, "grpo", "nothing", "not claimed"),
        row("grpo", None, "dapo", "at most 1", "violated"),
        row("vl_norm", 1.0, "dapo", "at most 1", "holds"),
    ]
    assert len(relations(pd.DataFrame(rows))) == 3
    out = printed(rows, capsys)
    assert "form 3, total, lengths random: violated, 1 of 3 relations against it (dapo >= grpo)" in out
    assert "tested: dapo >= grpo; vl_norm 1 = grpo; vl_norm 1 <= dapo" in out
    assert "[0.952, 1.05]" in out
    assert "form 1, lengths given, Var = V L: not tested" in out
    rows[0]["holds"] = rows[3]["holds"] = "holds"
    assert "undetermined, 1 of 3 relations open, 400 responses a prompt would tell" in printed(rows, capsys)


def test_an_order_without_vl_norm_says_so(capsys):
    rows = [row("dapo", None, "grpo", "at least 1", "holds")]
    assert "holds; no vl_norm with 0 <= alpha <= 1 is compared" in printed(rows, capsys)


@pytest.mark.parametrize(("low", "shown"), [(1.0004, "[1.0004, 1.3]"), (1.0, "[1, 1.3]"), (0.99996, "[0.99996, 1.3]")])
def test_an_end_is_not_rounded_onto_1(low, shown):
    assert interval({"quantity": "cv_ratio", "low": low, "high": 1.3}) == shown


def test_an_alpha_of_minus_1_is_a_rule_of_its_own(capsys):
    rows = [
        row("vl_norm", -1.0, "grpo", "nothing", "not claimed"),
        row("vl_norm", 1.0, "grpo", "equal", "holds"),
        row("dapo", None, "grpo", "at least 1", "holds"),
    ]
    out = printed(rows, capsys)
    assert "vl_norm α=-1 nothing" in out
    assert "dapo at least 1" in out
