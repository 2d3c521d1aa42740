"""Files land whole or not at all, and a full disk is one clear line."""

import subprocess
import sys

import pytest

from gradvar.errors import GradvarError
from gradvar.runs import storage


def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.parquet"
    storage.write_bytes(path, b"old")

    def die(partial):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_whole(path, die)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["table.parquet"]


def test_a_full_disk_is_one_clear_line(tmp_path):
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom gradvar.runs import storage\n"
        "from gradvar.errors import GradvarError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    storage.write_bytes(Path(sys.argv[1]), bytes(5000))\n"
        "except GradvarError as error:\n    print(error)"
    )
    path = tmp_path / "big"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {path}: File too large; make room")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_bytes(b"")
    with pytest.raises(GradvarError, match="cannot write"):
        storage.write_bytes(blocker / "inside", b"x")
