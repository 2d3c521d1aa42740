"""The sections of a report, in order, each with its words, figures and tables."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gradvar.report.laws import CLASS_COLUMNS, class_table, contradictions, family_table
from gradvar.report.numbers import interval, number, tone
from gradvar.report.records import Material, Section, Table, cell
from gradvar.report.tables import aggregator_table, estimates_table, verdict_cell
from gradvar.runs import target_label
from gradvar.runs.rows import ALL_RESPONSES, PROMPTS_LIKE_THESE, overall

_EXPONENTS = ("deviation_exponent", "within_exponent", "exponent_difference")
_ASSUMPTIONS = {
    "identity_signal": ("0", "The rollouts come from this policy (E s = 0)"),
    "entropy_surplus": ("0", "Tokens as likely as the policy's own (nats)"),
    "token_covariance_share": ("1", "Token gradients are uncorrelated (share)"),
    "deviation_exponent": ("2", "Var(g) = V L, by the deviation (exponent)"),
    "within_exponent": ("2", "Var(g) = V L, by the within-length variance (exponent)"),
    "baseline_ratio": ("3", "Responses independent given the group's baseline (ratio)"),
    "between_length_share": ("4", "E[g | L] = grad J, whatever the length (share)"),
}


def sections(material: Material) -> list[Section]:
    """Return every section; one whose data are missing says which command makes them."""
    return [
        _audit(material),
        _law(material),
        _aggregators(material),
        _alpha(material),
        _group_size(material),
        _tokens(material),
        _pressure(material),
        _responses(material),
        _rollouts(material),
        _sampler(material),
        _checks(material),
        _limits(material),
        _provenance(material),
    ]


def _audit(material: Material) -> Section:
    tables: list[Table] = []
    table = material.tables.get("audit")
    if table is not None:
        rows = []
        for quantity, (numeral, claim) in _ASSUMPTIONS.items():
            found = table[table["quantity"] == quantity]
            own = found[found["target"].isin([material.target, "any"])]
            own = overall(own[own["scope"].isna() | (own["scope"] == ALL_RESPONSES)])
            if own.empty:
                continue
            row = own.iloc[0]
            value = cell(number(row["value"])) if pd.notna(row["value"]) else cell(row["method"])
            cells = [value, cell(interval(row)), cell(_margin(row)), verdict_cell(row), cell(number(row["n"]))]
            rows.append([cell(numeral), cell(claim), *cells])
        columns = ["#", "assumption", "figure", "interval", "margin", "verdict", "n"]
        caption = f"What the theory takes for granted: {target_label(material.target)}, over all prompts"
        tables.append(Table(caption=caption, columns=columns, rows=rows, words=2))
    words = [
        "Supported only where the whole interval lies inside the margin, rejected where it lies wholly outside, else "
        "undetermined: a difference that is not significant is no support."
    ]
    return Section(
        key="audit", title="Assumptions", words=words, tables=tables,
        drawings=material.drawings.get("audit", ()), missing=_lacking(material, "audit"),
    )  # fmt: skip


def _margin(row: pd.Series) -> str:
    low, high = row.get("margin_low"), row.get("margin_high")
    if high is None or pd.isna(high):
        return ""
    return f"below {number(high)}" if low is None or not float(low) > -1e300 else f"{number(low)} to {number(high)}"


def _law(material: Material) -> Section:
    tables = []
    law = material.tables.get("law")
    if law is not None:
        rows = law[law["quantity"].isin(_EXPONENTS)]
        every = rows[rows["scope"] == ALL_RESPONSES]
        by_target = pd.concat([overall(part) for _, part in every.groupby("target", sort=False)])
        labels = [("target", "weights"), ("advantage", "A"), ("quantity", "of the")]
        tables.append(estimates_table(by_target, "Exponent by weight matrix", labels, what="exponent"))
        classes = overall(rows[rows["scope"] != ALL_RESPONSES], target=material.target)
        if len(classes):
            labels = [("scope", "responses"), ("advantage", "A"), ("quantity", "of the")]
            tables.append(estimates_table(classes, "Exponent by reward class", labels, what="exponent"))
        between = [row for row in class_table(law, material.target) if row[-1]]
        if between:
            caption = "Exponents between prompts: standard deviation tau, and p of no difference (Cochran's Q)"
            cells = [[cell(text) for text in (*row[:3], *row[-2:])] for row in between]
            columns = [*CLASS_COLUMNS[:3], *CLASS_COLUMNS[-2:]]
            tables.append(Table(caption=caption, columns=columns, rows=cells, words=3))
        columns, families = family_table(law, material.target)
        if families:
            caption = (
                "Which family fits: share of the constant family's quasi-deviance explained, and how straight it is"
            )
            cells = [[cell(text) for text in row] for row in families]
            tables.append(Table(caption=caption, columns=columns, rows=cells, words=1))
    words = [
        "Deviation is the squared distance from the mean gradient, as the paper's figures show it; within-length "
        "variance is what remains among responses of like length, and what least-variance weights depend on. A = 1 is "
        f"the score alone. An exponent inside 1 ± {material.margin:g} with its whole interval counts as proportional.",
        *([] if law is None else [f"{one}." for one in contradictions(law, material.target)]),
    ]
    keys = ("length_law", "exponents", "atlas")
    drawings = [drawing for key in keys for drawing in material.drawings.get(key, ())]
    return Section(
        key="law", title="Variance against length", words=words, tables=tables, drawings=drawings,
        missing=_lacking(material, "law"),
    )  # fmt: skip


def _aggregators(material: Material) -> Section:
    tables = []
    cv, forms, alpha = (material.tables.get(name) for name in ("cv", "forms", "alpha"))
    if cv is not None:
        mine = overall(cv[cv["rule"].notna()], target=material.target)
        of_alpha = None if alpha is None else overall(alpha[alpha["rule"].notna()], target=material.target)
        if of_alpha is not None:  # beside one another only what was made for the same updates
            same = of_alpha["group_size"].eq(material.group_size) & of_alpha["advantage"].eq(material.cv_advantage)
            of_alpha = of_alpha[same.fillna(False)]
        if len(mine):
            caption = f"Noise, bias, efficiency: {target_label(material.target)}, groups of {material.group_size}"
            tables.append(aggregator_table(mine, of_alpha, caption))
    if forms is not None:
        all_forms = overall(forms[forms["rule"].notna()], target=material.target)
        own = all_forms["quantity"].isin(["cv_form_1", "cv_form_2", "cv_form_3"])
        labels = [("rule", "aggregator"), ("quantity", "form")]
        if own.any():
            values = all_forms[own].sort_values(["rule", "alpha", "quantity"], kind="stable")
            tables.append(estimates_table(values, "The CV itself, in the three forms", labels, what="CV"))
        ratios = all_forms[~own]
        if len(ratios):
            caption = "CV over that of grpo and dapo, in the three forms, and what the paper's order says of it"
            more = _there(ratios, "against", "paper", "holds")
            tables.append(estimates_table(ratios, caption, labels, what="ratio", more=more))
    words = [
        "The coefficient of variation is an update's noise over its signal: lower is better. Form 1 is the paper's "
        "formula; form 2 puts the measured variance in its place; form 3, the total, has random lengths as training "
        "sees them, and is the one to act on. Cosine 1 is unbiased; efficiency η = cos² / (1 + CV²) joins the two, and "
        "no learning rate changes it. Ratios are paired: the same groups for both aggregators."
    ]
    keys = ("aggregators", "forms", "bias", "efficiency")
    drawings = [drawing for key in keys for drawing in material.drawings.get(key, ())]
    batches = material.tables.get("batches")
    if batches is not None:
        rows = batches[
            batches["quantity"].isin(["cv", "cv_given_prompts", "scope_ratio"]) & (batches["target"] == material.target)
        ]
        if len(rows):
            labels = [("rule", "aggregator"), ("quantity", "quantity"), ("scope", "weighted over")]
            more = _there(rows, "batch_prompts", "estimand")
            tables.append(estimates_table(rows, "Updates from a batch of several prompts", labels, more=more))
    return Section(
        key="aggregators", title="Aggregators", words=words, tables=tables, drawings=drawings, most_panels=1,
        missing=_lacking(material, "cv", "alpha", "batches"),
    )  # fmt: skip


def _alpha(material: Material) -> Section:
    tables = []
    alpha = material.tables.get("alpha")
    if alpha is not None:
        rows = overall(alpha[alpha["quantity"].isin(["alpha_star_eta", "alpha_star_cv"])], target=material.target)
        if len(rows):
            words = {"alpha_star_eta": "highest efficiency", "alpha_star_cv": "lowest CV"}
            rows = rows.assign(best=rows["quantity"].map(words))
            caption = "Best alpha of vl_norm, and the alphas not told apart from it"
            tables.append(estimates_table(rows, caption, [("best", "by")], what="alpha"))
        ratios = overall(alpha[alpha["quantity"] == "eta_ratio"], target=material.target)
        ratios = ratios[ratios["value"].notna()]
        if len(ratios):
            best = ratios["against_alpha"].iloc[0]
            caption = f"Efficiency over that of vl_norm at its best alpha = {best:g}, on the same groups"
            tables.append(estimates_table(ratios, caption, [("rule", "aggregator")], what="ratio"))
    words_ = [material.advice] if material.advice else []
    return Section(
        key="alpha", title="Which alpha", words=words_, tables=tables, drawings=material.drawings.get("alpha", ()),
        most_panels=1, missing=_lacking(material, "alpha"),
    )  # fmt: skip


def _group_size(material: Material) -> Section:
    tables = []
    planning = material.tables.get("planning")
    if planning is not None:
        rows = overall(planning[planning["quantity"].isin(["cv", "eta"])], target=material.target)
        rows = rows[rows["group_size"].notna()]
        labels = [("rule", "aggregator"), ("group_size", "responses"), ("quantity", "quantity")]
        if len(rows):
            tables.append(estimates_table(rows, "CV and efficiency by group size", labels))
        rows = planning[(planning["quantity"] == "responses_for_cv_1") & (planning["target"] == material.target)]
        if len(rows):
            caption = "Noise scale: responses to a prompt whose update has as much noise as signal"
            # Without an interval nothing is said of prompts like these.
            rows = rows[(rows["estimand"] != PROMPTS_LIKE_THESE) | rows["low"].notna()] if "estimand" in rows else rows
            again = [("estimand", "drawn again")] if "estimand" in rows else []
            labels = [("rule", "aggregator"), ("prompt_id", "prompt"), *again]
            tables.append(estimates_table(rows, caption, labels, what="responses"))
        rows = planning[(planning["quantity"] == "gradient_noise_scale") & (planning["target"] == material.target)]
        if len(rows):
            rows = rows[(rows["estimand"] != PROMPTS_LIKE_THESE) | rows["low"].notna()]
            caption = "Noise scale of the gradient itself: tr Σ / ||grad J||² of one response, A = r - E r"
            labels = [("prompt_id", "prompt"), ("estimand", "drawn again")]
            tables.append(estimates_table(rows, caption, labels, what="responses"))
        silent = planning[(planning["quantity"] == "silent_share") & (planning["target"] == material.target)]
        silent = silent[silent["group_size"] == material.group_size]
        if "estimand" in silent:  # pooled: the one with an interval
            silent = silent[silent["prompt_id"].notna() | (silent["estimand"] == PROMPTS_LIKE_THESE)]
        if len(silent):
            caption = f"Share of groups of {material.group_size} whose rewards are all equal (no gradient)"
            tables.append(estimates_table(silent, caption, [("prompt_id", "prompt")], what="share"))
    words = ["Sizes of which any prompt holds fewer than three groups are extrapolated, and drawn hollow."]
    return Section(
        key="group-size", title="Noise scale and group size", words=words, tables=tables,
        drawings=material.drawings.get("group_size", ()), missing=_lacking(material, "planning"),
    )  # fmt: skip


def _tokens(material: Material) -> Section:
    words = [
        "Were token gradients uncorrelated, the squared score would grow in proportion along each response as it does "
        "between responses, and no share of it would come from pairs of tokens."
    ]
    keys = ("token_covariance", "prefixes")
    drawings = [drawing for key in keys for drawing in material.drawings.get(key, ())]
    return Section(key="tokens", title="Tokens inside a response", words=words, drawings=drawings)


def _pressure(material: Material) -> Section:
    tables = []
    alpha = material.tables.get("alpha")
    if alpha is not None:
        pressures = ("length_pressure", "entropy_pressure")
        rows = overall(alpha[alpha["quantity"].isin(pressures) & alpha["rule"].notna()], target=material.target)
        if len(rows):
            rows = rows.assign(quantity=rows["quantity"].str.removesuffix("_pressure"))
            labels = [("quantity", "on"), ("rule", "aggregator")]
            tables.append(estimates_table(rows, "Pressure by aggregator", labels, what="per unit of reward"))
    words = ["Which way an update pushes mean length (tokens) and entropy (nats), for one unit of expected reward."]
    return Section(
        key="pressure", title="Pressure on length and entropy", words=words, tables=tables,
        drawings=material.drawings.get("pressure", ()), missing=_lacking(material, "alpha"),
    )  # fmt: skip


def _responses(material: Material) -> Section:
    return Section(key="responses", title="Lengths and rewards", drawings=material.drawings.get("responses", ()))


def _rollouts(material: Material) -> Section:
    words = [
        "A sample of each prompt's responses, evenly by length, with the largest deviation and a truncated one among "
        "them. Characters that cannot be seen are named."
    ]
    if material.left_out:
        words.append(f"{material.left_out} further prompts are in the run directory and not shown here.")
    return Section(key="rollouts", title="The rollouts", words=words, samples=material.samples)


def _sampler(material: Material) -> Section:
    tables = []
    if len(material.sampler):
        rows = []
        for row in material.sampler.to_dict("records"):
            sizes = [cell(number(row[name])) for name in ("mean_abs", "max_abs", "mean_difference")]
            rows.append([cell(row["prompt_id"]), *sizes, cell(row["n_tokens"])])
        columns = ["prompt", "mean |difference|", "largest", "mean difference", "tokens"]
        tables.append(Table(caption="Sampler minus policy, nats a token", columns=columns, rows=rows))
    identity = material.tables.get("identity")
    if identity is not None:
        rows_ = identity[identity["quantity"] == "entropy_surplus"]
        if len(rows_):
            caption = "Entropy balance E(log p + entropy): 0 under the policy, above 0 for a sampler that is too sure"
            tables.append(estimates_table(rows_, caption, [("prompt_id", "prompt")], what="nats a response"))
        signals = identity[identity["quantity"] == "identity_signal"]
        signals = pd.concat([overall(part) for _, part in signals.groupby("target", sort=False)])
        caption = "Score identity E s = 0: ||E s||² over the noise in a group"
        tables.append(estimates_table(signals, caption, [("target", "weights")], what="share"))
    return Section(
        key="sampler", title="Sampler against policy", tables=tables, drawings=material.drawings.get("sampler", ()),
        missing=_lacking(material, "identity"),
    )  # fmt: skip


def _checks(material: Material) -> Section:
    tables = []
    check, proxies = material.tables.get("check"), material.tables.get("proxies")
    if check is not None:
        rows = _worst(check[check["verdict"].notna() & ~check["quantity"].isin(["identity_signal", "entropy_surplus"])])
        if len(rows):
            labels = [("quantity", "check"), ("scope", "measured"), ("target", "weights"), ("prompt_id", "prompt")]
            caption = "Checks of the measurement: the worst of each over weights and prompts"
            tables.append(estimates_table(rows, caption, labels))
    if proxies is not None:
        rows = overall(proxies[proxies["value"].notna()], target=material.target)
        if len(rows):
            labels = [("proxy", "proxy"), ("truth", "of"), ("quantity", "quantity"), ("scope", "prompts")]
            caption = "How well cheap numbers stand for the exact gradient"
            tables.append(estimates_table(rows, caption, labels))
    return Section(
        key="checks", title="Checks and proxies", tables=tables, missing=_lacking(material, "check", "proxies")
    )


def _worst(rows: pd.DataFrame) -> pd.DataFrame:
    """Return of each check the row that fails or lies farthest from 0."""
    rank = rows.assign(scope=rows["scope"].fillna(""), bad=rows["verdict"].map(tone) == "bad", far=rows["value"].abs())
    rank = rank.sort_values(["bad", "far"], ascending=False, kind="stable")
    return rank.drop_duplicates(["quantity", "scope"]).sort_index()


def _limits(material: Material) -> Section:
    words = [
        "Per weight matrix, in Euclidean geometry: Adam's preconditioning would change CV and efficiency.",
        "On policy: ratio 1, no clipping, no KL term. Nothing here is a training run.",
        "Verdicts hold for these prompts; “prompts like these” needs at least 4, drawn as the others would be.",
        "Ratios of vl_norm rest on rare short responses, and their intervals can be too narrow.",
        "Pooled rows are an equal-prompt summary, not the update of a batch of several prompts.",
        *material.notes,
    ]
    return Section(key="limits", title="Limits of what was measured", words=words)


def _provenance(material: Material) -> Section:
    rows = [[cell(name), cell(value)] for name, value in material.facts]
    table = Table(caption="Where the numbers come from", columns=["what", "value"], rows=rows, words=2)
    code = "\n".join(material.commands) + "\n\n# the whole configuration\n" + material.config
    return Section(key="provenance", title="Provenance and how to reproduce", tables=[table], code=code)


def _lacking(material: Material, *names: str) -> Sequence[str]:
    return list(dict.fromkeys(material.missing[name] for name in names if name in material.missing))


def _there(rows: pd.DataFrame, *names: str) -> list[str]:
    return [name for name in names if name in rows and rows[name].notna().any()]
