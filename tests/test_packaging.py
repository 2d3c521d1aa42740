"""The list of packages in pyproject.toml is the list on the disk, and the wheel's data are there."""

import subprocess
import sys
import tomllib
from pathlib import Path

from tests.conftest import ROOT


def test_every_package_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("gradvar", "cli")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    listed = {name.replace("gradvar.cli", "cli") for name in setuptools["packages"]}
    assert listed == found


def test_package_data_exist():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, patterns in setuptools["package-data"].items():
        folder = ROOT / Path(*package.split("."))
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_rooms_import_only_what_they_may():
    forbidden = {
        "runs": ("torch", "transformers", "gradvar.gradients", "gradvar.estimators", "gradvar.rollouts"),
        "estimators": ("torch", "transformers", "gradvar.gradients", "gradvar.rollouts", "gradvar.stages"),
        "gradients": ("gradvar.estimators", "gradvar.rollouts", "gradvar.stages"),
        "rollouts": ("gradvar.estimators", "gradvar.gradients", "gradvar.stages"),
        "figures": ("torch", "gradvar.estimators", "gradvar.gradients", "gradvar.rollouts", "gradvar.stages"),
        "report": (
            "torch",
            "gradvar.estimators",
            "gradvar.gradients",
            "gradvar.rollouts",
            "gradvar.stages",
        ),
        "losses": ("gradvar.gradients", "gradvar.rollouts", "gradvar.stages"),
    }
    for room, names in forbidden.items():
        for path in (ROOT / "gradvar" / room).rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            imports = [
                line.split()[1] for line in lines if line.startswith(("import ", "from ")) and len(line.split()) > 1
            ]
            wrong = [i for i in imports if any(i == name or i.startswith(name + ".") for name in names)]
            assert not wrong, f"{path} imports {wrong}, which room {room} may not"
    for path in (ROOT / "gradvar").rglob("*.py"):
        assert "from cli" not in path.read_text()
        assert "import analyses" not in path.read_text()


def test_stages_that_estimate_load_no_torch_and_keep_their_names():
    code = """
import sys
from gradvar.stages import alpha, audit, compare, cv, fit
assert "torch" not in sys.modules and "matplotlib" not in sys.modules, "an estimate loads what it does not need"
import gradvar.stages.check
from gradvar import stages
for name in stages.__all__:
    assert callable(getattr(stages, name)), f"stages.{name} is {getattr(stages, name)}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
