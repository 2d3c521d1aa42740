import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.errors import GradvarError
from gradvar.estimators import conditional_cv, cv_table, find_rule, form_table, paper_order, total_form
from gradvar.runs.records import Estimate
from tests.estimators import references, simulator
from tests.estimators.test_tables import only, pick, prompts, same

LENGTHS = np.array([20.0, 35.0, 60.0, 200.0, 410.0, 77.0])


def test_table_1_of_the_paper():
    """CV = sqrt(V sum x^2 L) / (sum x ||grad J||), written out per rule."""
    v, norm, n = 0.3, 1.7, len(LENGTHS)
    total, harmonic = LENGTHS.sum(), (1 / LENGTHS).sum()
    expected = {
        # x = 1/(n L): sum x^2 L = sum(1/L)/n^2, sum x = sum(1/L)/n
        ("grpo", None): math.sqrt(v / harmonic) / norm,
        ("vl_norm", 1.0): math.sqrt(v / harmonic) / norm,
        ("dapo", None): math.sqrt(v * total) / (n * norm),
        ("dr_grpo", None): math.sqrt(v * total) / (n * norm),
        ("vl_norm", 0.5): math.sqrt(v * n) / ((LENGTHS**-0.5).sum() * norm),
    }
    for (rule, alpha), value in expected.items():
        got = conditional_cv(rule, LENGTHS, v * LENGTHS, norm, alpha=alpha, max_length=500)
        assert got == pytest.approx(value, rel=1e-12), rule
        x = references.weights(rule, LENGTHS, alpha=alpha, max_length=500)
        assert got == pytest.approx(math.sqrt(sum(x * x * v * LENGTHS)) / (sum(x) * norm))


@pytest.mark.parametrize("seed", range(5))
def test_the_papers_inequality_holds_in_form_1(seed):
    lengths = np.random.default_rng(seed).lognormal(4, 1, 9)
    cvs = [conditional_cv("vl_norm", lengths, lengths, 1.0, alpha=a, max_length=9) for a in (1.0, 0.75, 0.3, 0.0)]
    assert cvs == sorted(cvs)
    # Outside 0 <= alpha <= 1 it is not claimed, and does not hold.
    assert conditional_cv("vl_norm", lengths, lengths, 1.0, alpha=2.0, max_length=9) > cvs[0]


def test_brute_force_given_the_lengths():
    """200 000 draws of ghat at fixed lengths, v = L^1.6, E g constant."""
    rng = np.random.default_rng(0)
    x = references.weights("vl_norm", LENGTHS, alpha=0.75, max_length=500)
    noise = rng.normal(size=(200_000, len(LENGTHS))) * LENGTHS**0.8
    # Scalars: g = 30 + noise, so ||grad J|| = 30.
    updates = (x * (30 + noise)).sum(axis=1)
    got = conditional_cv("vl_norm", LENGTHS, LENGTHS**1.6, 30.0, alpha=0.75, max_length=500)
    # The standard deviation of 200 000 normals is known to 0.16%.
    assert got == pytest.approx(updates.std() / updates.mean(), rel=0.01)


def test_refuses():
    with pytest.raises(GradvarError, match="variances"):
        conditional_cv("grpo", LENGTHS, [1.0], 1.0)
    with pytest.raises(GradvarError, match="gradient_norm"):
        conditional_cv("grpo", LENGTHS, LENGTHS, 0.0)


def test_form_2_is_covered():
    """True ratio at the drawn lengths with v = L^beta: 80 prompts of 64, binomial bound at 93%."""
    hits, wrong = 0, 0
    for t in range(80):
        rng = np.random.default_rng([3, t])
        one = simulator.prompt("p", 64, rng=rng, beta=1.6, decay=0.9)
        # A = 1: the law of the score itself.
        row = only(form_table([one], rules=("dapo",), advantage="score", seed=t), quantity="cv_ratio_form_2")
        v = one.lengths**1.6
        truth = conditional_cv("dapo", one.lengths, v, 1.0) / conditional_cv("grpo", one.lengths, v, 1.0)
        hits += row["low"] <= truth <= row["high"]
        wrong += row["holds"] == "violated"
    assert hits >= stats.binom.ppf(1e-5, 80, 0.93), hits
    assert wrong <= 2


def test_table_says_what_holds():
    groups = prompts(2, n=64, targets=("a",), beta=1.0)
    table = form_table(groups, seed=0)
    assert only(table, quantity="cv_ratio_form_2", prompt_id="p0", rule="dapo")["holds"] in ("holds", "undetermined")
    assert only(table, quantity="cv_ratio_form_2", prompt_id="p0", rule="vl_norm", alpha=1.0)["holds"] == "by algebra"
    assert only(table, quantity="cv_ratio_form_2", prompt_id="p0", rule="vl_norm", alpha=2.0)["holds"] == "not claimed"
    dapo, plain = (
        only(table, quantity="cv_ratio_form_2", prompt_id="p0", rule=r)["value"] for r in ("dapo", "dr_grpo")
    )
    assert dapo == pytest.approx(plain)
    assert (pick(table, quantity="cv_ratio_form_1", rule="dapo")["value"] >= 1).all()
    pooled = only(table, quantity="cv_ratio_form_2", prompt_id=None, rule="dapo", estimand="these prompts")
    across = only(table, quantity="cv_ratio_form_2", prompt_id=None, rule="dapo", estimand="prompts like these")
    assert math.isnan(across["value"]), "two prompts are too few"
    each = pick(table, quantity="cv_ratio_form_2", rule="dapo")
    each = each[each["prompt_id"].notna()]["value"]
    assert pooled["value"] == pytest.approx(math.exp(np.log(each).mean()))
    # A law that falls with length turns the order round.
    falling = prompts(1, n=128, targets=("a",), beta=-2.0, signal=0.0)
    row = only(form_table(falling, rules=("dapo",), advantage="score", seed=0), quantity="cv_ratio_form_2")
    assert (row["verdict"], row["holds"]) == ("lower", "violated")
    silent = [replace(groups[0], rewards=np.ones(64)), groups[1]]
    table = form_table(silent, seed=0)
    assert set(table[table["quantity"].str.startswith("cv_ratio")]["prompt_id"].dropna()) == {"p1"}
    one, pooled = (
        only(table, quantity="cv_ratio_form_2", prompt_id=name, rule="dapo", estimand="these prompts")["value"]
        for name in ("p1", None)
    )
    assert pooled == pytest.approx(one)


def test_further_references_are_tables_of_their_own():
    groups = prompts(2, n=40, targets=("a", "b"))
    both = form_table(groups, further_references=("dapo", "grpo"), seed=3)
    for reference in ("grpo", "dapo"):
        alone = form_table(groups, reference=reference, seed=3)
        same(pick(both, against=reference), pick(alone, against=reference))
    assert set(both["against"].dropna()) == {"grpo", "dapo"}


def test_the_order_against_dapo_and_in_form_3():
    groups = prompts(5, n=64, targets=("a",), beta=1.0, signal=4.0)
    table = form_table(groups, reference="dapo", seed=0)
    assert set(table["against"].dropna()) == {"dapo"}
    row = only(table, quantity="cv_ratio_form_1", prompt_id="p0", rule="vl_norm", alpha=0.5)
    assert (row["paper"], row["holds"]) == ("at most 1", "holds")
    assert row["value"] < 1
    one = only(table, quantity="cv_ratio_form_1", prompt_id="p0", rule="grpo")
    other = only(form_table(groups, seed=0), quantity="cv_ratio_form_1", prompt_id="p0", rule="dapo")
    assert one["value"] == pytest.approx(1 / other["value"])
    assert only(table, quantity="cv_ratio_form_2", prompt_id="p0", rule="dr_grpo")["holds"] == "by algebra"
    across = only(table, quantity="cv_ratio_form_2", prompt_id=None, rule="grpo", estimand="prompts like these")
    logs = np.log(pick(table, quantity="cv_ratio_form_2", rule="grpo").dropna(subset=["prompt_id"])["value"])
    half = stats.t.ppf(0.975, 4) * logs.std(ddof=1) / math.sqrt(5)
    here = only(table, quantity="cv_ratio_form_2", prompt_id=None, rule="grpo", estimand="these prompts")
    low, high = math.exp(logs.mean() - half), math.exp(logs.mean() + half)
    assert (across["low"], across["high"]) == pytest.approx((min(low, here["low"]), max(high, here["high"])))
    total = total_form(cv_table(groups, reference="dapo", permutations=32, seed=0))
    assert set(total["quantity"]) == {"cv_ratio_form_3"}
    assert set(total["against"]) == {"dapo"}
    row = only(total, prompt_id="p0", rule="dr_grpo")
    assert (row["paper"], row["holds"]) == ("equal", paper_order.judge("equal", row["low"], row["high"]))


def test_the_whole_order_can_hold_in_form_3():
    groups = prompts(4, n=256, targets=("a",), beta=2.0, signal=3.0)
    rules = ("grpo", "dapo", "vl_norm")
    table = cv_table(groups, rules=rules, alphas=(1.0,), equality_margin=0.4, permutations=64, seed=0)
    pooled = pick(total_form(table), prompt_id=None, estimand="these prompts")
    assert dict(zip(pooled["rule"], pooled["holds"], strict=True)) == {"dapo": "holds", "vl_norm": "holds"}
    assert paper_order.whole_order(list(pooled["holds"])) == "holds"
    narrow = cv_table(groups, rules=rules, alphas=(1.0,), equality_margin=1e-4, permutations=64, seed=0)
    row = only(total_form(narrow), prompt_id=None, estimand="these prompts", rule="vl_norm")
    assert row["holds"] == "violated" or row["holds_needs"] > 256


def test_the_papers_order_on_any_two_rules():
    rule = {name: find_rule(name) for name in ("grpo", "dapo", "dr_grpo", "vl_norm", "token_sum")}
    for one, two, expected in (
        ("grpo", ("vl_norm", 1.0), "equal"),
        ("dapo", "dr_grpo", "equal"),
        ("dapo", "grpo", "at least 1"),
        (("vl_norm", 0.75), "dapo", "at most 1"),
        (("vl_norm", 0.0), "dapo", "equal"),
        (("vl_norm", 1.5), "grpo", "nothing"),
        ("token_sum", "grpo", "nothing"),
    ):
        pair = [(rule[x], None) if isinstance(x, str) else (rule[x[0]], x[1]) for x in (one, two)]
        assert paper_order.claim(*pair) == expected, (one, two)
    assert paper_order.judge("at most 1", 0.5, 0.9) == "holds"
    assert paper_order.judge("at most 1", 1.1, 1.9) == "violated"
    assert paper_order.judge("at least 1", 0.9, math.inf) == "undetermined"
    assert paper_order.judge("equal", 0.9, 1.1) == "undetermined"
    assert paper_order.judge("equal", 1.04, 1.1) == "undetermined"
    assert paper_order.judge("equal", 1.06, 1.1) == "violated"
    assert paper_order.judge("equal", 0.96, 1.04) == "holds"
    assert paper_order.judge("equal", 0.8, 0.96) == "undetermined"
    assert paper_order.judge("equal", 0.8, 0.9, margin=0.3) == "holds"
    assert paper_order.judge("equal", math.nan, math.nan) == "undetermined"
    assert paper_order.whole_order(["holds", "by algebra", "not claimed"]) == "holds"
    assert paper_order.whole_order(["holds", "undetermined"]) == "undetermined"
    assert paper_order.whole_order(["holds", "violated", "undetermined"]) == "violated"
    assert paper_order.whole_order(["by algebra", "by algebra"]) == "holds"
    assert paper_order.whole_order(["not claimed"]) == "not tested"


@pytest.mark.parametrize("claimed", ["equal", "at least 1", "at most 1"])
def test_a_ratio_of_1_up_to_rounding_bears_out_every_claim(claimed):
    assert paper_order.judge(claimed, 1.0, 1.0) == "holds"
    assert paper_order.judge(claimed, 1 - 1e-13, 1 + 1e-13) == "holds"
    assert paper_order.side(1 - 1e-13, 1.0) == "equal"


def test_what_would_decide_a_claim():
    def ratio(value, low, high):
        return Estimate(value=value, low=low, high=high, level=0.95, method="", n=128, clusters=2, seed=0)

    # Half-width 0.2 up to the margin's end 0.05 away on the log scale: 64 (0.2 / 0.05)^2.
    one = ratio(1.0, math.exp(-0.2), math.exp(0.2))
    assert paper_order.needed_to_judge("equal", one, margin=math.expm1(0.05)) == pytest.approx(64 * 16, abs=1)
    two = ratio(math.exp(0.1), math.exp(-0.1), math.exp(0.3))
    assert paper_order.needed_to_judge("at least 1", two) == pytest.approx(64 * 4, abs=1)
    assert math.isnan(paper_order.needed_to_judge("at least 1", ratio(1.5, 1.2, 1.9)))
    assert paper_order.needed_to_judge("at least 1", ratio(1.0, 0.9, 1.1)) == math.inf


def test_one_length_only_holds_alike_in_every_form():
    groups = [replace(g, lengths=np.full_like(g.lengths, 50.0)) for g in prompts(1, n=64, targets=("a",))]
    parts = [form_table(groups, reference=r, seed=0) for r in ("grpo", "dapo")]
    total = cv_table(groups, further_references=("dapo",), permutations=64, seed=0)
    ratios = total[total["quantity"] == "cv_ratio"]
    assert set(ratios["verdict"]) == {"equal"}
    for table in (*parts, total_form(total)):
        judged = table[table["paper"].notna() & (table["paper"] != "nothing")]
        for _, own in judged.groupby("quantity"):
            assert set(own["holds"]) <= {"holds", "by algebra"}
            assert paper_order.whole_order(list(own["holds"])) == "holds"
