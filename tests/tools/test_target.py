"""MODULE:FUNCTION is found and called, or refused in one line that says what to type."""

import pytest
import torch
from torch import nn

from trainkit.tools.doctor.target import WrongTarget, load

SOURCE = """
from torch import nn
import torch

number = 3
model, batch = nn.Linear(2, 2), torch.ones(4, 2)
made = {
    "tensor": (model, batch, lambda model, batch: model(batch).mean()),
    "mapping": [model, {"input": batch}],
    "only_model": model,
    "nothing": None,
    "swapped": (batch, model),
    "text": (model, "text"),
    "no_function": (model, batch, 3),
}

def tensor(): return made["tensor"]
def mapping(): return made["mapping"]
def only_model(): return made["only_model"]
def nothing(): return made["nothing"]
def swapped(): return made["swapped"]
def text(): return made["text"]
def no_function(): return made["no_function"]
def of_size(size): pass
def fails(): raise KeyError("the user's own")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_training.py").write_text(SOURCE)
    (tmp_path / "broken_import.py").write_text("import there_is_none_of_this")


def test_a_function_is_called():
    for name in ("my_training:tensor", "my_training.py:tensor", "./my_training.py:tensor"):
        model, batch, loss_fn = load(name)
        assert batch.shape == (4, 2) and loss_fn(model, batch).requires_grad


def test_a_model_may_return_its_own_loss():
    model, batch, loss_fn = load("my_training:mapping")
    with pytest.raises(WrongTarget, match=r"shape \(4, 2\) .*`return model, batch, loss_fn`"):
        loss_fn(model, batch)

    class Loss(nn.Module):
        def forward(self, x, y=0):
            return {"loss": (x - y).mean()}

    tensor = torch.tensor([1.0, 3.0])
    for batch, loss in ((tensor, 2), ((tensor, 1), 1), ({"x": tensor, "y": 2}, 0)):
        assert loss_fn(Loss(), batch)["loss"] == loss


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("my_training", "'my_training' is not MODULE:FUNCTION: `doctor train:make_model`"),
        (":make_model", "is not MODULE:FUNCTION"),
        ("my_training:tensors", "my_training has no function 'tensors'"),
        ("my_training:number", "my_training has no function 'number'"),
        ("my_training:only_model", "returned Linear: `return model, batch`"),
        ("my_training:nothing", "returned NoneType: `return model, batch`"),
        ("my_training:swapped", "returned Tensor, Linear: `return model, batch`"),
        ("my_training:text", "returned Linear, str: `return model, batch`"),
        ("my_training:no_function", "returned Linear, Tensor, int: `return model, batch`"),
    ],
)
def test_what_cannot_be_tried_is_said_in_one_line(target, reason):
    with pytest.raises(WrongTarget) as raised:
        load(target)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("broken_import:make", ModuleNotFoundError, "there_is_none_of_this"),
        ("no_such_module:make", ModuleNotFoundError, "no_such_module"),
        ("my_training:fails", KeyError, "the user's own"),
        ("my_training:of_size", TypeError, "size"),
    ],
)
def test_errors_of_python_and_of_the_user_pass_through(target, error, message):
    with pytest.raises(error, match=message):
        load(target)
