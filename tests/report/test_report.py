"""The report of a small run: valid HTML, nothing from outside, hostile text tamed, the answer first."""

import itertools
import re
import time

import html5lib
import numpy as np
import pandas as pd
import pytest

from gradvar.errors import GradvarError
from gradvar.runs import create_run
from gradvar.stages import alpha, cv, draw_figures, fit, report
from tests.report.synthetic import HOSTILE, synthetic_run

NAMES = ("<b>0", 'q"1', "\u202etwo")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A fitted run whose texts are hostile, and its report."""
    path = tmp_path_factory.mktemp("report") / "run <i>"
    run = synthetic_run(path, texts=HOSTILE, prompt_text=HOSTILE[0] + HOSTILE[3], names=NAMES)
    settings = {"group_size": 4, "alphas": (1.0,)}
    fit(run, settings)
    cv(run, {})
    alpha(run, {})
    return run, report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(hostile):
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return parser.parse(hostile[1])  # a strict parser raises at the first error


def text_of(element):
    return "".join(element.itertext())


def test_it_is_html_without_script_handlers_or_network(page, hostile):
    tags = {element.tag for element in page.iter() if isinstance(element.tag, str)}
    assert not tags & {"script", "iframe", "object", "embed", "link", "img", "form", "input", "b", "i"}
    for element in page.iter():
        for name, value in element.attrib.items():
            assert not str(name).lower().startswith("on"), f"{element.tag} has a handler {name}"
            if str(name) in ("src", "href", "action") or str(name).endswith("href"):
                assert value.startswith(("#", "data:image/png")), value[:60]
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", hostile[1])
    assert "default-src 'none'" in hostile[1]
    assert len(hostile[1]) < 5_000_000


def test_ids_are_unique_and_links_reach_them(page):
    ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    for element in page.iter("a"):
        assert element.attrib["href"][1:] in ids


def test_hostile_text_is_shown_not_obeyed(page, hostile):
    words = text_of(page)
    assert "<script>alert(1)</script>" in words
    assert "{{ 7 * 7 }}" in words
    assert "&lt;b&gt;" in words  # entities stay what they were
    assert "of 100000 characters left out" in words
    assert "U+202E" in words
    unseen = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\uffff]"
    assert not re.findall(unseen, hostile[1])
    longest = max((text_of(element) for element in page.iter("pre")), key=len)
    assert len(longest) < 60_000


def test_headings_are_in_order_and_tables_and_figures_have_their_names(page):
    levels = [int(element.tag[1]) for element in page.iter() if re.fullmatch(r"h[1-6]", str(element.tag))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for table in page.iter("table"):
        assert text_of(table.find("caption"))
        assert all(cell.attrib.get("scope") in ("col", "row") for cell in table.iter("th"))
    pictures = [element for element in page.iter() if str(element.tag).endswith("svg")]
    assert len(pictures) > 10
    assert all(picture.attrib["role"] == "img" and picture.attrib["aria-label"] for picture in pictures)


def test_every_figure_has_its_numbers_beside_it(page):
    figures = list(page.iter("figure"))
    assert figures
    for figure in figures:
        inside = figure.find(".//details")
        assert inside is not None
        assert inside.find(".//table") is not None or "," in text_of(inside.find(".//pre"))


def test_the_answer_comes_first_and_missing_sections_name_their_command(page):
    heads = [text_of(element) for element in page.iter() if element.tag in ("h2", "h3")]
    assert heads[0] == "The answer"
    assert heads[1] == "Do the rollouts come from this policy?"
    assert any(head.startswith("Is the variance among responses") for head in heads)
    words = text_of(page)
    assert "gradvar audit" in words
    assert "--probes" in words
    assert "--prefixes" in words


def test_numbers_in_the_page_are_those_of_the_tables(page, hostile):
    law = hostile[0].table("law")
    row = law[
        law["prompt_id"].isna()
        & (law["target"] == "sum")
        & (law["quantity"] == "within_exponent")
        & (law["advantage"] == "score")
        & (law["scope"] == "all responses")
        & (law["estimand"] == "these prompts")
    ].iloc[0]
    assert f"the power {row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]" in text_of(page)


def test_a_sampler_that_is_another_comes_before_everything(tmp_path):
    run = synthetic_run(tmp_path / "run", shift=0.5, prompts=2)
    fit(run, {"group_size": 4})
    written = report(run).read_text(encoding="utf-8")
    first = re.search(r'<div class="finding (\w*)".*?<h3>(.*?)</h3>\s*<p>(.*?)</p>', written, re.DOTALL)
    assert first[1] == "alarm"
    assert first[2] == "These rollouts do not come from this policy"
    assert "Sampler and policy disagree on 2 of 2 prompts" in first[3]


def test_grams_alone_make_a_report_that_says_what_to_run(tmp_path):
    run = synthetic_run(tmp_path / "run", prompts=1, targets=("lm_head",))
    written = report(run).read_text(encoding="utf-8")
    html5lib.HTMLParser(strict=True).parse(written)
    for command in ("fit", "cv", "alpha", "audit", "check"):
        assert f"gradvar {command} " in written


def test_nothing_measured_is_a_refusal(tmp_path):
    with pytest.raises(GradvarError):
        report(create_run(tmp_path / "run"))


class Told:
    """A listener that remembers."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    warn = say

    def task(self, description, total, done=0):
        import contextlib

        return contextlib.nullcontext(lambda units: None)


@pytest.mark.slow
def test_figures_say_what_makes_those_that_are_missing(hostile):
    told = Told()
    paths = draw_figures(hostile[0], told)
    names = {path.stem for path in paths}
    assert {"length_law_score", "exponents_by_scope", "aggregator_cv", "cv_forms", "bias_noise", "efficiency"} <= names
    assert {"alpha_curve", "group_size", "pressure", "responses", "sampler_policy"} <= names
    assert {path.suffix for path in paths} == {".png", ".pdf"}
    said = " ".join(told.lines)
    assert "no figure audit: the run holds no table `audit`: `gradvar audit" in said
    assert "--probes" in said or "gradvar audit" in said
    assert "no figure prefixes" in said


def test_the_atlas_of_two_layers_and_the_refusal_of_one(hostile, tmp_path):
    paths = draw_figures(hostile[0], atlas=True)
    assert [path.name for path in paths] == ["atlas.png", "atlas.pdf"]
    run = synthetic_run(tmp_path / "run", prompts=1, targets=("model.layers.0.self_attn.q_proj",))
    fit(run, {"group_size": 4})
    with pytest.raises(GradvarError, match=r"measured on fewer than two layers.*--targets all:attn"):
        draw_figures(run, atlas=True)


@pytest.mark.slow
def test_sixty_four_prompts_stay_small_and_quick(tmp_path):
    run = synthetic_run(tmp_path / "run", prompts=64, n=24, texts=("word " * 2000,))
    fit(run, {"group_size": 4})
    start = time.process_time()
    path = report(run)
    assert time.process_time() - start < 60
    assert path.stat().st_size < 5_000_000


def test_the_numbers_of_a_figure_are_a_table_or_text():
    from gradvar.report import Table
    from gradvar.report.tables import numbers_table

    few = pd.DataFrame({"target": ["sum"], "value": [1.23456789], "low": [np.nan], "verdict": ["supported"]})
    table = numbers_table(few, "c")
    assert isinstance(table, Table)
    assert [cell.text for cell in table.rows[0]] == ["all targets", "1.235", "supported"]
    many = numbers_table(pd.concat([few] * 100), "c")
    assert many.splitlines()[1] == "all targets,1.23457,supported"
    assert len(many.splitlines()) == 101
