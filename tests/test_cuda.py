"""What only a GPU can show; elsewhere these are skipped."""

import copy
import io
import math

import pytest
import torch
from oracles import distance, loss_of, make_batches, make_model

from trainkit import History, accumulate, amp, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
BATCHES = (
    [tuple(part.cuda() for part in batch) for batch in make_batches([4] * 8, torch.float32)]
    if torch.cuda.is_available()
    else []
)


def made(**options):
    model = make_model(torch.float32).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True, **options)


@pytest.fixture
def error_where_the_host_waits():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [None, 3, "on the device"])
def test_a_fused_step_waits_for_nothing(dtype, weight, error_where_the_host_waits):
    model, optimizer = made()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    weight = torch.tensor(3, device="cuda") if weight == "on the device" else weight

    @train_step(optimizer, accumulate(2), amp(dtype=dtype), max_norm=0.1, after=schedule.step)
    def step(batch):
        return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

    for batch in BATCHES[:4]:
        step(batch)
    error_where_the_host_waits()
    for batch in BATCHES[4:]:
        step(batch)
    torch.cuda.set_sync_debug_mode("default")
    assert step.updates == 4 and schedule.last_epoch == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_takes_the_updates_and_skips_of_a_loop_by_hand(dtype):
    (model, optimizer), (expected, theirs) = made(), made()
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    factors = [1.0, 1.0, math.inf, 1.0] if dtype == torch.float16 else [1.0] * 4

    @train_step(optimizer, amp(dtype=dtype), max_norm=0.1)
    def step(batch, factor):
        return loss_of(model, batch) * factor

    for batch, factor in zip(BATCHES, factors, strict=False):
        step(batch, factor)
        with torch.autocast("cuda", dtype):
            loss = loss_of(expected, batch) * factor
        scaler.scale(loss).backward()
        scaler.unscale_(theirs)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        scaler.step(theirs)
        scaler.update()
        theirs.zero_grad()
    assert step.skipped == factors.count(math.inf)
    assert distance(list(model.parameters()), list(expected.parameters())) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_window_can_be_captured_in_a_cuda_graph(dtype):
    model, optimizer = made(capturable=True)
    step = train_step(optimizer, accumulate(2), amp(dtype=dtype), max_norm=0.1)(
        lambda batch: loss_of(model, batch)
    )
    window = copy.deepcopy(BATCHES[:2])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for batch in window:
                step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    expected = copy.deepcopy(model)
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.01, fused=True, capturable=True)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    eager = train_step(theirs, accumulate(2), amp(dtype=dtype), max_norm=0.1)(
        lambda batch: loss_of(expected, batch)
    )
    eager.load_state_dict(step.state_dict())

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for batch in window:
            step(batch)
    for start in (2, 4, 6):
        for static, batch in zip(window, BATCHES[start:], strict=False):
            for old, new in zip(static, batch, strict=True):
                old.copy_(new)
            eager(batch)
        graph.replay()
    assert distance(list(model.parameters()), list(expected.parameters())) <= 1e-5


@pytest.mark.parametrize("weight", [None, 3, "on the device"])
def test_recording_logging_and_showing_wait_for_nothing(weight, error_where_the_host_waits):
    model, optimizer = made()
    weight = torch.tensor(3, device="cuda") if weight == "on the device" else weight
    rows = []

    @train_step(optimizer, accumulate(2), amp(dtype=torch.float16), max_norm=0.1)
    def step(batch):
        return loss_of(model, batch) if weight is None else (loss_of(model, batch), weight)

    silent, logging = History(step), History(step, log=lambda numbers, update: rows.append(update))
    for seen, batch in enumerate(
        step.over(BATCHES, progress={"file": io.StringIO(), "mininterval": 0})
    ):
        if seen == 4:
            error_where_the_host_waits()
        step(batch)
        if seen == 6:
            torch.cuda.set_sync_debug_mode("default")
    assert rows == silent["update"] == logging["update"] == [1, 2, 3, 4]
    assert silent["loss"] == logging["loss"] and silent["loss_scale"] == [65536.0] * 4
    assert silent["peak_memory"][-1] > 0
