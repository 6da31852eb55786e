"""What doctor is given to try: found, or refused in one line that says what to type."""

import pytest
import torch
from torch import nn

from trainkit.tools.doctor.targets import WrongTarget, find_function, make, place_of

SOURCE = """
from torch import nn
import torch

number = 3

def make_model():
    return nn.Linear(2, 2), torch.ones(4, 2), lambda model, batch: model(batch).mean()

def of_size(size, depth=2):
    pass

def fails():
    raise KeyError("the user's own")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_training.py").write_text(SOURCE)
    (tmp_path / "broken_import.py").write_text("import there_is_none_of_this")
    (tmp_path / "broken.py").write_text("1 / 0")


def test_a_function_is_found_and_made_use_of(folder):
    model, batch, loss_fn = make("it", find_function("my_training:make_model"))
    assert (
        isinstance(model, nn.Linear)
        and batch.shape == (4, 2)
        and loss_fn(model, batch).requires_grad
    )
    assert make("it", lambda: (model, batch)) == (model, batch, None)
    assert make("it", lambda: [model, {"x": batch}, None])[1:] == ({"x": batch}, None)


@pytest.mark.parametrize(
    ("target", "reason", "corrected"),
    [
        ("my_training", "is not MODULE:FUNCTION", "doctor my_training:make_model`"),
        ("my_training.py:make_model", "is not MODULE:FUNCTION", "doctor my_training:make_model`"),
        ("./sub/my_training.py:build", "is not MODULE:FUNCTION", "doctor sub.my_training:build`"),
        (":make_model", "is not MODULE:FUNCTION", "doctor train:make_model`"),
        ("", "is not MODULE:FUNCTION", "doctor train:make_model`"),
        ("my_training:make model", "is not MODULE:FUNCTION", "doctor my_training:make_model`"),
        ("my_trainin:make_model", "no module 'my_trainin'", "doctor my_training:make_model`"),
        ("nowhere.at_all:make_model", "no module 'nowhere'", ":make_model`"),
        ("my_training:makemodel", "has no function 'makemodel'", "doctor my_training:make_model`"),
        (
            "my_training:number",
            "has for 'number' an object of type int",
            "doctor my_training:make_model`",
        ),
        ("my_training:of_size", "of_size is called without arguments, and needs size", "defaults"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(folder, target, reason, corrected):
    with pytest.raises(WrongTarget) as raised:
        find_function(target)
    assert (
        reason in str(raised.value)
        and corrected in str(raised.value)
        and "\n" not in str(raised.value)
    )


def test_errors_of_the_user_are_left_as_they_are(folder):
    with pytest.raises(ModuleNotFoundError, match="there_is_none_of_this"):
        find_function("broken_import:make_model")
    with pytest.raises(ZeroDivisionError):
        find_function("broken:make_model")
    with pytest.raises(KeyError, match="the user's own"):
        make("it", find_function("my_training:fails"))


@pytest.mark.parametrize(
    ("made", "came"),
    [
        (nn.Linear(1, 1), "returned Linear"),
        (None, "returned NoneType"),
        ((nn.Linear(1, 1),), "returned Linear"),
        ((torch.ones(1), nn.Linear(1, 1)), "returned Tensor, Linear"),
        ((nn.Linear(1, 1), "text"), "returned Linear, str"),
        ((nn.Linear(1, 1), torch.ones(1), 3), "returned Linear, Tensor, int"),
        (
            (nn.Linear(1, 1), torch.ones(1), len, 3),
            "returned Linear, Tensor, builtin_function_or_method, int",
        ),
    ],
)
def test_something_else_than_a_model_and_a_batch_is_refused(made, came):
    with pytest.raises(WrongTarget) as raised:
        make("my_training:make_model", lambda: made)
    assert came in str(raised.value) and "`return model, batch, loss_fn`" in str(raised.value)


@pytest.mark.parametrize(
    "model",
    [
        nn.ReLU(),
        nn.Linear(1, 1).requires_grad_(False),
        nn.Linear(1, 1, device="meta"),
        nn.LazyLinear(1),
    ],
)
def test_a_model_without_anything_to_train_is_refused(model):
    with pytest.raises(
        WrongTarget, match=r"my_training:make_model returned a model .*: `"
    ) as raised:
        make("my_training:make_model", lambda: (model, torch.ones(1)))
    assert "\n" not in str(raised.value)


def test_a_place_is_one_where_something_runs():
    assert place_of("cpu") == torch.device("cpu")
    expected = (
        torch.accelerator.current_accelerator()
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )
    assert place_of(None) == expected
    for nowhere in ("cuda:99", "nonsense", "meta"):
        with pytest.raises(WrongTarget, match=f"--device {nowhere}") as raised:
            place_of(nowhere)
        assert "\n" not in str(raised.value)
