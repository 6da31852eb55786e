import math

import pytest
import torch
from oracles import make_model

from trainkit import accumulate, amp


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: accumulate(0), ValueError, "accumulate got 0; a window has at least one"),
        (lambda: accumulate(-2), ValueError, "accumulate got -2"),
        (lambda: accumulate(2.5), TypeError, r"accumulate got 2.5; .*`accumulate\(4\)`"),
        (lambda: accumulate(True), TypeError, "accumulate got True"),
        (lambda: accumulate("4"), TypeError, "accumulate got '4'"),
        (
            lambda: accumulate(4, torch.optim.SGD(make_model().parameters())),
            TypeError,
            "optimizers go to",
        ),
        (lambda: accumulate(make_model()), TypeError, "accumulate got Sequential"),
        (lambda: amp(make_model()), TypeError, "where an optimizer belongs"),
        (lambda: amp(dtype=torch.float64), ValueError, "dtype must be"),
        (lambda: amp(dtype="float16"), ValueError, "dtype must be"),
        (lambda: amp(device="gpu"), ValueError, "device='cuda'"),
        (lambda: amp(init_scale=0), ValueError, "init_scale"),
        (lambda: amp(init_scale=math.inf), ValueError, "init_scale"),
        (lambda: amp(growth_interval=0), ValueError, "growth_interval"),
        (lambda: amp(growth_interval=2.0), ValueError, "growth_interval"),
        (lambda: amp(max_norm=-1), ValueError, "max_norm"),
    ],
)
def test_bad_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_amp_alone_is_plain_autocast_for_evaluation():
    model = make_model(torch.float32)
    x = torch.ones(2, 4)
    evaluation = amp(dtype=torch.bfloat16, device="cpu")
    with evaluation, evaluation:
        assert model(x).dtype == torch.bfloat16
        with amp(dtype=torch.float32, device="cpu"):
            assert model(x).dtype == torch.float32
    with amp(dtype=torch.float16, device="cpu"):
        assert model(x).dtype == torch.float16
    assert model(x).dtype == torch.float32
