"""The rivals give the same Gram as gradvar; the tables say what was measured; mistakes end in one line."""

import csv
import re
import warnings
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks.gradients import __main__ as command
from benchmarks.gradients import memory, tables
from benchmarks.gradients.common import batches
from benchmarks.gradients.process import RivalError, RivalProcess
from benchmarks.gradients.rivals import BOUNDED, REFERENCE, RIVALS
from benchmarks.gradients.shapes import MODELS, Cell, draw_lengths, draw_tokens, make_work, parameter_count
from benchmarks.gradients.timing import Timing, deviation_error, gram_error, measure_cell

CELL = Cell(model="tiny", responses="tiny", targets=("last:qkv", "middle:qkv,mlp"), count=5, prompt=12)


@pytest.fixture(scope="module")
def reference():
    return RIVALS[REFERENCE].run(make_work(CELL), 0)


@pytest.mark.parametrize("name", [*RIVALS, BOUNDED.name])
def test_every_rival_gives_the_reference_gram(name, reference):
    rival = {**RIVALS, BOUNDED.name: BOUNDED}[name]
    if rival.package is not None and find_spec(rival.package) is None:
        pytest.skip(f"{rival.package} is not installed (make bench)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus, bergson and vmap each warn of their own ways
        grams = rival.run(make_work(CELL), 48)
    assert set(grams) == set(make_work(CELL).modules)
    assert gram_error(grams, reference) < min(rival.tolerance, 0.05)
    assert deviation_error(grams, reference) < 5 * rival.tolerance


def test_a_wrong_gram_stops_the_run(monkeypatch, reference):
    changed = {key: gram + 1e-3 * np.abs(gram).max() for key, gram in reference.items()}
    assert gram_error(changed, reference) == pytest.approx(1e-3, rel=1e-3)
    own = RivalProcess.run

    def wrong(self, members=None, token_budget=None):
        found, grams = own(self, members, token_budget)
        factor = 1.01 if self.name == "gradvar" else 1.0
        return found, {key: factor * gram for key, gram in grams.items()}

    monkeypatch.setattr(RivalProcess, "run", wrong)
    with pytest.raises(RivalError, match=r"gradvar on tiny.*is off by 1.0e-02"):
        measure_cell(CELL, ["gradvar"], repeats=1, threads=1, together=1, say=lambda line: None)


def test_repeats_take_turns_and_begin_with_another_each_time():
    told = []
    timings = measure_cell(CELL, ["gradvar", REFERENCE], repeats=3, threads=1, together=1, say=told.append)
    names = [re.search(r": (\S+) [0-9.]+ s$", line)[1] for line in told]
    first, second = names[:2]
    assert {first, second} == {"gradvar", REFERENCE}
    assert names == [first, second, second, first, first, second]
    assert all(len(timing.cpu) == 3 for timing in timings)


def test_a_process_says_its_error_and_measures_its_memory():
    with (
        RivalProcess("no such rival", CELL, 1) as process,
        pytest.raises(RivalError, match="KeyError: 'no such rival'"),
    ):
        process.wait_ready()
    with RivalProcess("gradvar", CELL, 1) as process:
        process.wait_ready()
        message, grams = process.run([0, 2])
        assert {gram.shape for gram in grams.values()} == {(2, 2)}
        assert message["cpu"] > 0
        assert 0 < message["peak"] - process.baseline < 2**30


def test_shapes_are_what_they_are_called():
    assert 26e6 < parameter_count("27M") < 28e6
    assert 145e6 < parameter_count("150M") < 155e6
    for responses, low, high in (("short", 20, 100), ("mixed", 50, 800)):
        cell = Cell(model="27M", responses=responses, targets=("last:qkv",))
        lengths = draw_lengths(cell)
        assert len(lengths) == 32
        assert low <= min(lengths) < max(lengths) <= high
        prompt, drawn = draw_tokens(cell)
        assert [len(response) for response in drawn] == lengths
        assert max(max(response) for response in [prompt, *drawn]) < MODELS["27M"]["vocab_size"]
        assert draw_tokens(cell) == (prompt, drawn)


def test_batches_hold_every_response_once_within_the_budget():
    work = make_work(CELL)
    made = batches(work, 48)
    assert sorted(i for batch in made for i in batch.members) == list(range(5))
    assert all(batch.ids.numel() <= 48 or len(batch.members) == 1 for batch in made)
    for batch in made:
        for i, labels in zip(batch.members, batch.labels, strict=True):
            assert labels[labels >= 0].tolist() == work.responses[i]


def timing(rival, *cpu, cell=CELL, **values):
    return Timing(cell=cell, rival=rival, cpu=list(cpu), wall=list(cpu), **values)


def test_tables(tmp_path):
    cell = Cell(model="27M", responses="short", targets=("last:qkv",))
    timings = [
        timing("gradvar", 1.0, 2.0, 4.0, cell=cell, memory=3 << 20, error=1e-7, deviation_error=2e-7),
        timing("autograd.grad", 1.2, 2.2, 8.0, cell=cell),
        timing("full backward", 3.0, 6.0, 12.0, cell=cell),
        timing("bergson", cell=cell, failure="not installed"),
    ]
    tables.write_csv(tmp_path / "t.csv", timings)
    with (tmp_path / "t.csv").open() as file:
        rows = {row["rival"]: row for row in csv.DictReader(file)}
    assert rows["gradvar"]["times_ours"] == "1.0"
    assert float(rows["autograd.grad"]["times_ours"]) == 1.2  # the median of 1.2, 1.1 and 2
    assert rows["bergson"]["cpu_s"] == ""
    assert rows["bergson"]["failure"] == "not installed"
    growth = [
        memory.Growth(cell=cell, rival=name, parameters=10**6, memory=size << 20, first_call=9 << 20, cpu=1.5)
        for name, size in (("gradvar", 5), ("autograd.grad", 70))
    ]
    tables.write_page(
        tmp_path / "t.md", timings, growth, command="the command", where="here", note="the machine was busy"
    )
    page = (tmp_path / "t.md").read_text()
    assert "| bergson | not installed |" in page
    assert "autograd.grad took 1.20 times our CPU time, aim 1.5" in page
    assert "full backward took" not in page
    assert "| last:qkv | 32 | 32.0 | 5 | 1.5 | 70 | 1.5 |" in page
    assert "**the machine was busy**" in page
    tables.replace_growth(tmp_path / "t.md", [replace(growth[0], memory=6 << 20)], made="anew")
    other = (tmp_path / "t.md").read_text()
    assert other.partition(tables.GROWTH_TITLE)[0] == page.partition(tables.GROWTH_TITLE)[0]
    assert "anew" in other
    assert "model: gradvar 9)" in other
    assert "| last:qkv | 32 | 32.0 | 6 | 1.5 |" in other
    assert "| 5 |" not in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "99B"], "argument --cells: expected one of 27M-short, .*received '99B'"),
        (["--rivals", "jax"], "argument --rivals: expected one of gradvar, .*received 'jax'"),
        (["--repeats", "0"], "argument --repeats: expected at least 1, received 0"),
        (["--only-memory", "--no-memory"], "argument --only-memory: not with --no-memory"),
        (["--only-memory", "--out", "."], "gradients.md is not there; make the whole page first"),
        (["--out", "/no/such/folder"], "argument --out: expected a folder, received '/no/such/folder'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    options = ["--tiny", "--cells", "tiny", "--rivals", "gradvar", "autograd.grad", "--repeats", "2", "--no-memory"]
    assert command.main([*options, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gradients.md").read_text()
    assert page in capsys.readouterr().out
    assert (tmp_path / "gradients.csv").read_text().startswith("model,responses,targets")
    assert "## tiny, tiny responses, last:qkv" in page
