"""One tiny model for all tests of sampling, and one thread to run it."""

import pytest
import torch

from tests.rollouts.tiny import make_model_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Spinning threads take each other's core where other processes run: thirty times slower on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
