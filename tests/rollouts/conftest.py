"""One tiny model for all tests of sampling."""

import pytest

from tests.rollouts.tiny import make_model_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("tiny"))
