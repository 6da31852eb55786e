"""A step: its faces, its windows, exceptions, further losses, loops over loaders, and its state."""

import functools
import inspect
import warnings

import pytest
import torch
from oracles import (
    BATCHES,
    distance,
    gradients_of,
    loss_of,
    make_batches,
    make_model,
    plain_loop,
    same_bits,
    snapshot,
    state_of,
    unchanged,
)
from torch.nn import functional as F

from trainkit import Step, accumulate, amp, train_step

FLOAT32 = make_batches([4, 4, 2], torch.float32)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def is_as_by_hand(model, optimizer, batches, n=1, **options):
    """Whether model and optimizer are as the plain loop over these batches leaves them."""
    theirs = make_model()
    plain_loop(theirs, other := adamw(theirs), batches, n, **options)
    return distance(state_of(model, optimizer), state_of(theirs, other)) <= 1e-12


def no_gradients(model):
    return all(parameter.grad is None for parameter in model.parameters())


# Faces.


def returning(model, optimizer):
    step = train_step(optimizer, accumulate(2), max_norm=0.1)(lambda batch: loss_of(model, batch))
    return [step(batch) for batch in step.over(BATCHES)]


def yielding(model, optimizer):
    @accumulate(2)
    @amp(optimizer, dtype=torch.float32, max_norm=0.1)
    def step(batch):
        yield loss_of(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    return [step(batch) for batch in step.over(BATCHES)]


def by_hand(model, optimizer):
    step, results = train_step(optimizer, accumulate(2), max_norm=0.1), []
    for batch in step.over(BATCHES):
        with step as result:
            step.backward(loss_of(model, batch))
        results.append(result)
    return results


def without_over(model, optimizer):
    step = train_step(optimizer, accumulate(2), max_norm=0.1)(lambda batch: loss_of(model, batch))
    return [step(BATCHES[0]), step(BATCHES[1]), step.last(BATCHES[2])]


def test_every_face_takes_the_same_updates():
    seen = []
    for face in (returning, yielding, by_hand, without_over):
        model = make_model()
        optimizer = adamw(model)
        results = face(model, optimizer)
        assert [r.complete for r in results] == [False, True, True]
        assert [r.updated for r in results] == [False, True, True]
        assert not any(r.loss.requires_grad for r in results)
        numbers = [*(r.loss for r in results), *(r.grad_norm for r in results[1:])]
        seen.append((state_of(model, optimizer), numbers))
        assert no_gradients(model)
    for state, numbers in seen[1:]:
        assert same_bits(state, seen[0][0]) and same_bits(numbers, seen[0][1])
    assert is_as_by_hand(model, optimizer, BATCHES, 2, max_norm=0.1)


def test_a_step_keeps_name_docstring_and_signature(model):
    @accumulate(2, model)
    def step(x, *, y=1):
        """Doc."""
        yield loss_of(model, (x, y))

    assert (step.__name__, step.__doc__, [*inspect.signature(step).parameters]) == (
        "step",
        "Doc.",
        ["x", "y"],
    )
    assert isinstance(step, Step)


def test_attributes_of_the_function_do_not_get_into_the_step(model, optimizer):
    def step(batch):
        return loss_of(model, batch)

    step._plan = step.over = step.backward = "mine"
    step = train_step(optimizer)(step)
    assert [step(batch).updated for batch in step.over(BATCHES)] == [True] * 3


def test_ordinary_decorators_in_between_work(model, optimizer):
    def logged(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    @train_step(optimizer)
    @logged
    def returning(batch):
        return loss_of(model, batch)

    @accumulate(1, model)
    @logged
    def yielding(batch):
        yield loss_of(model, batch)
        optimizer.step()

    assert returning(BATCHES[0]).updated and yielding(BATCHES[0]).updated
    assert is_as_by_hand(model, optimizer, BATCHES[:1] * 2)


def test_a_bound_method_makes_a_step_of_each_instance():
    class Trainer:
        def __init__(self):
            self.model = make_model()
            self.step = train_step(torch.optim.SGD(self.model.parameters()))(self.loss)

        def loss(self, batch):
            return loss_of(self.model, batch)

    first, second = Trainer(), Trainer()
    first.step(BATCHES[0])
    assert (first.step.updates, second.step.updates) == (1, 0)


# Windows.


def test_a_window_starts_from_no_gradients_and_a_returning_step_ends_with_none(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    seen = []

    @accumulate(1, model)
    def step(batch):
        yield loss_of(model, batch)
        seen.extend(gradients_of(model))

    step(BATCHES[0])
    loss_of(fresh := make_model(), BATCHES[0]).backward()
    assert same_bits(seen, gradients_of(fresh))
    train_step(optimizer)(lambda batch: loss_of(model, batch))(BATCHES[0])
    assert no_gradients(model)


def test_the_length_may_follow_the_number_of_updates(model, optimizer):
    step = train_step(optimizer, accumulate(lambda updates: updates + 1), accumulate(2))(
        lambda batch: loss_of(model, batch)
    )
    complete = [step(BATCHES[0]).complete for _ in range(12)]
    assert [i for i, c in enumerate(complete, 1) if c] == [2, 6, 12]


def test_an_evaluation_in_the_middle_of_a_window_disturbs_nothing(model, optimizer):
    step = train_step(optimizer, accumulate(2))
    for batch in BATCHES[:2]:
        with step:
            step.backward(loss_of(model, batch))
        with step as result, torch.no_grad():
            loss_of(model, batch)
        assert result.loss is None and result.window_loss is None and not result.complete
    assert step.updates == 1 and is_as_by_hand(model, optimizer, BATCHES[:2], 2)


def test_a_first_evaluation_in_inference_mode_leaves_a_step_usable():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.float16))
    with torch.inference_mode(), step:
        loss_of(model, FLOAT32[0])
    with step as result:
        step.backward(loss_of(model, FLOAT32[0]))
    assert result.updated


def test_discard_drops_the_window(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    before = snapshot(model, optimizer)
    step(BATCHES[0])
    step.discard()
    assert unchanged(before, model, optimizer)
    assert [step(batch).complete for batch in BATCHES[1:]] == [False, True]
    step.discard()
    assert step.updates == 1 and is_as_by_hand(model, optimizer, BATCHES[1:], 2)


def test_window_loss_is_the_weighted_mean_so_far(model, optimizer):
    step = train_step(optimizer, accumulate(3))(
        lambda batch: (loss_of(model, batch), len(batch[0]))
    )
    results = [step(batch) for batch in BATCHES]
    a, b, c = (loss_of(make_model(), batch).item() for batch in BATCHES)
    expected = [a, (4 * a + 4 * b) / 8, (4 * a + 4 * b + 2 * c) / 10]
    assert [r.window_loss.item() for r in results] == pytest.approx(expected, rel=1e-12)


# Exceptions.


def faces_that_fail(model, optimizer, loss, closed):
    def yielding(batch):
        try:
            yield loss(batch)
            optimizer.step()
        finally:
            closed.append(True)

    return {"return": loss, "yield": yielding}


@pytest.mark.parametrize("face", ["return", "yield"])
def test_an_exception_in_forward_does_not_count(model, optimizer, face):
    fail = False

    def loss(batch):
        result = loss_of(model, batch)
        if fail:
            raise KeyboardInterrupt
        return result

    function = faces_that_fail(model, optimizer, loss, [])[face]
    step = accumulate(2)(train_step(optimizer)(function))
    step(BATCHES[0])
    before = snapshot(model, optimizer)
    fail = True
    with pytest.raises(KeyboardInterrupt):
        step(BATCHES[1])
    assert unchanged(before, model, optimizer)
    fail = False
    assert step(BATCHES[1]).updated and is_as_by_hand(model, optimizer, BATCHES[:2], 2)


class Break(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError


def breaks_half_way(model, batch):
    """A loss in whose backward the upper layer has its gradient before the exception."""
    return F.mse_loss(model[2](Break.apply(model[0](batch[0]))), batch[1])


@pytest.mark.parametrize("face", ["return", "yield"])
def test_an_exception_in_backward_drops_the_window(model, optimizer, face):
    closed, fail = [], False

    def loss(batch):
        return breaks_half_way(model, batch) if fail else loss_of(model, batch)

    function = faces_that_fail(model, optimizer, loss, closed)[face]
    step = accumulate(2)(train_step(optimizer)(function))
    before = snapshot(model, optimizer)
    step(BATCHES[0])
    fail = True
    with pytest.raises(MemoryError):
        step(BATCHES[1])
    assert unchanged(before, model, optimizer) and closed == [True, True] * (face == "yield")
    fail = False
    assert [step(batch).complete for batch in BATCHES[:2]] == [False, True]
    assert is_as_by_hand(model, optimizer, BATCHES[:2], 2)


def test_an_exception_in_backward_may_be_caught_inside_the_block(model, optimizer):
    """It drops the window; a loss after it opens the next."""
    step = train_step(optimizer, accumulate(2))
    with step:
        step.backward(loss_of(model, BATCHES[2]))
    with step as result:
        with pytest.raises(MemoryError):
            step.backward(breaks_half_way(model, BATCHES[0]))
        step.discard()
    assert not result.complete and "window" not in step.state_dict()
    with step:
        with pytest.raises(MemoryError):
            step.backward(breaks_half_way(model, BATCHES[0]))
        step.backward(loss_of(model, BATCHES[0]))
    with step as result:
        step.backward(loss_of(model, BATCHES[1]))
    assert result.updated and is_as_by_hand(model, optimizer, BATCHES[:2], 2)


def test_an_exception_in_a_block_after_its_loss_drops_the_window(model, optimizer):
    step = train_step(optimizer, accumulate(2))
    with pytest.raises(LookupError), step:
        step.backward(loss_of(model, BATCHES[0]))
        raise LookupError
    assert "window" not in step.state_dict() and no_gradients(model)


@pytest.mark.parametrize("place", ["below the yield", "in a finally"])
def test_an_exception_of_the_code_around_a_yield_drops_the_window(model, place):
    @accumulate(1 if place == "below the yield" else 2, model)
    def step(batch):
        try:
            yield loss_of(model, batch)
        finally:
            raise LookupError

    with pytest.raises(LookupError):
        step(BATCHES[0])
    assert step.updates == 0 and "window" not in step.state_dict() and no_gradients(model)


def test_an_exception_of_the_optimizer_leaves_no_scale_behind():
    model = make_model(torch.float32)
    optimizer = adamw(model, fused=True)
    step = train_step(optimizer, max_norm=0.1)(lambda batch: loss_of(model, batch))
    optimizer.state[next(model.parameters())]["step"] = "broken"
    with pytest.raises(KeyError):
        step(FLOAT32[0])
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    assert no_gradients(model)


@pytest.mark.parametrize("face", ["return", "yield"])
def test_a_backward_or_an_update_of_the_users_own_is_explained(model, face):
    """Torch's own advice, retain_graph and anomaly detection, is for other loops."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def twice(x):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def moved(x):
        loss = model(x).square().mean()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return loss

    for loss, remedy in ((twice, r"`loss\.backward\(\)`"), (moved, r"`optimizer\.step\(\)`")):
        function = faces_that_fail(model, optimizer, loss, [])[face]
        step = train_step(optimizer, accumulate(2))(function)
        with pytest.raises(RuntimeError, match=remedy):
            step(torch.ones(2, 4).double())
        assert step.updates == 0 and no_gradients(model)


@pytest.mark.parametrize("function", [None, "itself"])
def test_a_step_is_not_entered_from_within(model, optimizer, function):
    step = train_step(optimizer, accumulate(2))
    if function:
        step = step(lambda batch: step(batch))
    with pytest.raises(RuntimeError, match=r"`step\.backward\(loss\)`"):
        if function:
            step(BATCHES[0])
        else:
            with step, step:
                pass
    with pytest.raises(RuntimeError, match="inside a micro-batch"):
        step.backward(loss_of(model, BATCHES[0]))


# Further losses.


@pytest.mark.parametrize("weighted", [False, True])
def test_a_further_loss_counts_its_micro_batch_once(model, optimizer, weighted):
    """Adversarial weight perturbation: a second loss is taken at moved weights."""

    def perturbed(model, batch, backward):
        backward(loss_of(model, batch))
        with torch.no_grad():
            moved = [torch.full_like(p, 0.01) for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), moved)
        backward(loss_of(model, batch))
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moved)

    step = train_step(optimizer, accumulate(2), max_norm=0.1)
    for batch in BATCHES[:2]:
        weights = iter([3, None] if weighted else [None, None])
        with step as result:
            expected = loss_of(model, batch)
            perturbed(model, batch, lambda loss, w=weights: step.backward(loss, next(w)))
        assert torch.equal(result.loss, expected)  # the first loss
    assert result.updated
    expected = make_model()
    theirs = adamw(expected)
    for batch in BATCHES[:2]:
        perturbed(expected, batch, lambda loss: (loss / 2).backward())
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    theirs.step()
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


def test_a_further_loss_inside_a_step_function_is_added_to_the_one_returned(model, optimizer):
    def penalty(model):
        return 0.5 * sum(p.square().sum() for p in model.parameters())

    @train_step(optimizer, accumulate(2))
    def step(batch):
        step.backward(penalty(model))
        return loss_of(model, batch)

    results = [step(batch) for batch in BATCHES[:2]]
    assert torch.equal(results[0].loss, loss_of(make_model(), BATCHES[0]).detach())
    expected = make_model()
    theirs = adamw(expected)
    for batch in BATCHES[:2]:
        ((loss_of(expected, batch) + penalty(expected)) / 2).backward()
    theirs.step()
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


@pytest.mark.parametrize("weight", [None, 2, torch.tensor(2)])
@pytest.mark.parametrize("losses", [1, 3])
def test_a_parameter_of_one_element_does_not_change_what_backward_starts_from(weight, losses):
    """Its gradient may take the memory of that number, and is added to there."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    step = train_step(torch.optim.SGD([parameter], lr=1.0), accumulate(2))
    for _ in range(8):
        with step:
            step.backward(parameter.squeeze(), weight)
            for _ in range(1, losses):
                step.backward(parameter.squeeze())
    assert step.updates == 4 and parameter.item() == pytest.approx(1 - 4 * losses)


def test_a_loss_of_a_tensor_subclass_runs_its_own_backward(model, optimizer):
    seen = []

    class Loss(torch.Tensor):
        def backward(self, gradient=None):
            seen.append(gradient.item())
            super().backward(gradient)

    step = train_step(optimizer, accumulate(2))
    step(lambda batch: loss_of(model, batch).as_subclass(Loss))(BATCHES[0])
    assert seen == [0.5]


# over and last.


def test_over_closes_the_windows_of_all_steps_with_and_without_a_length(model, optimizer):
    another = make_model()
    other = torch.optim.SGD(another.parameters())
    for loader in (BATCHES, iter(BATCHES), [], BATCHES[:1]):
        a = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
        b = train_step(other, accumulate(5))(lambda batch: loss_of(another, batch))
        count = 0
        for batch in a.over(loader, b):
            count += 1
            a(batch)
            b(batch)
        assert (a.updates, b.updates) == (-(-count // 2), min(count, 1))


def test_over_warns_where_the_last_batch_never_reached_the_step(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    with pytest.warns(UserWarning, match=r"`step\.discard\(\)`"):
        for i, batch in enumerate(step.over(BATCHES)):
            if i == 0:
                step(batch)
    step.discard()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in step.over(BATCHES):
            step(batch)


def test_a_loop_left_early_does_not_leave_the_step_at_its_last_batch(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    for batch in step.over(BATCHES):
        if batch is BATCHES[-1]:
            break
    assert not step(BATCHES[0]).complete
    step.discard()
    complete = []
    for outer in step.over(BATCHES[:2]):
        complete += [step(inner).complete for inner in step.over(BATCHES)]
        complete.append(step(outer).complete)
    assert complete == [False, True, True, False, True, False, True, True]


def test_last_closes_the_window_of_its_own_call_alone(model, optimizer):
    fail = False

    def loss(batch):
        if fail:
            raise LookupError
        return loss_of(model, batch)

    step = train_step(optimizer, accumulate(3))(loss)
    fail = True
    with pytest.raises(LookupError):
        step.last(BATCHES[0])
    fail = False
    calls = [step, step.last, step, step, step]
    assert [call(BATCHES[0]).complete for call in calls] == [False, True, False, False, True]


@pytest.mark.parametrize("n", [4, None])
def test_several_micro_batches_at_the_last_batch_are_warned_of(n, model, optimizer):
    step = train_step(optimizer, accumulate(n))(lambda batch: loss_of(model, batch))
    with pytest.warns(UserWarning, match=r"several micro-batches"):
        for batch in step.over(BATCHES[:2]):
            step(batch)
            step(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in BATCHES:
            step.last(batch)
        for _ in range(2):  # epochs whose only window is short
            for batch in step.over(BATCHES):
                step(batch)


# State.


def test_a_state_that_does_not_fit_is_refused_before_anything_changes(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    state = step.state_dict()
    other = torch.nn.Linear(3, 3)
    elsewhere = train_step(torch.optim.SGD(other.parameters()), accumulate(2))(
        lambda x: F.mse_loss(other(x), x)
    )
    elsewhere(torch.ones(2, 3))
    before = elsewhere.state_dict()
    for broken in (
        state,  # its gradients have other shapes
        other.state_dict(),
        {**before, "window": {}},
        {**before, "updates": "a"},
        {**before, "gradients": {0: 1}},
        {name: value for name, value in before.items() if name != "gradients"},
        [],
    ):
        with pytest.raises(ValueError, match=r"`step\.state_dict\(\)`"):
            elsewhere.load_state_dict(broken)
    after = elsewhere.state_dict()
    assert after["updates"] == before["updates"] and after["window"] == before["window"]
    assert same_bits([*after["gradients"].values()], [*before["gradients"].values()])


def test_a_state_is_a_copy(model, optimizer):
    step = train_step(optimizer, accumulate(3))(lambda batch: loss_of(model, batch))
    result = step(BATCHES[0])
    state = step.state_dict()
    saved = [gradient.clone() for gradient in state["gradients"].values()]
    step(BATCHES[1])
    assert same_bits(saved, list(state["gradients"].values()))
    result.loss.zero_()
    assert state["window"]["losses"][0] > 0
    for _ in range(2):  # what is loaded is a copy too
        step.load_state_dict(state)
        step(BATCHES[1])
    step.load_state_dict(state)
    step(BATCHES[1])
    assert step(BATCHES[2]).updated and is_as_by_hand(model, optimizer, BATCHES, 3)


def test_a_state_is_taken_between_two_micro_batches(model, optimizer):
    """From backward on, the sums hold a gradient that the counters do not have yet."""
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    with step:
        state = step.state_dict()
        step.backward(loss_of(model, BATCHES[0]))
        for call in (step.state_dict, lambda: step.load_state_dict(state)):
            with pytest.raises(RuntimeError, match="between two micro-batches"):
                call()
    assert len(step.state_dict()["window"]["losses"]) == 1

    @accumulate(1, model)
    def yielding(batch):
        yield loss_of(model, batch)
        yielding.state_dict()

    with pytest.raises(RuntimeError, match="between two micro-batches"):
        yielding(BATCHES[0])


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
def test_a_state_goes_from_one_precision_to_another(dtypes):
    """From a T4 to an A100: the open window is scaled on one, and not on the other."""
    norms = []
    for first, second in (dtypes, dtypes[1:] * 2):
        model = make_model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = [
            train_step(optimizer, accumulate(2), amp(dtype=dtype))(
                lambda batch, model=model: loss_of(model, batch)
            )
            for dtype in (first, second)
        ]
        steps[0](FLOAT32[0])
        steps[1].load_state_dict(steps[0].state_dict())
        norms.append(steps[1](FLOAT32[1]).grad_norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
