"""Help answers at once, teaches every command, and the README names them all."""

import subprocess
import sys

import pytest

from cli.main import app
from tests.conftest import ROOT, gradvar

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'vllm', 'pandas', 'numpy', 'scipy', 'matplotlib', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(name):
    done = gradvar(name, "--help")
    assert done.returncode == 0
    assert len(done.stdout.split()) > 20
    assert f"gradvar {name}" in (ROOT / "README.md").read_text()


def test_import_loads_no_torch():
    code = (
        "import sys, gradvar\ngradvar.deviations, gradvar.open_run, gradvar.aggregation_weights\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)\n"
        "assert all(hasattr(gradvar, name) for name in gradvar.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
