"""Settings of torch that a measurement needs, and their return to what they were."""

import pytest
import torch

from gradvar.gradients.states import full_precision


def read():
    holders = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    return [holder.fp32_precision for holder in holders]


@pytest.mark.parametrize("fails", [False, True])
def test_no_tf32_in_products_and_convolutions_and_all_as_before(fails):
    before, allowed = read(), torch.backends.cudnn.allow_tf32
    try:
        with full_precision():
            assert read() == ["ieee", "ieee", "ieee"]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert read() == before
    assert torch.backends.cudnn.allow_tf32 == allowed


def test_what_the_user_set_for_convolutions_alone_is_kept():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        with full_precision():
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
