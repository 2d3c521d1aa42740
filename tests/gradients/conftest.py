import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny products are faster on one thread, and other work may hold the second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(before)
