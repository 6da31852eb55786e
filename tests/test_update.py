import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import OPTIMIZERS, distance, loss_of, make_batches, make_model, same_bits, state_of
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import trainkit.update as update
from trainkit import accumulate, amp, train_step
from trainkit.update import Check, LossScale, can_fuse

CPU = torch.device("cpu")
FUSED = [kind for kind in OPTIMIZERS if kind.endswith("fused")]
BATCHES = make_batches([4, 4, 2], torch.float32)


class Count(TorchDispatchMode):
    """Counts operations, and those of them that write into one of some tensors."""

    def __init__(self):
        super().__init__()
        self.ops = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops[name] = self.ops.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(optimizer_of, *parts, weight=None, **options):
    """The operations of one update, the second."""
    model = make_model(torch.float32)

    @train_step(optimizer_of(model.parameters()), *parts, **options)
    def step(batch):
        return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

    step(BATCHES[0])
    with Count() as count:
        step(BATCHES[1])
    return count.ops


@pytest.mark.parametrize("kind", [kind for kind in FUSED if "dampening" not in kind])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [None, 3, torch.tensor(3)])
def test_the_fused_path_reads_nothing_back_and_multiplies_no_gradient(kind, options, dtype, weight):
    ops = counted(OPTIMIZERS[kind], amp(dtype=dtype), weight=weight, **options)
    assert "_local_scalar_dense" not in ops and "_foreach_mul_" not in ops


def test_other_optimizers_wait_once_and_multiply_once_where_there_is_something_to_multiply():
    ops = counted(torch.optim.SGD, amp(dtype=torch.float32))
    assert ops["_local_scalar_dense"] == 1 and "_foreach_mul_" not in ops
    ops = counted(torch.optim.SGD, amp(dtype=torch.float16), max_norm=1e-3)
    assert ops["_foreach_mul_"] == 1
    ops = counted(torch.optim.SGD)
    assert "_local_scalar_dense" not in ops and "_foreach_mul_" not in ops and "_foreach_norm" not in ops


def test_a_call_inside_a_window_adds_no_operation_but_detach():
    model = make_model(torch.float32)
    step = train_step(torch.optim.SGD(model.parameters()), accumulate(9), max_norm=1.0)(lambda batch: loss_of(model, batch))
    step(BATCHES[0])
    with Count() as ours:
        step(BATCHES[1])
    seed = torch.tensor(1 / 9)
    with Count() as theirs:
        loss_of(model, BATCHES[1]).backward(gradient=seed)
    assert ours.ops.pop("detach") - theirs.ops.pop("detach", 0) == 1
    assert ours.ops == theirs.ops


def test_the_fused_path_is_refused_where_it_would_not_be_exact():
    parameters = list(make_model(torch.float32).parameters())
    gradients = [torch.zeros_like(p) for p in parameters]

    class Own(torch.optim.AdamW):
        pass

    def fused(optimizer):
        return can_fuse([optimizer], gradients)

    adamw = torch.optim.AdamW(parameters, fused=True)
    assert fused(adamw) and not can_fuse([adamw], []) and not can_fuse([adamw], [g.double() for g in gradients])
    assert not fused(torch.optim.AdamW(parameters)) and not fused(Own(parameters, fused=True))
    assert not fused(torch.optim.SGD(parameters, momentum=0.9, dampening=0.1, fused=True))
    assert fused(torch.optim.SGD(parameters, momentum=0.9, fused=True))
    torch.optim.lr_scheduler.StepLR(adamw, 1)
    assert fused(adamw)
    handle = adamw.register_step_pre_hook(lambda *_: None)
    assert not fused(adamw)
    handle.remove()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    assert not fused(adamw)
    handle.remove()
    assert fused(adamw)
    adamw.load_state_dict(torch.optim.AdamW(parameters).state_dict())
    assert not fused(adamw)
    adamw = torch.optim.AdamW(parameters, fused=True)
    adamw.step = lambda: None
    assert not fused(adamw)


@pytest.mark.parametrize("kind", FUSED)
def test_a_first_step_that_overflows_leaves_everything_usable(kind):
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer, theirs = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind.removesuffix(" fused")](expected.parameters())
    step = train_step(optimizer, max_norm=math.inf)(lambda batch, scale: loss_of(model, batch) * scale)
    before = [p.clone() for p in model.parameters()]
    assert not step(BATCHES[0], math.inf).updated and same_bits(before, list(model.parameters()))
    for batch in BATCHES:
        step(batch, 1.0)
        loss_of(expected, batch).backward()
        theirs.step()
        theirs.zero_grad()
    assert distance(list(model.parameters()), list(expected.parameters())) <= 1e-5


def test_a_parameter_may_join_fused_sgd_with_momentum_later():
    model = make_model(torch.float32)
    model[0].requires_grad_(False)
    step = train_step(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), max_norm=1.0)(
        lambda b: loss_of(model, b)
    )
    step(BATCHES[0])
    model[0].requires_grad_(True)
    before = model[0].weight.clone()
    assert step(BATCHES[1]).updated and not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("name", ["_foreach_norm", "_foreach_mul_", "_amp_update_scale_"])
@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
def test_without_a_private_function_of_torch_the_result_is_the_same(name, kind, monkeypatch):
    states = []
    for present in (True, False):
        if not present:
            monkeypatch.setattr(update, name, None)
        model = make_model(torch.float32)
        optimizer = OPTIMIZERS[kind](model.parameters())
        step = train_step(optimizer, accumulate(2), amp(dtype=torch.float16, growth_interval=1), max_norm=0.1)(
            lambda batch, model=model: loss_of(model, batch)
        )
        for batch in step.over(BATCHES):
            step(batch)
        states.append((state_of(model, optimizer), step.state_dict()))
    assert distance(states[0][0], states[1][0]) <= 1e-6 and states[0][1] == states[1][1]


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 3), st.booleans())
def test_the_loss_scale_follows_the_rule_of_grad_scaler(overflows, interval, private):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = LossScale(1024.0, interval, CPU)
    with pytest.MonkeyPatch.context() as patch:
        if not private:
            patch.setattr(update, "_amp_update_scale_", None)
        for overflow in overflows:
            scaler.scale(parameter.sum() * (math.inf if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ours.update(torch.tensor(float(overflow)))
            assert ours.value.item() == scaler.get_scale()
            assert ours.growth_tracker.item() == scaler._get_growth_tracker()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_the_norm_is_accumulated_in_float32_whatever_the_gradients_are(norm_type):
    gradients = [torch.full((300, 300), 300.0, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    expected = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in gradients]), norm_type)
    for chosen in (gradients, gradients[:1] * 3, gradients[1:2] * 3):
        norm = Check(1.0, norm_type, CPU).norm(chosen)
        # torch itself adds 90,000 squares in float32 to no better than this.
        assert norm.dtype == torch.float32 and math.isclose(norm.item(), expected.item(), rel_tol=1e-4)


def test_a_gradient_of_nan_or_infinity_is_never_applied():
    for value, norm_type in (
        (math.nan, 1),
        (math.nan, 2),
        (math.nan, math.inf),
        (math.inf, 1),
        (-math.inf, 2),
        (math.inf, math.inf),
    ):
        for kind in ("AdamW", "AdamW fused"):
            model = make_model(torch.float32)
            before = [p.clone() for p in model.parameters()]
            step = train_step(OPTIMIZERS[kind](model.parameters()), max_norm=1.0, norm_type=norm_type)(
                lambda model=model, value=value: loss_of(model, BATCHES[0]) + value * model[0].bias[0]
            )
            assert not step().updated and same_bits(before, list(model.parameters()))


def test_an_update_without_any_gradient_is_an_update_of_nothing():
    model = make_model(torch.float32)
    extra = torch.nn.Parameter(torch.ones(1))
    for kind in ("AdamW", "AdamW fused"):
        step = train_step(OPTIMIZERS[kind](model.parameters()), amp(dtype=torch.float16), max_norm=1.0)(lambda: extra.sum())
        assert step().updated and step.updates == 1


@pytest.mark.parametrize("kind", ["SGD", "SGD momentum fused"])
def test_clipping_is_that_of_torch_for_tiny_gradients_too(kind):
    model, expected = make_model(torch.float32), make_model(torch.float32)
    optimizer, theirs = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](expected.parameters())
    for group in (*optimizer.param_groups, *theirs.param_groups):
        group.update(lr=1e6, weight_decay=0.0)
    train_step(optimizer, max_norm=1e-6)(lambda: loss_of(model, BATCHES[0]) * 1e-5)()
    (loss_of(expected, BATCHES[0]) * 1e-5).backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1e-6)
    theirs.step()
    assert distance(list(model.parameters()), list(expected.parameters())) <= 1e-5


def test_parameters_of_half_precision_take_the_fused_path_too():
    model, expected = make_model(torch.bfloat16), make_model(torch.bfloat16)
    batches = make_batches([4, 4, 4, 4], torch.bfloat16)
    step = train_step(torch.optim.AdamW(model.parameters(), fused=True), accumulate(2), max_norm=0.1)(lambda b: loss_of(model, b))
    theirs = torch.optim.AdamW(expected.parameters(), fused=True)
    for start in (0, 2):
        for batch in batches[start : start + 2]:
            step(batch)
            (loss_of(expected, batch) / 2).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        theirs.step()
        theirs.zero_grad()
    assert step.updates == 2 and distance(list(model.parameters()), list(expected.parameters())) <= 1e-2


def test_an_empty_parameter_has_no_part_in_the_norm():
    model = make_model(torch.float32)
    empty = torch.nn.Parameter(torch.zeros(0))
    optimizer = torch.optim.AdamW([*model.parameters(), empty], fused=True)
    step = train_step(optimizer, max_norm=1.0, norm_type=math.inf)(lambda: loss_of(model, BATCHES[0]) + empty.sum())
    assert step().updated
