"""Write docs/python.md and docs/aggregators.md from gradvar's code: `python docs/public_names.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

import gradvar
from gradvar import estimators, figures
from gradvar.estimators.aggregation import REFUSED

OUTPUT = Path(__file__).with_name("python.md")
AGGREGATORS = Path(__file__).with_name("aggregators.md")

HEAD = """# Public Python names

`import gradvar` loads neither torch, transformers nor vllm; a name loads what it needs on first use. This page is made
from the docstrings (`make docs`) and a test sees that it has not drifted.
"""

SECTIONS = {
    "gradvar": (gradvar, gradvar.__all__),
    "gradvar.estimators": (estimators, [name for name in estimators.__all__ if name not in gradvar.__all__]),
    "gradvar.figures": (figures, [name for name in figures.__all__ if name.startswith("plot_")]),
}
"""Section to the module its names are taken from, and the names."""


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for title, (module, names) in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(title, name, getattr(module, name)) for name in names]
    return "\n".join(parts)


def aggregators() -> str:
    """Return the page of rules and of what gives them in the training frameworks."""
    lines = [
        "# Aggregators, and what the frameworks call them",
        "",
        "Weights x_i of the n responses in scope, L_i tokens long; M is the longest response allowed. Any name here",
        "is taken by `--rule`, `aggregation_weights` and `aggregate_loss`. Read in verl (volcengine/verl b178a3c,",
        "January 2026; what pull request 5417 changed, by its description), TRL (huggingface/trl f2cd577, 1.10.0.dev0)",
        "and SkyRL (NovaSky-AI/SkyRL a956457). The scope is what the framework sums over; verl's workers that pass no",
        "global counts do it in each micro-batch. This page is made from the registry (`make docs`).",
        "",
        "| rule | x_i | other names | framework's argument | scope | M |",
        "|---|---|---|---|---|---|",
    ]
    for rule in estimators.RULES.values():
        names = ", ".join(f"`{name}`" for name in rule.aliases)
        for k, setting in enumerate(rule.settings or (None,)):
            head = [f"`{rule.name}`", rule.weight, names] if k == 0 else ["", "", ""]
            told = ["none ships it", "", ""]
            if setting is not None:
                told = [
                    f'{setting.framework}: `{setting.argument}="{setting.name}"`',
                    setting.scope,
                    setting.max_length,
                ]
            lines.append("| " + " | ".join([*head, *told]) + " |")
    lines += ["", "Refused by name:", ""]
    lines += [f"- `{name}`: {why}." for name, why in REFUSED.items()]
    return "\n".join([*lines, ""])


def _entry(module: str, name: str, value: object) -> str:
    if not callable(value):
        return f"### {name}\n\n    {module}.{name}: {type(value).__name__}\n"
    lines = [f"### {name}", ""]
    if inspect.isclass(value):
        lines += [*_text(value), *_fields(value), *_members(value)]
    else:
        lines += [f"    {module}.{_signature(name, value)}", "", *_text(value)]
    return "\n".join([*lines, ""])


def _fields(value: type) -> list[str]:
    """Return a dataclass's fields with the strings below them, those of its bases first."""
    found: list[str] = []
    for base in reversed(value.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                about = f": {' '.join(str(after.value.value).split())}" if said else ""  # type: ignore[union-attr]
                found.append(f"- `{node.target.id}: {ast.unparse(node.annotation)}`{about}")
    return ["", *found] if found else []


def _members(value: type) -> list[str]:
    """Return the public methods and properties that a class defines itself."""
    found: list[str] = []
    for name, member in inspect.getmembers(value):
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        if not any(name in vars(base) for base in value.__mro__ if base.__module__.startswith("gradvar")):
            continue
        about = (inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ")
        shown = name if isinstance(member, property) else _signature(name, member)
        found.append(f"- `{shown}`: {about}")
    return ["", *found] if found else []


def _signature(name: str, value: object) -> str:
    text = str(inspect.signature(value)).replace("(self, ", "(").replace("(self)", "()")  # type: ignore[arg-type]
    return name + text.replace("'", "")


def _text(value: object) -> list[str]:
    """Return the docstring; its sections (Args, Returns, Raises) as preformatted text."""
    about, *rest = (inspect.getdoc(value) or "").split("\n\n")
    out = [about]
    for block in rest:
        sectioned = block.startswith(("Args:", "Returns:", "Raises:", " "))
        out += ["", textwrap.indent(block, "    ") if sectioned else block]
    return out


if __name__ == "__main__":
    OUTPUT.write_text(page(), encoding="utf-8")
    AGGREGATORS.write_text(aggregators(), encoding="utf-8")
    print(OUTPUT, AGGREGATORS)
