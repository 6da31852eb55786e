"""What only a GPU can show; elsewhere these are skipped."""

import copy
import io
import math

import pytest
import torch
from oracles import distance, loss_of, make_batches, make_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainkit import History, accumulate, amp, microbatch, recompute, resumable, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has none"
)
DEVICE, BACKEND = "cuda", "nccl"
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


def make_deep():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)]
    return nn.Sequential(*blocks, nn.Linear(64, 1)).to(DEVICE)


def test_a_chunk_that_runs_out_of_memory_is_cut_and_the_gradient_is_that_of_the_batch():
    x = torch.randn(1 << 14, 64, device=DEVICE)
    model = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 1)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []

    @train_step(optimizer, microbatch("auto"))
    def step(x):
        yield model(x).pow(2).mean()
        found.extend(p.grad.clone() for p in model.parameters())

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    fits = torch.cuda.memory_reserved() + (400 << 20)  # an activation of the batch has 256 MiB
    torch.cuda.set_per_process_memory_fraction(fits / total)
    try:
        with pytest.warns(UserWarning, match="memory ran out"):
            step(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    model(x).pow(2).mean().backward()
    assert distance(found, [p.grad for p in model.parameters()]) <= 1e-5


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(tmp_path):
    batches = [torch.randn(8, 64, generator=torch.Generator().manual_seed(i)) for i in range(10)]

    def train(path, stop=None):
        model = make_deep()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        parts = accumulate(2), amp(dtype=torch.float16, growth_interval=2)
        step = train_step(optimizer, *parts, max_norm=0.1)(lambda x: model(x).pow(2).mean())
        with resumable(path, every=1, model=model, optimizer=optimizer, step=step) as run:
            for _ in run.epochs(2):
                for x in step.over(batches):
                    step(x.to(DEVICE))
                    if step.updates == stop:
                        raise InterruptedError
        return [*model.state_dict().values(), torch.tensor(step.loss_scale)]

    torch.manual_seed(1)
    expected = train(tmp_path / "whole")
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        train(tmp_path / "parts", stop=7)
    resumed = train(tmp_path / "parts")
    assert all(map(torch.equal, resumed, expected))


def test_recompute_takes_less_memory_and_has_the_same_bits():
    x = torch.randn(1 << 14, 64, device=DEVICE)

    def train(*parts):
        model = make_deep()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        parts = [part(model) for part in parts]
        step = train_step(optimizer, *parts)(lambda x: model(x).pow(2).mean())
        torch.manual_seed(1)
        step(x)
        torch.cuda.reset_peak_memory_stats()
        step(x)
        return torch.cuda.max_memory_allocated(), list(model.parameters())

    much, expected = train()
    little, found = train(lambda model: recompute(model, "[:6]"))
    assert little < 0.8 * much
    assert all(map(torch.equal, found, expected))


@needs_grad_dtype
def test_sums_in_float32_do_not_stand_still(error_where_the_host_waits):
    weight = nn.Parameter(torch.ones(8, device=DEVICE, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    step = train_step(optimizer, accumulate(1024, dtype=torch.float32))(
        lambda x: (weight * x).sum()
    )
    ones = torch.ones(8, device=DEVICE, dtype=torch.bfloat16)
    step.last(ones)
    error_where_the_host_waits()
    for _ in range(1024):
        step(ones)
    torch.cuda.set_sync_debug_mode("default")
    assert weight.tolist() == [-1.0] * 8


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_a_wrapped_model_takes_the_same_updates_and_waits_for_nothing(
    wrap, error_where_the_host_waits
):
    def train(wrap):
        model = make_model(torch.float32).to(DEVICE)
        wrapped = wrap(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, fused=True)
        parts, weight = (accumulate(2), amp(dtype=torch.float16)), torch.tensor(3, device=DEVICE)

        @train_step(optimizer, *parts, max_norm=0.1, module=wrapped)
        def step(batch):
            return loss_of(wrapped, batch), weight

        for batch in BATCHES[:4]:
            step(batch)
        error_where_the_host_waits()
        for batch in BATCHES[4:]:
            step(batch)
        torch.cuda.set_sync_debug_mode("default")
        assert step.updates == 4
        return [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]

    expected, store = train(lambda model: model), torch.distributed.HashStore()
    torch.distributed.init_process_group(BACKEND, store=store, rank=0, world_size=1)
    try:
        assert distance(train(wrap), expected) <= 1e-5
    finally:
        torch.distributed.destroy_process_group()
