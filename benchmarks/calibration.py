"""Do the intervals hold what they promise? Remakes benchmarks/calibration.csv and benchmarks/calibration.md.

    OMP_NUM_THREADS=1 python -m benchmarks.calibration --workers 2

About 25 minutes on two idle cores. Each setting is written when it is done; with --only, --sizes or --kinds the other
rows of the table are kept as they are. To try one thing: --kinds groups --each 400 --out elsewhere.csv.

Gradients are drawn with a known law, mean, rank, token covariance and reward structure (tests/estimators/simulator.py),
the truth of every quantity is known (calibration_truths.py), and every draw counts, resolved or not. One row a setting
and quantity:
    coverage            share of draws whose interval does not exclude the truth, with its 95% Wilson interval
    too_high, too_low   share of draws whose interval lies above, below the truth
    at_edge             share of draws whose interval ends where the quantity does (a cosine of 1), on one side at least
    no_interval         share of draws without a bounded interval ("unresolved", or too few responses)
    bounded_coverage    coverage of the others alone
    median_bias, width  of the estimate; of the bounded intervals (median)
    wrong, rejected     share of draws whose verdict is wrong, and wholly outside the margin (where there is a verdict)
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import calibration_report
from benchmarks.calibration_batches import POPULATIONS, batch_intervals, batch_truths
from benchmarks.calibration_between import BETWEEN, between_intervals, between_truths
from benchmarks.calibration_draws import HERE, every_interval
from benchmarks.calibration_extras import SILENT, moments_of_extras, silent_intervals
from benchmarks.calibration_lines import from_many
from benchmarks.calibration_rows import KINDS, Setting, difference_of, row_of
from benchmarks.calibration_simulated import Found, bare, found_of
from benchmarks.calibration_truths import (
    GROUP,
    RULES,
    Moments,
    Truths,
    audit_truths,
    cv_of,
    group_moments_of,
    group_truths,
    law_truths,
    proxy_truths,
    signal_for,
)

BATCHES, REWARDS = "batches", "rewards"
OTHERS = {BATCHES, REWARDS, BETWEEN}
"""Settings of their own: prompts with something in common, rewards alone, and prompts' means."""
SKETCHED = ", sketched"
HIGH: dict[str, Any] = {"dimensions": 60, "decay": 0.97}
"""Effective rank near 30; otherwise near 3."""
LOW: dict[str, Any] = {"dimensions": 20, "decay": 0.7}
ALONG: dict[str, Any] = {"dimensions": 20, "decay": 1.0 / 0.7}
"""`LOW` with grad J along the direction that varies most; otherwise along the one that varies least."""
MOVING: dict[str, Any] = {"drift": 0.3, "reward_slope": -0.7, "share": 0.3}
"""E[g | L] and rewards depend on length; 30% of ||s||^2 from products of different tokens."""
SETTINGS: dict[str, dict[str, Any]] = {
    "beta 0, low rank, CV 0.6": {"beta": 0.0, **LOW, "cv": 0.6},
    "beta 0, high rank, CV 1.5": {"beta": 0.0, **HIGH, "cv": 1.5},
    "beta 1, low rank, CV 0.6": {"beta": 1.0, **LOW, "cv": 0.6},
    "beta 1, high rank, CV 5": {"beta": 1.0, **HIGH, "cv": 5.0},
    "beta 1, low rank, CV 1.5, one in ten right": {"beta": 1.0, **LOW, "p": 0.1, "cv": 1.5},
    "beta 1, low rank, CV 0.6, half right": {"beta": 1.0, **LOW, "p": 0.5, "cv": 0.6},
    "beta 1, low rank, CV 2, mean along the noise": {"beta": 1.0, **ALONG, "cv": 2.0},
    "beta 1, mean moves with L": {"beta": 1.0, "dimensions": 20, "decay": 0.9, "signal": 1.0, **MOVING},
    "beta 1.6, high rank, CV 1.5": {"beta": 1.6, **HIGH, "cv": 1.5},
    "beta 1.6, low rank, CV 5": {"beta": 1.6, **LOW, "cv": 5.0},
    "beta 2, low rank, CV 0.6": {"beta": 2.0, **LOW, "cv": 0.6},
}
WRONG_SAMPLER = "wrong temperature: n ||E s||^2 = 0.4 E||s||^2"
DIFFERENCES = {
    "deviation exponent, grpo": "deviation_exponent",
    "within exponent, grpo": "within_exponent",
    "cv grpo": "cv",
    "eta grpo": "eta",
    "alpha* by eta": "alpha_star_eta",
}
"""Compared between independent runs, with what `compare` calls them."""


@cache
def law_of(name: str) -> dict[str, Any]:
    """The law with its signal solved for the CV."""
    if name == WRONG_SAMPLER:
        law = {"beta": 1.0, **LOW, "signal": 0.6}
        # ||E s||^2 = shift^2 and E||s||^2 = E v + signal^2 p (1 - p) + shift^2, n ||E s||^2 = 0.4 E||s||^2.
        bare = audit_truths([{**law}], [0.0], 4, 1.0)["assumption 0: identity"]
        size = 8.0 / bare - 1.0
        return {**law, "shift": round(math.sqrt(0.05 * size / 0.95), 4)}
    law = dict(SETTINGS[name])
    cv = law.pop("cv", None)
    if cv is not None:
        law["signal"] = signal_for(cv, law)
    return law


@cache
def moments_of(name: str, size: int) -> Moments:
    """Group moments of a law, once a process."""
    if size == GROUP:
        return group_moments_of(law_of(name))
    return group_moments_of(law_of(name), size, responses=160_000, rules=RULES[:1])


@cache
def truths_of(names: tuple[str, ...], n: int) -> Truths:
    """Everything true of prompts with these laws."""
    laws = [law_of(name) for name in names]
    found = {**group_truths([moments_of(name, GROUP) for name in names]), **law_truths(laws)}
    shares = [law.get("share", 0.0) for law in laws]
    shift = laws[0].get("shift", 0.0)
    found |= audit_truths(laws, shares, max(1, min(4, n // 8)), shift) | {"assumption 0: p value": math.nan}
    if shift:
        # The group moments are those without a shift.
        return {name: value for name, value in found.items() if name.startswith(("assumption 0", "assumption 1"))}
    for size, word in ((4, ""), (16, ""), (32, ", extrapolated")):
        found[f"planning: cv at n = {size}{word}"] = cv_of([moments_of(name, size) for name in names])
    if len(set(names)) == 1:
        found |= _proxy_truths(names[0])
    return found


@cache
def _proxy_truths(name: str) -> Truths:
    return proxy_truths(law_of(name))


def one_draw(job: tuple[Setting, int]) -> list[Found]:
    """All intervals of one draw."""
    setting, t = job
    seed = [13, *setting.name.encode(), setting.n, setting.prompts, t]
    if BATCHES in setting.kinds:
        (population,) = setting.laws
        return batch_intervals(population, setting.prompts, setting.n, seed, sketched=setting.name.endswith(SKETCHED))
    if BETWEEN in setting.kinds:
        return [found_of(*row) for row in between_intervals(setting.prompts, setting.n, seed)]
    if REWARDS in setting.kinds:
        (population,) = setting.laws
        return [found_of(*row) for row in silent_intervals(population, setting.prompts, setting.n, seed)]
    if len(setting.laws) == 1:
        names = setting.laws * setting.prompts
        truths = truths_of(names, setting.n)
        return every_interval(
            [law_of(x) for x in names],
            setting.n,
            seed,
            truths,
            truths if setting.prompts > 1 else None,
            set(setting.kinds),
        )
    # Every prompt's law is drawn: that is what "prompts like these" means.
    chosen = np.random.default_rng([14, setting.n, t]).integers(len(setting.laws), size=setting.prompts)
    names = tuple(setting.laws[k] for k in sorted(chosen))
    like = truths_of(setting.laws, setting.n)
    return every_interval(
        [law_of(x) for x in names], setting.n, seed, truths_of(names, setting.n), like, set(setting.kinds)
    )


def rows_of(results: list[list[Found]], setting: Setting) -> Iterator[dict[str, Any]]:
    """One row a quantity and estimand, then those of differences between runs."""
    by_name: dict[tuple[str, str], list[Found]] = {}
    for result in results:
        for f in result:
            by_name.setdefault((f.quantity, f.estimand), []).append(f)
    for found in by_name.values():
        yield row_of(found, setting)
    if len(setting.laws) == 1 and not setting.kinds & OTHERS:
        for quantity, name in DIFFERENCES.items():
            found = by_name.get((quantity, HERE), [])
            pairs = [difference_of(name, a, b) for a, b in zip(found[::2], found[1::2], strict=False)]
            if pairs:
                yield row_of(pairs, setting)


def settings(scale: float) -> list[Setting]:
    """Every setting with its draws; `scale` multiplies their number."""

    def times(draws: int) -> int:
        return max(2, round(draws * scale))

    made = [
        Setting(name=name, laws=(name,), n=n, prompts=1, draws=times(draws))
        for name, (n, draws) in itertools.product(SETTINGS, ((16, 250), (64, 250), (128, 250), (512, 80)))
    ]
    made += [
        Setting(
            name="wrong sampler", laws=(WRONG_SAMPLER,), n=n, prompts=1, draws=times(250), kinds=frozenset({"audit"})
        )
        for n in (16, 64, 128, 512)
    ]
    names = tuple(name for name, law in SETTINGS.items() if "p" not in law)  # one share of correct responses
    made += [
        Setting(name="8 prompts of any of these", laws=names, n=n, prompts=8, draws=times(draws))
        for n, draws in ((16, 400), (64, 150), (128, 80), (512, 24))
    ]
    moving = ("beta 1, mean moves with L",)
    made.append(Setting(name="8 equal prompts, mean moves with L", laws=moving, n=64, prompts=8, draws=times(120)))
    for name in POPULATIONS:
        kinds = frozenset({BATCHES})
        made += [
            Setting(name=name, laws=(name,), n=32, prompts=k, draws=times(draws), kinds=kinds)
            for k, draws in ((8, 200), (16, 200), (64, 60))
        ]
        made.append(Setting(name=name + SKETCHED, laws=(name,), n=32, prompts=16, draws=times(120), kinds=kinds))
    made += [
        Setting(name=name, laws=(name,), n=n, prompts=k, draws=times(500), kinds=frozenset({REWARDS}))
        for name, n, k in itertools.product(SILENT, (16, 128), (4, 16, 64))
    ]
    made += [
        Setting(name=BETWEEN, laws=(BETWEEN,), n=64, prompts=k, draws=times(draws), kinds=frozenset({BETWEEN}))
        for k, draws in ((8, 200), (16, 200), (64, 60))
    ]
    return made


def run(chosen: Sequence[Setting], workers: int) -> Iterator[list[dict[str, Any]]]:
    """Draw every setting; yields the table's rows of each."""
    # Before the workers start, so that they inherit what is cached.
    for setting in chosen:
        if BATCHES in setting.kinds:
            batch_truths(setting.laws[0])
        elif BETWEEN in setting.kinds:
            between_truths(setting.n)
        elif REWARDS not in setting.kinds:
            truths_of(setting.laws * (setting.prompts if len(setting.laws) == 1 else 1), setting.n)
            if "lines" in setting.kinds and setting.prompts == 1:
                from_many(tuple(sorted(bare(law_of(setting.laws[0])).items())))
            for name in setting.laws if "extras" in setting.kinds else ():
                moments_of_extras(tuple(sorted(bare(law_of(name)).items())))
    with ProcessPoolExecutor(workers) as pool:
        for setting in chosen:
            start = time.time()
            jobs = [(setting, t) for t in range(setting.draws)]
            rows = list(rows_of(list(pool.map(one_draw, jobs, chunksize=4)), setting))
            print(f"{setting.name}, N = {setting.n}, {setting.draws} draws: {time.time() - start:.0f} s", flush=True)
            yield rows


def merged(rows: list[dict[str, Any]], path: Path, *, whole: bool = True) -> list[dict[str, Any]]:
    """Put new rows in the place of the table's old ones, in the settings' order.

    `whole`: they are all there is of their setting, so nothing old of it stays.
    """

    def key(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["setting"], int(row["n"]), int(row["prompts"])

    def name(row: dict[str, Any]) -> tuple[Any, ...]:
        return key(row) if whole else (*key(row), row["quantity"], row["estimand"])

    done = {name(row) for row in rows}
    if path.exists():
        with path.open(newline="") as file:
            rows = rows + [old for row in csv.DictReader(file) if name(old := parsed(row)) not in done]
    order = [(s.name, s.n, s.prompts) for s in settings(1.0)]
    return sorted((row for row in rows if key(row) in order), key=lambda row: order.index(key(row)))


def parsed(row: dict[str, str]) -> dict[str, Any]:
    """One line of the file with its numbers as numbers."""
    words = ("setting", "quantity", "estimand")
    counts = ("n", "prompts", "draws")
    return {
        name: text if name in words or text == "" else int(text) if name in counts else float(text)
        for name, text in row.items()
    }


def main() -> None:
    """Run all settings and write the table and its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=float, default=1.0, help="multiplies every number of draws")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="settings whose name holds this text")
    parser.add_argument("--kinds", nargs="+", choices=sorted({*KINDS, *OTHERS}), help="only these kinds of quantities")
    parser.add_argument("--sizes", type=int, nargs="+", help="only these N")
    parser.add_argument("--each", type=int, help="draws of every setting, in place of its own number")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    chosen = [
        s
        for s in settings(options.draws)
        if (options.only is None or options.only in s.name) and (not options.sizes or s.n in options.sizes)
    ]
    if options.kinds:
        wanted = frozenset(options.kinds)
        chosen = [replace(s, kinds=s.kinds & wanted) for s in chosen if s.kinds & wanted]
    if options.each:
        chosen = [replace(s, draws=options.each) for s in chosen]
    start = time.time()
    for new in run(chosen, options.workers):
        rows = merged(new, options.out, whole=not options.kinds)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    complete = len(chosen) == len(settings(1.0)) and not options.kinds
    minutes = (time.time() - start) / 60 if complete else math.nan
    options.out.with_suffix(".md").write_text(calibration_report.summary(rows, minutes, options.workers))


if __name__ == "__main__":
    main()
