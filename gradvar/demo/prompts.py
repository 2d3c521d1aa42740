"""The prompt of the bundled policy, and the files that hold problems and template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gradvar.demo.countdown import CountdownProblem

TEMPLATE = "Numbers: {nums}\nTarget: {target}\n"
"""The prompt, as `template.txt` holds it; {nums} are the numbers with one space between them."""


def format_prompt(template: str, problem: CountdownProblem) -> str:
    """Fills a template: {nums} with the numbers, one space between them, and {target} with the target."""
    return template.format(nums=" ".join(str(n) for n in problem.nums), target=problem.target)


def write_problems(path: Path, problems: Sequence[CountdownProblem]) -> None:
    """Writes problems as JSON lines, `{"nums": [...], "target": ...}`."""
    lines = [json.dumps({"nums": list(problem.nums), "target": problem.target}) for problem in problems]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_problems(path: Path) -> list[CountdownProblem]:
    """Reads what `write_problems` wrote."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [CountdownProblem(tuple(record["nums"]), record["target"]) for record in records]
