"""Autocast: on in forward and nowhere else, with copies of the weights as they are."""

import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from oracles import loss_of, make_batches, make_model
from torch.nn import functional as F

from trainkit import accumulate, amp, frozen, train_step, trainable_parameters
from trainkit.core.precision import native_dtype

BATCH = make_batches([4], torch.float32)[0]
BFLOAT16 = amp(dtype=torch.bfloat16)


def is_on():
    return torch.is_autocast_enabled("cpu")


def test_amp_picks_what_the_device_computes_natively(monkeypatch):
    assert native_dtype("cpu") == torch.bfloat16 and native_dtype("mps") == torch.float16
    for native in (True, False):
        # A T4 answers True when emulation counts.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        assert native_dtype("cuda") == (torch.bfloat16 if native else torch.float16)


@pytest.mark.filterwarnings("error")
def test_amp_alone_is_plain_autocast_for_evaluation():
    model, x = make_model(torch.float32), torch.ones(2, 4)
    evaluation = amp(dtype=torch.bfloat16, device="cpu")
    with evaluation, evaluation:
        assert model(x).dtype == torch.bfloat16
        with amp(dtype=torch.float32, device="cpu"):
            assert model(x).dtype == torch.float32
        assert model(x).dtype == torch.bfloat16
    with amp(dtype=torch.float16, device="cpu"):
        assert model(x).dtype == torch.float16
    assert model(x).dtype == torch.float32


seen = {}


class Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        seen["forward"] = is_on()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        seen["backward"] = is_on()
        return gradient


def test_forward_runs_under_autocast_and_nothing_else_does():
    model = make_model(torch.float32)

    @accumulate(1, model)
    @BFLOAT16
    def step(batch):
        yield Look.apply(loss_of(model, batch))
        seen["update"] = is_on()

    with torch.autocast("cpu", torch.bfloat16):  # of the code around
        step(BATCH)
        assert is_on()
    assert seen == {"forward": True, "backward": False, "update": True}
    step(BATCH)
    assert seen == {"forward": True, "backward": False, "update": False} and not is_on()


@pytest.mark.parametrize("parts", [[], [BFLOAT16]])
def test_an_autocast_around_the_loop_does_not_serve_old_weights(parts):
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.5), *parts)(
        lambda batch: loss_of(model, batch)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert len({step(BATCH).loss.item() for _ in range(3)}) == 3


@pytest.mark.parametrize("enabled", [False, True])
def test_backward_in_a_block_leaves_autocast_as_it_was(enabled):
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), BFLOAT16)
    with step, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        step.backward(Look.apply(model(BATCH[0]).float().mean()))
        assert model(BATCH[0]).dtype == (torch.bfloat16 if enabled else torch.float32)
    assert seen["backward"] is False and not is_on()


def test_an_exception_in_a_block_ends_its_autocast():
    step = train_step(torch.optim.SGD(make_model().parameters()), BFLOAT16)
    with pytest.raises(LookupError), step:
        assert is_on()
        raise LookupError
    assert not is_on()


# Weights that move between two forwards of a micro-batch (AWP, SAM).


def is_cast_anew(step, model, of):
    """Whether a loss after a move of the weights is the loss of the weights as they are."""
    with step as result:
        weights = of(model)
        gradients = torch.autograd.grad(loss_of(model, BATCH), weights)
        with torch.no_grad():
            torch._foreach_add_(weights, list(gradients))
        step.backward(loss_of(model, BATCH))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return torch.equal(result.loss, loss_of(model, BATCH))


@pytest.mark.parametrize("stem_is_frozen", [False, True])
@pytest.mark.parametrize("of", [trainable_parameters, lambda model: [model[2].weight]])
def test_weights_that_move_along_a_gradient_are_cast_anew(stem_is_frozen, of):
    model = make_model(torch.float32)
    parts = [frozen(model, "[0]")] * stem_is_frozen
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.0), BFLOAT16, *parts)
    assert is_cast_anew(step, model, of)


def test_another_weight_stands_for_all_where_the_last_was_frozen():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.0), BFLOAT16)
    assert is_cast_anew(step, model, trainable_parameters)
    with frozen(model, "[2]"):
        assert is_cast_anew(step, model, trainable_parameters)


def test_many_steps_over_a_model_leave_one_hook():
    model = make_model(torch.float32)
    for _ in range(3):
        train_step(torch.optim.SGD(model.parameters()), BFLOAT16)(lambda: loss_of(model, BATCH))()
    assert [len(p._backward_hooks or {}) for p in model.parameters()] == [0, 0, 1, 0]


def test_a_small_last_window_hardly_costs_a_skip():
    """Its weight is far below the mean weight of the windows after it."""

    def skipped(last):
        model = make_model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

        @train_step(optimizer, amp(dtype=torch.float16))
        def step(x, weight):
            return (30 * model(x).float()).square().mean(), weight

        for _ in range(6):
            for i, x in enumerate(step.over([BATCH[0]] * 4)):
                step(x, last if i == 3 else 4096)
        return step.skipped

    assert 0 < skipped(4) <= skipped(4096) + 1


def test_a_model_is_sent_to_another_process_without_a_warning():
    model = make_model(torch.float32)
    train_step(torch.optim.SGD(model.parameters()), BFLOAT16)(lambda: model(BATCH[0]).mean())()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForkingPickler.dumps(model)


# Parameters in float16.


def test_float16_parameters_under_a_scaler_are_refused():
    """pytorch#74739: "Attempting to unscale FP16 gradients" does not say what to do."""
    model = make_model(torch.float16)
    step = amp(torch.optim.SGD(model.parameters()), dtype=torch.float16)(
        lambda: model[0].weight.sum()
    )
    with pytest.raises(ValueError, match=r"float16.*`dtype=torch.float32`"):
        step()
    assert model[0].weight.grad is None


def test_float16_parameters_that_are_frozen_are_not():
    """The base of an adapter, for example."""
    model = make_model(torch.float32)
    model[0].half()
    plan = torch.optim.SGD(model.parameters(), lr=0.1), amp(dtype=torch.float16)

    def loss():
        return F.mse_loss(model(BATCH[0]), BATCH[1])

    assert train_step(*plan, frozen(model, "[0]"))(loss)().updated
    step = train_step(*plan)(loss)
    with frozen(model, "[0]"):
        assert step().updated
    with pytest.raises(ValueError, match=r"`dtype=torch.float32`"):
        step()


def test_lazy_modules_are_made_in_the_first_micro_batch():
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(optimizer, amp(dtype=torch.bfloat16))(lambda x: model(x).square().mean())
    assert step(torch.ones(2, 3)).updated and model[0].weight.shape == (4, 3)
