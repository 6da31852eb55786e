import math

import pytest
import torch
from oracles import loss_of, make_model

from trainkit import Step, accumulate, amp, frozen, train_step


def loss(batch):
    raise NotImplementedError


@pytest.fixture
def optimizer():
    return torch.optim.SGD(make_model().parameters(), lr=0.1)


def plan_of(step):
    return step._plan


def test_parts_can_be_handed_over_or_applied_and_make_the_same_plan(optimizer):
    model, a, b = make_model(), accumulate(2), amp()
    f = frozen(model)
    expected = plan_of(train_step(optimizer, a, b, f, max_norm=1.0)(loss))
    for step in (
        train_step(optimizer, max_norm=1.0)(a(b(f(loss)))),
        f(b(a(train_step(optimizer, max_norm=1.0)(loss)))),
        a(train_step(optimizer, b, max_norm=1.0)(f(loss))),
        f(a(b(train_step(optimizer, max_norm=1.0))))(loss),
        amp(optimizer, max_norm=1.0)(f(a(loss))),
    ):
        assert isinstance(step, Step) and plan_of(step) == expected


def test_a_part_serves_many_steps_and_changes_none_of_them(optimizer):
    part = accumulate(3)
    first = part(train_step(optimizer)(loss))
    part(first)
    assert plan_of(first).lengths == (3,) and repr(part) == "accumulate(3)"


def test_several_optimizers_take_one_norm_and_step_all_or_none():
    models = make_model(torch.float32), make_model(torch.float32)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    x, y = torch.ones(2, 4), torch.ones(2, 3)
    step = train_step(optimizers, max_norm=1e9)(
        lambda scale: loss_of(models[0], (x, y)) + scale * loss_of(models[1], (x, y))
    )
    assert step(1.0).grad_norm > 0
    before = [p.clone() for m in models for p in m.parameters()]
    assert not step(math.inf).updated
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, [p for m in models for p in m.parameters()], strict=True)
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda o, m: train_step(m),
            TypeError,
            "a module, of type Sequential, where an optimizer belongs",
        ),
        (lambda o, m: train_step(m.parameters()), TypeError, "where an optimizer belongs"),
        (
            lambda o, m: train_step(torch.optim.LBFGS(m.parameters())),
            TypeError,
            r"call `optimizer\.step\(closure\)`",
        ),
        (lambda o, m: train_step([]), ValueError, "got no optimizer"),
        (lambda o, m: train_step([o, o]), ValueError, "the same optimizer was given twice"),
        (lambda o, m: train_step(o, o), TypeError, r"train_step\(\[optimizer_a, optimizer_b\]\)"),
        (lambda o, m: train_step(o, m), TypeError, "module=model"),
        (lambda o, m: train_step(o, 4), TypeError, r"accumulate\(4\)"),
        (lambda o, m: train_step(o, accumulate), TypeError, r"it makes one: `accumulate\(...\)`"),
        (
            lambda o, m: train_step(o, torch.optim.lr_scheduler.StepLR(o, 1)),
            TypeError,
            "after=scheduler.step",
        ),
        (lambda o, m: train_step(o, amp(o)), ValueError, "optimizers were given twice"),
        (lambda o, m: train_step(o)(amp(o)(loss)), ValueError, "optimizers were given twice"),
        (lambda o, m: train_step(o, amp(), amp()), ValueError, "amp was given twice"),
        (
            lambda o, m: train_step(o, amp(max_norm=1.0), max_norm=2.0),
            ValueError,
            "max_norm was given twice, 2.0 and 1.0",
        ),
        (
            lambda o, m: train_step(o, amp(norm_type=1), norm_type=math.inf),
            ValueError,
            "norm_type was given twice",
        ),
        (
            lambda o, m: train_step(o, after=torch.optim.lr_scheduler.ReduceLROnPlateau(o).step),
            TypeError,
            "needs a metric",
        ),
        (lambda o, m: amp(torch.bfloat16), TypeError, r"amp\(dtype=torch.bfloat16\)"),
        (lambda o, m: train_step(o, module=o), TypeError, "optimizers go to `train_step"),
        (lambda o, m: train_step(o, max_norm=0), ValueError, "in the range of float32, got 0"),
        (
            lambda o, m: train_step(o, max_norm=-1.0),
            ValueError,
            "in the range of float32, got -1.0",
        ),
        (
            lambda o, m: train_step(o, max_norm=math.nan),
            ValueError,
            "in the range of float32, got nan",
        ),
        (lambda o, m: train_step(o, max_norm="1"), TypeError, "max_norm must be a number, got '1'"),
        (
            lambda o, m: train_step(o, max_norm=True),
            TypeError,
            "max_norm must be a number, got True",
        ),
        (
            lambda o, m: train_step(o, norm_type=0),
            ValueError,
            "norm_type must be 1, 2 or math.inf, got 0",
        ),
        (
            lambda o, m: train_step(o, norm_type=None),
            TypeError,
            "norm_type must be a number, got None",
        ),
        (lambda o, m: train_step(o, after=3), TypeError, "after"),
        (lambda o, m: train_step(o, after=[3]), TypeError, "after=scheduler.step"),
        (lambda o, m: train_step(o)(3), TypeError, "only functions are decorated"),
        (lambda o, m: accumulate(2)(amp()), TypeError, "only functions are decorated"),
        (lambda o, m: accumulate(2)(frozen(m)), TypeError, "only functions are decorated"),
        (lambda o, m: train_step(o, train_step(o)(loss)), TypeError, "is not a part"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_corrected_call(optimizer, call, error, words):
    with pytest.raises(error, match=words):
        call(optimizer, make_model())
