import functools
import inspect
import math
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

import trainkit.core.step
from trainkit import Step, accumulate, amp, train_step

# Faces.


def test_every_face_takes_the_same_updates():
    def returning(model, optimizer):
        step = train_step(optimizer, accumulate(2), max_norm=0.1)(
            lambda batch: loss_of(model, batch)
        )
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
        step = train_step(optimizer, accumulate(2), max_norm=0.1)
        results = []
        for batch in step.over(BATCHES):
            with step as result:
                step.backward(loss_of(model, batch))
            results.append(result)
        return results

    def without_over(model, optimizer):
        step = train_step(optimizer, accumulate(2), max_norm=0.1)(
            lambda batch: loss_of(model, batch)
        )
        return [step(BATCHES[0]), step(BATCHES[1]), step.last(BATCHES[2])]

    seen = []
    for face in (returning, yielding, by_hand, without_over):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        results = face(model, optimizer)
        assert [(r.complete, r.updated) for r in results] == [
            (False, False),
            (True, True),
            (True, True),
        ]
        seen.append((state_of(model, optimizer), [r.loss for r in results], results[1].grad_norm))
    for state, losses, norm in seen[1:]:
        assert (
            same_bits(state, seen[0][0])
            and same_bits(losses, seen[0][1])
            and torch.equal(norm, seen[0][2])
        )
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plain_loop(model, optimizer, BATCHES, 2, max_norm=0.1)
    assert distance(seen[0][0], state_of(model, optimizer)) <= 1e-12


def test_amp_with_an_optimizer_alone_is_a_context(model, optimizer):
    scaled = amp(optimizer, dtype=torch.float32, max_norm=1e-3)
    with scaled as result:
        scaled.backward(loss_of(model, BATCHES[0]))
    assert result.complete and result.updated and result.grad_norm > 1e-3 and scaled.updates == 1


def test_a_step_keeps_name_docstring_and_signature(model, optimizer):
    @accumulate(2, model)
    def step(x, *, y=1):
        """Doc."""
        yield loss_of(model, (x, y))

    assert (step.__name__, step.__doc__, list(inspect.signature(step).parameters)) == (
        "step",
        "Doc.",
        ["x", "y"],
    )
    assert isinstance(step, Step)


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
    assert all(parameter.grad is None for parameter in model.parameters())


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
    assert step.updates == 1
    plain_loop(
        expected := make_model(),
        theirs := torch.optim.AdamW(expected.parameters(), lr=0.01),
        BATCHES[:2],
        2,
    )
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


def test_discard_drops_the_window(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    before = snapshot(model, optimizer)
    step(BATCHES[0])
    step.discard()
    assert unchanged(before, model, optimizer)
    assert [step(BATCHES[0]).complete, step(BATCHES[0]).complete] == [False, True]
    step.discard()
    assert step.updates == 1


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_weights_that_sum_to_zero_skip_the_update(on_device, fused, max_norm):
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    step = train_step(optimizer, accumulate(2), max_norm=max_norm)(
        lambda batch, weight: (loss_of(model, batch), torch.tensor(weight) if on_device else weight)
    )
    batch = make_batches([3], torch.float32)[0]
    before = [p.clone() for p in model.parameters()]
    results = [step(batch, 0), step(batch, 0)]
    assert results[1].complete and not results[1].updated and step.skipped == 1
    assert same_bits(before, list(model.parameters()))
    step(batch, 0)
    assert step(batch, 5).updated and step.updates == 1


def test_a_weight_of_zero_contributes_nothing(model, optimizer):
    step = train_step(optimizer, accumulate(2))(
        lambda batch, weight: (loss_of(model, batch), weight)
    )
    step(BATCHES[0], 0)
    step(BATCHES[1], 7)
    plain_loop(
        expected := make_model(),
        theirs := torch.optim.AdamW(expected.parameters(), lr=0.01),
        [BATCHES[1]],
    )
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_sums_of_weights_do_not_overflow_their_dtype(model, optimizer, dtype):
    weights = (
        [200, 200, 100, 50]
        if dtype == torch.uint8
        else [100, 100, 100, 50]
        if dtype == torch.int8
        else [2**30] * 3 + [7]
    )
    step = train_step(optimizer, accumulate(4))(
        lambda batch, weight: (loss_of(model, batch), torch.tensor(weight, dtype=dtype))
    )
    batches = make_batches([3, 3, 3, 3])
    results = [step(batch, weight) for batch, weight in zip(batches, weights, strict=True)]
    plain_loop(
        expected := make_model(),
        theirs := torch.optim.AdamW(expected.parameters(), lr=0.01),
        batches,
        4,
        weights,
    )
    assert (
        results[-1].updated
        and distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12
    )
    losses = [loss_of(make_model(), batch).item() for batch in batches]
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    assert math.isclose(results[-1].window_loss.item(), mean)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_window_of_weight_zero_does_not_lose_the_reference(on_device):
    model = make_model(torch.float32)
    step = train_step(
        torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), amp(dtype=torch.float16)
    )(lambda batch, weight: (loss_of(model, batch), torch.tensor(weight) if on_device else weight))
    batch = make_batches([3], torch.float32)[0]
    updated = [step(batch, weight).updated for weight in (10**6, 10**6, 0, 0, 10**6, 10**6)]
    assert (
        updated == [False, True, False, False, False, True]
        and step.state_dict()["loss_scale"] == 65536
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_on_the_device_that_is_no_number_skips_its_window_only(fused, weight):
    model = make_model(torch.float32)
    step = train_step(torch.optim.AdamW(model.parameters(), fused=fused))(
        lambda batch, weight: {"loss": loss_of(model, batch), "weight": torch.tensor(weight)}
    )
    batch = make_batches([3], torch.float32)[0]
    assert [step(batch, w).updated for w in (2.0, weight, 2.0)] == [True, False, True]


# Exceptions.


@pytest.mark.parametrize("generator", [False, True])
def test_an_exception_in_forward_does_not_count(model, optimizer, generator):
    fail = False

    def returning(batch):
        loss = loss_of(model, batch)
        if fail:
            raise KeyboardInterrupt
        return loss

    def yielding(batch):
        yield returning(batch)
        optimizer.step()

    step = accumulate(2)(train_step(optimizer)(yielding if generator else returning))
    step(BATCHES[0])
    before = snapshot(model, optimizer)
    fail = True
    with pytest.raises(KeyboardInterrupt):
        step(BATCHES[1])
    assert unchanged(before, model, optimizer)
    fail = False
    assert step(BATCHES[1]).updated
    plain_loop(
        expected := make_model(),
        theirs := torch.optim.AdamW(expected.parameters(), lr=0.01),
        BATCHES[:2],
        2,
    )
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


class Break(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError


@pytest.mark.parametrize("generator", [False, True])
def test_an_exception_in_backward_drops_the_window(model, optimizer, generator):
    closed = []

    def returning(batch, fail):
        return Break.apply(loss_of(model, batch)) if fail else loss_of(model, batch)

    def yielding(batch, fail):
        try:
            yield returning(batch, fail)
            optimizer.step()
        finally:
            closed.append(True)

    before = snapshot(model, optimizer)
    step = accumulate(2)(train_step(optimizer)(yielding if generator else returning))
    step(BATCHES[0], False)
    with pytest.raises(MemoryError):
        step(BATCHES[1], True)
    assert unchanged(before, model, optimizer)
    assert closed == [True, True] * generator
    assert [step(BATCHES[0], False).complete, step(BATCHES[1], False).complete] == [False, True]


def test_an_exception_in_backward_may_be_caught_inside_the_block(model, optimizer):
    step = train_step(optimizer, accumulate(2))
    with step as result:
        with pytest.raises(MemoryError):
            step.backward(Break.apply(loss_of(model, BATCHES[0])))
        step.discard()
    assert not result.complete and "window" not in step.state_dict()
    x, y = BATCHES[0]
    with step:
        with pytest.raises(
            MemoryError
        ):  # on its way, when the upper layer has its gradient already
            step.backward(F.mse_loss(model[2](Break.apply(model[0](x))), y))
        step.backward(loss_of(model, BATCHES[0]))
    with step as result:
        step.backward(loss_of(model, BATCHES[1]))
    plain_loop(
        expected := make_model(),
        theirs := torch.optim.AdamW(expected.parameters(), lr=0.01),
        BATCHES[:2],
        2,
    )
    assert (
        result.updated and distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12
    )


def test_an_exception_below_the_yield_drops_the_window_and_goes_on(model, optimizer):
    @accumulate(1, model)
    def step(batch):
        yield loss_of(model, batch)
        raise LookupError

    with pytest.raises(LookupError):
        step(BATCHES[0])
    assert step.updates == 0 and all(p.grad is None for p in model.parameters())


def test_an_exception_of_the_optimizer_leaves_no_scale_behind():
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = train_step(optimizer, max_norm=0.1)(lambda batch: loss_of(model, batch))
    optimizer.state[next(model.parameters())]["step"] = "broken"
    with pytest.raises(KeyError):
        step(make_batches([2], torch.float32)[0])
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_an_exception_of_a_finally_around_the_yield_drops_the_window(model, optimizer):
    @accumulate(2, model)
    def step(batch):
        try:
            yield loss_of(model, batch)
        finally:
            raise LookupError

    with pytest.raises(LookupError):
        step(BATCHES[0])
    assert "window" not in step.state_dict() and all(p.grad is None for p in model.parameters())


# Autocast.


def test_forward_runs_under_autocast_and_nothing_else_does():
    model = make_model(torch.float32)
    seen = {}

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen["forward"] = torch.is_autocast_enabled("cpu")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen["backward"] = torch.is_autocast_enabled("cpu")
            return gradient

    @accumulate(1, model)
    @amp(dtype=torch.bfloat16)
    def step(batch):
        yield Look.apply(loss_of(model, batch))
        seen["update"] = torch.is_autocast_enabled("cpu")

    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # of the code around, which backward must not run under either
        step(make_batches([2], torch.float32)[0])
    assert seen == {"forward": True, "backward": False, "update": True}
    step(make_batches([2], torch.float32)[0])
    assert seen == {"forward": True, "backward": False, "update": False}
    assert not torch.is_autocast_enabled("cpu")


# Further losses.


@pytest.mark.parametrize("weighted", [False, True])
def test_a_further_loss_counts_its_micro_batch_once(model, optimizer, weighted):
    """Adversarial weight perturbation: the gradient of a second loss, at moved weights, is added."""

    def perturbed(model, batch, backward):
        backward(loss_of(model, batch))
        with torch.no_grad():
            moved = [torch.full_like(p, 0.01) for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), moved)
        loss = loss_of(model, batch)
        loss_and_graph = loss + 0
        backward(loss_and_graph)
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moved)

    step = train_step(optimizer, accumulate(2), max_norm=0.1)
    with pytest.raises(TypeError, match="came with 3, this one with 4"), step:
        step.backward(loss_of(model, BATCHES[0]), 3)
        step.backward(loss_of(model, BATCHES[0]), 4)
    for batch in BATCHES[:2]:
        with step:
            weights = iter([3, None])
            perturbed(
                model, batch, lambda loss: step.backward(loss, next(weights) if weighted else None)
            )  # noqa: B023
    expected = make_model()
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for batch in BATCHES[:2]:
        perturbed(expected, batch, lambda loss: (loss / 2).backward())
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    theirs.step()
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


def test_a_further_loss_inside_a_step_function_is_added_to_the_one_returned(model, optimizer):
    @train_step(optimizer, accumulate(2))
    def step(batch):
        step.backward(0.5 * sum(p.square().sum() for p in model.parameters()))
        return loss_of(model, batch)

    results = [step(batch) for batch in BATCHES[:2]]
    assert torch.equal(results[0].loss, loss_of(make_model(), BATCHES[0]).detach())
    expected = make_model()
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for batch in BATCHES[:2]:
        (
            (loss_of(expected, batch) + 0.5 * sum(p.square().sum() for p in expected.parameters()))
            / 2
        ).backward()
    theirs.step()
    assert distance(state_of(model, optimizer), state_of(expected, theirs)) <= 1e-12


# Refusals, before anything is changed.


def test_weighted_then_unweighted_is_refused(model, optimizer):
    step = train_step(optimizer, accumulate(2))(
        lambda batch, weight: (loss_of(model, batch), weight) if weight else loss_of(model, batch)
    )
    step(BATCHES[0], 2)
    with pytest.raises(TypeError, match="came without a weight"):
        step(BATCHES[0], None)


def test_a_returning_step_without_an_optimizer_is_refused(model):
    with pytest.raises(ValueError, match="no optimizer was given"):
        accumulate(2, model)(lambda batch: loss_of(model, batch))(BATCHES[0])


def test_a_decorated_method_is_refused(model, optimizer):
    class Trainer:
        @train_step(optimizer)
        def step(self, batch):
            return loss_of(model, batch)

    with pytest.raises(TypeError, match=r"self.step = train_step\(...\)\(self.step\)"):
        Trainer().step(BATCHES[0])
    assert isinstance(Trainer.step, Step)


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


def test_a_step_is_not_entered_from_within(model, optimizer):
    @train_step(optimizer)
    def step(batch):
        step(batch)

    with pytest.raises(RuntimeError, match="under way"):
        step(BATCHES[0])
    with pytest.raises(RuntimeError, match="inside a micro-batch"):
        step.backward(loss_of(model, BATCHES[0]))


# over.


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
    with pytest.warns(UserWarning, match="did not reach"):
        for batch in step.over(BATCHES):
            if batch is not BATCHES[-1] and batch is not BATCHES[1]:
                step(batch)
    step.discard()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in step.over(BATCHES):
            step(batch)
            if batch is BATCHES[1]:
                break
        assert [step(BATCHES[0]).complete, step(BATCHES[0]).complete] == [False, True]


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


def test_over_takes_steps(optimizer):
    step = train_step(optimizer)
    with pytest.raises(TypeError, match="then steps"):
        step.over([], optimizer)


# after, and the verdict on its way.


class Event:
    """A device that has not got to it yet."""

    ready = False

    def query(self):
        return Event.ready

    def synchronize(self):
        Event.ready = True


@pytest.fixture
def slow_device(monkeypatch):
    class Slow(trainkit.core.step.Answer):
        def __init__(self, skipped):
            super().__init__(skipped)
            Event.ready = False
            self._event = Event()

    monkeypatch.setattr(trainkit.core.step, "Answer", Slow)


@pytest.mark.parametrize("fused", [False, True])
def test_after_runs_once_for_each_applied_update(fused):
    """Never after a skipped one: pytorch#67590, accelerate#4242."""
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    calls = []
    step = train_step(
        optimizer,
        amp(dtype=torch.float32),
        after=[lambda: calls.append("a"), lambda: calls.append("b")],
    )(lambda batch: loss_of(model, batch))
    good, bad = (
        make_batches([2], torch.float32)[0],
        (torch.full((2, 4), math.nan), torch.zeros(2, 3)),
    )
    assert step(good).updated and calls == ["a", "b"]
    assert not step(bad).updated and calls == ["a", "b"]
    assert step(good).updated and calls == ["a", "b"] * 2
    assert (step.updates, step.skipped) == (2, 1)


def test_after_waits_for_no_device_and_is_settled_before_the_next_update(slow_device):
    model = make_model(torch.float32)
    calls = []
    step = train_step(
        torch.optim.AdamW(model.parameters(), fused=True),
        accumulate(2),
        max_norm=1.0,
        after=lambda: calls.append(1),
    )(lambda batch: loss_of(model, batch))
    batch = make_batches([2], torch.float32)[0]
    step(batch), step(batch)
    assert calls == []
    step(batch)  # the event has not completed
    assert calls == []
    step(batch)  # the next update
    assert len(calls) == 1
    Event.ready = True
    step(batch)
    assert len(calls) == 2
    step(batch)
    assert len(calls) == 2 and step.updates == 3 and len(calls) == 3
    for again in step.over([batch] * 2):
        step(again)
    assert len(calls) == 4


# State.


def test_state_holds_numbers_and_tensors_and_survives_a_safe_load(tmp_path):
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(2), amp(dtype=torch.float16))(
        lambda batch: (loss_of(model, batch), torch.tensor(2))
    )
    for batch in make_batches([2, 2, 2], torch.float32):
        step(batch)
    torch.save(step.state_dict(), tmp_path / "step.pt")
    step.load_state_dict(torch.load(tmp_path / "step.pt", weights_only=True))
    assert step.updates == 1 and len(step.state_dict()["window"]["losses"]) == 1


def test_a_state_of_another_model_is_refused_before_anything_changes(model, optimizer):
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    state = step.state_dict()
    other = torch.nn.Linear(3, 3)
    elsewhere = train_step(torch.optim.SGD(other.parameters()), accumulate(2))(
        lambda x: F.mse_loss(other(x), x)
    )
    elsewhere(torch.ones(2, 3))
    before = gradients_of(other)
    with pytest.raises(ValueError, match="shape"):
        elsewhere.load_state_dict(state)
    for broken in (
        other.state_dict(),
        {**state, "window": {}},
        {**state, "updates": "a"},
        {**state, "gradients": {0: 1}},
        [],
    ):
        with pytest.raises(ValueError, match=r"not the state of a step|parameter 0"):
            elsewhere.load_state_dict(broken)
    assert same_bits(before, gradients_of(other)) and "window" in elsewhere.state_dict()


def test_a_state_is_a_copy_and_what_it_restores_is_watched_too(model, optimizer):
    step = train_step(optimizer, accumulate(3))(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    state = step.state_dict()
    saved = [gradient.clone() for gradient in state["gradients"].values()]
    step(BATCHES[1])
    assert same_bits(saved, list(state["gradients"].values()))
    step.load_state_dict(state)
    assert same_bits(saved, gradients_of(model))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="has lost the gradients"):
        step(BATCHES[1])


def test_attributes_of_the_function_do_not_get_into_the_step(model, optimizer):
    def step(batch):
        return loss_of(model, batch)

    step._plan = step._window = "mine"
    assert train_step(optimizer)(step)(BATCHES[0]).updated


def test_a_state_is_taken_between_two_micro_batches(model, optimizer):
    """Within one, from backward on, the gradients have what the counters have not; or the other way round."""
    step = train_step(optimizer, accumulate(2))(lambda batch: loss_of(model, batch))
    with step:
        state = step.state_dict()
        step.backward(loss_of(model, BATCHES[0]))
        for call in (step.state_dict, lambda: step.load_state_dict(state)):
            with pytest.raises(
                RuntimeError, match="within a micro-batch, which is half done: call it between"
            ):
                call()
    assert len(step.state_dict()["window"]["losses"]) == 1

    @accumulate(1, model)
    def yielding(batch):
        yield loss_of(model, batch)
        yielding.state_dict()

    with pytest.raises(RuntimeError, match="between two micro-batches"):
        yielding(BATCHES[0])


def test_a_further_loss_below_the_yield_is_refused(model, optimizer):
    """It would come scaled to gradients that are not any more, and past the clipping."""

    @amp(optimizer, dtype=torch.float32)
    def step(batch):
        yield loss_of(model, batch)
        step.backward(loss_of(model, batch))

    with pytest.raises(RuntimeError, match=r"below the yield.*`loss.backward\(\)`"):
        step(BATCHES[0])
    assert all(p.grad is None for p in model.parameters())


def test_a_first_evaluation_in_inference_mode_leaves_a_step_usable():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), amp(dtype=torch.float16))
    batch = make_batches([4], torch.float32)[0]
    with torch.inference_mode(), step:
        loss_of(model, batch)
    with step as result:
        step.backward(loss_of(model, batch))
    assert result.updated


def test_several_micro_batches_at_the_last_batch_are_warned_of(model, optimizer):
    step = train_step(optimizer, accumulate(4))(lambda batch: loss_of(model, batch))
    with pytest.warns(
        UserWarning, match=r"several micro-batches came at the last batch of `step.over`"
    ):
        for batch in step.over(BATCHES[:2]):
            step(batch)
            step(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in BATCHES:
            step.last(batch)


def test_reading_updated_runs_what_is_owed(monkeypatch, model):
    monkeypatch.setattr(trainkit.core.step.Answer, "known", lambda self: False)
    calls = []
    step = train_step(torch.optim.SGD(model.parameters()), after=lambda: calls.append(1))(
        lambda batch: loss_of(model, batch)
    )
    result = step(BATCHES[0])
    assert not calls and result.updated and calls == [1]


def test_after_is_owed_until_the_wait_for_the_verdict_is_over(monkeypatch, model, optimizer):
    """The wait is where a slow device is interrupted, and the scheduler must not miss the update for it."""
    calls = []
    step = train_step(optimizer, after=lambda: calls.append(1))(lambda batch: loss_of(model, batch))
    monkeypatch.setattr(trainkit.core.step.Answer, "known", lambda self: False)
    step(BATCHES[0])
    with monkeypatch.context() as patch:
        patch.setattr(trainkit.core.step.Answer, "read", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step.settle()
    assert calls == [] and step.updates == 1 and calls == [1]
