"""The answer in words: what a reader should know before any figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from gradvar.report.numbers import estimate, interval, number, rule_name, tone
from gradvar.report.records import Finding, Material
from gradvar.runs import target_label
from gradvar.runs.rows import ALL_RESPONSES, PROMPTS_LIKE_THESE, overall, row_of

JUDGED = {
    "token_covariance_share": "token gradients uncorrelated",
    "deviation_exponent": "deviation proportional to length",
    "within_exponent": "within-length variance proportional to length",
    "baseline_ratio": "responses independent given the group's baseline",
    "between_length_share": "mean gradient the same at every length",
}
"""Judged quantities of the audit, in words."""
_WHAT = {"within": "variance among responses of like length", "deviation": "deviation from the mean gradient"}


def findings(material: Material) -> list[Finding]:
    """Return the answer, sentence by sentence; a sampler that does not match its policy comes first."""
    found = [*_sampler(material), *_law(material), _noise(material), _efficiency(material), _assumptions(material)]
    if material.advice:
        found.append(Finding(head="Which alpha?", text=material.advice))
    found.append(_rests_on(material))
    return [one for one in found if one is not None]


def _sampler(material: Material) -> list[Finding]:
    head = "These rollouts do not come from this policy"
    after = " Another temperature, top-p, top-k, checkpoint or tokenizer: nothing below holds for this policy."
    alarms = []
    if material.disagreement:
        text = material.disagreement.replace("SAMPLER AND POLICY DISAGREE", "Sampler and policy disagree")
        alarms.append(Finding(head=head, text=f"{text}.", tone="alarm"))
    identity = material.tables.get("identity")
    if identity is None:
        return alarms
    rows = overall(identity)
    surplus, p = row_of(rows, quantity="entropy_surplus"), row_of(rows, quantity="entropy_p_value")
    signal = row_of(rows, quantity="identity_signal", target=material.target)
    if surplus is not None and surplus["verdict"] == "rejected":
        sure = "surer" if surplus["value"] > 0 else "less sure"
        text = (
            f"Their sampler was {sure} than the policy: E(log p + entropy) is {estimate(surplus)} nats a response "
            f"(p {number(p['value'])}), and 0 for the policy's own."
        )
        alarms.append(Finding(head=head, text=text + after, tone="alarm"))
    if signal is not None and signal["verdict"] == "rejected":
        text = f"The mean score E s is not 0: its square is {estimate(signal)} of the noise in a group."
        alarms.append(Finding(head=head, text=text + after, tone="alarm"))
    if alarms or signal is None:
        return alarms
    text = f"Mean score 0: {signal['verdict']} (its square is {estimate(signal)} of a group's noise)"
    if surplus is not None:
        text += f"; tokens as likely as the policy's own: {surplus['verdict']} (p {number(p['value'])})"
    whole = "good" if signal["verdict"] == "supported" else "open"
    return [Finding(head="Do the rollouts come from this policy?", text=f"{text}.", tone=whole)]


def _law(material: Material) -> list[Finding]:
    law = material.tables.get("law")
    if law is None:
        return []
    rows = law[(law["target"] == material.target) & (law["scope"] == ALL_RESPONSES)]
    found = []
    for what, words in _WHAT.items():
        parts, verdicts = [], []
        for kind in dict.fromkeys([material.advantage, "score"]):
            own = rows[(rows["advantage"] == kind) & (rows["quantity"] == f"{what}_exponent")]
            row = row_of(overall(own)) if len(own) else None
            if row is None:
                continue
            name = "the score alone" if kind == "score" else f"the gradient with {kind} advantages"
            if pd.isna(row["value"]):
                parts.append(f"for {name} it could not be fitted ({row['method']})")
                continue
            verdicts.append(str(row["verdict"]))
            across = row_of(own[own["prompt_id"].isna()], estimand=PROMPTS_LIKE_THESE)
            more = f"; prompts like these {interval(across)}" if across is not None and pd.notna(across["low"]) else ""
            least = "at least " if row.get("n_needed_at_least") else ""
            needed = (
                f", {least}{number(row['n_needed'])} responses would tell" if row["verdict"] == "undetermined" else ""
            )
            parts.append(
                f"for {name} it grows as length to the power {number(row['value'])} {interval(row)}{more}: "
                f"{row['verdict']}{needed}"
            )
        if parts:
            first = verdicts[0] if verdicts else ""
            text = ". ".join(part[0].upper() + part[1:] for part in parts)
            found.append(Finding(head=f"Is the {words} proportional to length?", text=f"{text}.", tone=tone(first)))
    return found


def _noise(material: Material) -> Finding | None:
    cv = material.tables.get("cv")
    if cv is None:
        return None
    rows = overall(cv[(cv["quantity"] == "cv") & cv["rule"].notna()], target=material.target)
    head = "Which aggregator has the least noise?"
    if rows.empty or rows["value"].isna().all():
        return Finding(
            head=head, text="The data cannot tell: no aggregator's signal stands above the noise.", tone="open"
        )
    best = rows.iloc[int(np.nanargmin(rows["value"]))]
    text = f"{rule_name(best)}: total CV {estimate(best)} in a group of {material.group_size}"
    ratio = row_of(overall(cv, target=material.target), quantity="cv_ratio", rule=best["rule"], alpha=best["alpha"])
    beaten = False
    if ratio is not None and best["rule"] != "grpo":
        beaten = bool(ratio["high"] < 1)
        text += f", {estimate(ratio)} times grpo's (paired{'' if beaten else ': the two cannot be told apart'})"
    return Finding(head=head, text=f"{text}. {_near(rows, best, lower=True, beaten=beaten)}")


def _efficiency(material: Material) -> Finding | None:
    alpha = material.tables.get("alpha")
    if alpha is None:
        return None
    rows = overall(alpha[(alpha["quantity"] == "eta") & alpha["rule"].notna()], target=material.target)
    head = "Which makes the most of an update?"
    if rows.empty or rows["value"].isna().all():
        return Finding(head=head, text="The data cannot tell: no signal above the noise.", tone="open")
    best = rows.iloc[int(np.nanargmax(rows["value"]))]
    text = f"{rule_name(best)}: efficiency {estimate(best)} (bias and noise together; 1 would be a perfect update)"
    return Finding(head=head, text=f"{text}. {_near(rows, best, lower=False)}")


def _assumptions(material: Material) -> Finding | None:
    audit = material.tables.get("audit")
    if audit is None:
        return None
    rows = audit[(audit["target"] == material.target) & audit["quantity"].isin(JUDGED)]
    rows = overall(rows[rows["scope"].isna() | (rows["scope"] == ALL_RESPONSES)])
    said = []
    for verdict in dict.fromkeys(rows["verdict"].dropna()):
        of = [JUDGED[quantity] for quantity in rows.loc[rows["verdict"] == verdict, "quantity"]]
        said.append(f"{verdict}: {', '.join(of)}")
    if not said:
        return None
    text = ". ".join(one[0].upper() + one[1:] for one in said)
    return Finding(head="What the theory assumes", text=f"{text}.", tone="bad" if "rejected" in text.lower() else "")


def _near(rows: pd.DataFrame, best: Any, *, lower: bool, beaten: bool = False) -> str:
    """Say which others' intervals reach the best one's; a grpo that pairing tells apart is left out."""
    others = rows[(rows.index != best.name) & ~((rows["rule"] == "grpo") & beaten)]
    if others.empty:
        return ""
    reach = others["low"] <= best["high"] if lower else others["high"] >= best["low"]
    apart = [rule_name(row) for row in others[~reach & others["value"].notna()].to_dict("records")]
    if not apart:
        return f"Of the {'others' if beaten else 'rest'} no interval lies apart from its own."
    return f"Apart from its interval lie {', '.join(apart)}; the others' reach it."


def _advantages(material: Material) -> str:
    if material.advantage == material.cv_advantage:
        return f"{material.advantage} advantages"
    return f"{material.advantage} advantages (the law), {material.cv_advantage} (the aggregators)"


def _rests_on(material: Material) -> Finding:
    text = (
        f"{material.responses} responses to {material.prompts} prompt{'' if material.prompts == 1 else 's'}, "
        f"{target_label(material.target)}, "
        f"{_advantages(material)}, groups of {material.group_size}. Intervals at {100 * material.level:g}% are "
        "for these prompts with responses drawn again"
    )
    text += "; “prompts like these” adds the spread between prompts" if material.prompts >= 4 else (
        "; fewer than 4 prompts say nothing about others"
    )  # fmt: skip
    law = material.tables.get("law")
    if law is not None:
        open_ = overall(law[law["quantity"].isin(["deviation_exponent", "within_exponent"])], target=material.target)
        count = int((open_["verdict"] == "undetermined").sum())
        text += f". {count} of {len(open_)} verdicts on the exponent are undetermined"
    return Finding(head="What it rests on", text=f"{text}.")
