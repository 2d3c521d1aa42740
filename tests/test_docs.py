"""Pages made from the code say what the code says, and every command is in the README."""

import re
import runpy
import shlex
import subprocess
import sys

from tests.conftest import ROOT


def test_the_page_of_public_names_has_not_drifted():
    page = runpy.run_path(str(ROOT / "docs" / "public_names.py"))["page"]()
    assert page == (ROOT / "docs" / "python.md").read_text(), "run `make docs`"


def test_the_page_of_aggregators_has_not_drifted():
    page = runpy.run_path(str(ROOT / "docs" / "public_names.py"))["aggregators"]()
    assert page == (ROOT / "docs" / "aggregators.md").read_text(), "run `make docs`"


def test_help_names_every_aggregator():
    from cli.options import RULE_NAMES
    from gradvar.estimators import RULES

    assert RULE_NAMES.split(", ") == [name for rule in RULES.values() for name in (rule.name, *rule.aliases)]


def test_the_page_of_the_command_line_has_not_drifted(tmp_path):
    made = tmp_path / "cli.md"
    command = "-m typer cli.main utils docs --name gradvar --title"
    subprocess.run(
        [sys.executable, *shlex.split(command), "Command line", "--output", str(made)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert made.read_text() == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`"


def test_the_readme_names_every_command():
    commands = re.findall(r"^## `gradvar (\w+)`", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    assert [name for name in commands if f"`gradvar {name}" not in readme] == []


def test_links_of_the_pages_lead_to_files():
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*/README.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
