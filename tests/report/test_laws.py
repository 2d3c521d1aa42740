"""What a law's table says beside its exponents, on tables made by hand."""

import math

import pandas as pd

from gradvar.report.laws import CLASS_COLUMNS, class_table, contradictions, family_table

OPEN, NOT, IS = "undetermined", "not proportional", "proportional to length"


def row(
    quantity, value, low=math.nan, high=math.nan, *, scope="all responses", verdict=None, prompt=None, kind="score"
):
    return {
        "target": "sum", "prompt_id": prompt, "estimand": "these prompts", "advantage": kind, "scope": scope,
        "quantity": quantity, "value": value, "low": low, "high": high, "level": 0.95, "verdict": verdict,
    }  # fmt: skip


def law(*more):
    rows = [
        row("within_exponent", 1.0, 0.9, 1.1, verdict=IS),
        row("within_exponent", 1.05, 0.9, 1.2, verdict=IS, scope="reward 1"),
        row("within_exponent_tau", 0.1, scope="reward 1"),
        row("within_heterogeneity_p", 0.4, scope="reward 1"),
        row("within_explained_constant", 0.0),
        row("within_explained_power", 0.31),
        row("within_loglog_slope", 0.97, 0.9, 1.04),
        row("within_curvature", 0.05, -0.1, 0.2),
        row("within_exponent", 3.0, 2.0, 4.0, verdict=NOT, prompt="p0"),  # one prompt's is not the pooled one
    ]
    return pd.DataFrame([*rows, *more])


def test_classes_have_a_row_each_with_the_spread_between_prompts():
    rows = class_table(law(), "sum")
    assert all(len(one) == len(CLASS_COLUMNS) for one in rows)
    assert rows == [
        ["all responses", "1", "within", "1", "[0.9, 1.1]", "proportional", "", ""],
        ["reward 1", "1", "within", "1.05", "[0.9, 1.2]", "proportional", "0.1", "0.4"],
    ]


def test_families_have_a_column_a_fit():
    columns, rows = family_table(law(), "sum")
    assert columns == ["measure", "1 within"]
    assert rows == [
        ["constant", "0"],
        ["power", "0.31"],
        ["log-log slope", "0.97"],
        ["  interval", "[0.9, 1]"],
        ["curvature", "0.05"],
        ["  interval", "[-0.1, 0.2]"],
    ]


def test_nothing_is_hidden_where_classes_agree():
    assert contradictions(law(), "sum") == []


def test_what_the_pooled_exponent_hides_is_said():
    found = contradictions(
        law(
            row("within_exponent", 2.0, 1.7, 2.3, verdict=NOT, scope="reward 0"),
            row("within_exponent_tau", 0.5, scope="reward 0"),
            row("within_heterogeneity_p", 0.001, scope="reward 0"),
            row("deviation_exponent", 1.0, 0.9, 1.1, verdict=IS),
            row("deviation_curvature", 0.4, 0.2, 0.6),
        ),
        "sum",
    )
    assert found == [
        "score, deviation: no power law, curvature 0.4 [0.2, 0.6]; its exponent is that of a typical length",
        "score, within: reward 0 contradicts all responses, exponent 2 [1.7, 2.3] (not proportional) against "
        "1 [0.9, 1.1] (proportional to length)",
        "score, within, reward 0: prompts have different exponents (p 0.001, standard deviation 0.5)",
    ]
