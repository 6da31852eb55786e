"""microbatch: a batch in chunks is the batch, however it is cut."""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import OPTIMIZERS, distance, loss_of, make_batches, make_model, plain_loop
from torch.nn import functional as F

from trainkit import accumulate, amp, frozen, microbatch, train_step


def trained(batches, *parts, kind="AdamW", weighted=False, dtype=torch.float64, **options):
    """The parameters after training on these batches, and the results."""
    model = make_model(dtype)

    @train_step(OPTIMIZERS[kind](model.parameters()), *parts, **options)
    def step(x, y):
        loss = F.mse_loss(model(x), y)
        return (loss, x.new_tensor(len(x), dtype=torch.int64)) if weighted else loss

    return list(model.parameters()), [step(*batch) for batch in step.over(batches)]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    chunk=st.integers(1, 10) | st.just("auto"),
    n=st.integers(1, 3),
    weighted=st.booleans(),
    kind=st.sampled_from(["AdamW", "SGD momentum"]),
    max_norm=st.none() | st.just(0.1),
)
def test_law_chunks_of_a_batch_are_the_batch(sizes, chunk, n, weighted, kind, max_norm):
    same = {"kind": kind, "weighted": weighted, "max_norm": max_norm}
    found, results = trained(make_batches(sizes), accumulate(n), microbatch(chunk), **same)
    expected, whole = trained(make_batches(sizes), accumulate(n), **same)
    assert distance(found, expected) <= 1e-12
    for result, other in zip(results, whole, strict=True):
        assert (result.complete, result.updated) == (other.complete, other.updated)
        for name in ("loss", "window_loss", "grad_norm"):
            one, two = getattr(result, name), getattr(other, name)
            assert (one is None and two is None) or torch.allclose(one, two, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["AdamW fused", "SGD"])
@pytest.mark.parametrize("size", [3, "auto"])
def test_chunks_with_amp_and_a_fused_optimizer(kind, dtype, size):
    batches, parts = make_batches([8, 8, 5, 8], torch.float32), (accumulate(2), amp(dtype=dtype))
    same = {"kind": kind, "dtype": torch.float32, "max_norm": 0.1}
    found, results = trained(batches, *parts, microbatch(size), **same)
    assert results[-1].updated
    expected, _ = trained(batches, *parts, **same)
    assert distance(found, expected) <= (1e-6 if dtype == torch.float32 else 1e-3)


def masked_mean(model, x, y, mask):
    squares = (model(x) - y).pow(2).mean(1)
    return (squares * mask).sum() / mask.sum().clamp(min=1), mask.sum()


@pytest.mark.parametrize("size", [2, "auto"])
def test_tokens_count_the_same_in_whatever_chunk_they_are(size):
    batches, results = make_batches([6, 5, 4]), []
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(len(x), generator=generator) < 0.6 for x, _ in batches]
    for part in (microbatch(size), accumulate(1)):
        model = make_model()
        step = train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), part)
        step = step(functools.partial(masked_mean, model))
        pairs = step.over(list(zip(batches, masks, strict=True)))
        losses = [step(*batch, mask=mask).loss for batch, mask in pairs]
        results.append([*model.parameters(), *losses])
    assert distance(*results) <= 1e-12


@pytest.mark.parametrize("size", [3, "auto"])
def test_a_generator_runs_for_every_chunk_and_its_update_code_once(size):
    model, theirs, ran = make_model(), make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @microbatch(size)
    @accumulate(2, model)
    def step(batch):
        ran.append(len(batch[0]))
        yield loss_of(model, batch)
        ran.append("update")
        optimizer.step()
        optimizer.zero_grad()

    batches = make_batches([7, 4])
    for batch in batches:
        step(batch)
    assert ran == ([7, 4, "update"] if size == "auto" else [3, 3, 1, 3, 1, "update"])
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches, 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


def test_frozen_layers_and_a_backward_between_batches_leave_the_window_alone():
    results = []
    for part in (microbatch(3), microbatch("auto"), accumulate(1)):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = train_step(optimizer, accumulate(2), part, frozen(model, "[0]"))
        step = step(functools.partial(loss_of, model))
        for batch in make_batches([8, 5]):
            step(batch)
            loss_of(model, batch).backward()  # does not reach the window
        optimizer.zero_grad()
        assert step.updates == 1
        results.append(list(model.parameters()))
    assert max(distance(found, results[-1]) for found in results) <= 1e-12


@pytest.mark.parametrize("size", [2, "auto"])
def test_an_empty_batch_and_a_block_by_hand_are_whole_micro_batches(size):
    weight = torch.nn.Parameter(torch.zeros(1))
    step = train_step(torch.optim.SGD([weight], lr=1.0), accumulate(3), microbatch(size))
    step = step(lambda x: weight.sum() * (x.sum() + 3))
    step(torch.ones(0)), step(torch.ones(4))
    with step as result:
        step.backward(weight.sum() * 6)
    assert result.updated and weight.item() == pytest.approx(-(3 + 6 + (5 if size == 2 else 7)) / 3)


@pytest.mark.parametrize("size", [3, "auto"])
@pytest.mark.parametrize("per_step", [True, False])
def test_law_rows_along_the_second_dimension_with_a_list_beside_them(size, per_step):
    torch.manual_seed(3)
    base = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 5), "out": torch.nn.Linear(5, 4)}).double()
    x, y = torch.randn(7, 8, 3).double(), torch.randint(4, (7, 8) if per_step else (8,))
    scales, names, heard = [0.5, 1.0, 2.0, 0.1, 0.7, 3.0, 1.5, 0.2], tuple("abcdefgh"), []

    def loss_fn(model, x, y, scales, names):
        heard.extend(names)
        outputs = model["out"](model["rnn"](x)[0]).transpose(1, 2)
        losses = F.cross_entropy(outputs, y.expand(7, -1), reduction="none").mean(0)
        return (losses * losses.new_tensor(scales)).mean()

    results = []
    for part in (microbatch(size, dim=1), accumulate(1)):
        model = copy.deepcopy(base)
        step = train_step(torch.optim.SGD(model.parameters(), lr=1.0), accumulate(2), part)
        step = step(functools.partial(loss_fn, model))
        for _ in range(4):
            step(x, y, scales=scales, names=names)
            if size == "auto" and not results:
                step.chunk_sizes[21] = 3  # 7 times 3 numbers in a row
        results.append(list(model.parameters()))
    assert distance(*results) <= 1e-12 and heard == list(names) * 8


@pytest.mark.parametrize(("size", "rows"), [(3, [3, 3, 2]), ("auto", [2, 2, 2, 2])])
def test_the_output_is_a_list_with_an_entry_for_each_chunk(size, rows):
    model = make_model()
    (x, y), names = make_batches([8])[0], list("abcdefgh")

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch(size))
    def step(x, y, names):
        outputs = model(x)
        return {"loss": F.mse_loss(outputs, y), "outputs": outputs, "names": names}

    step.chunk_sizes[7] = 2
    expected = model(x).detach()
    found = step(x, y, names).output
    assert [len(entry["outputs"]) for entry in found] == rows
    assert distance(torch.cat([entry["outputs"] for entry in found]), expected) <= 1e-12
    assert not any(entry["outputs"].requires_grad for entry in found)
    assert [name for entry in found for name in entry["names"]] == names


def test_other_arguments_are_refused_before_anything_is_changed():
    for size in (True, 2.0, None, torch.tensor(3), "automatic"):
        with pytest.raises(TypeError, match=r"got .*: `microbatch\(8\)`"):
            microbatch(size)
    with pytest.raises(ValueError, match="got 0"):
        microbatch(0)
    for dim in (True, 1.0, None, "time"):
        with pytest.raises(TypeError, match=r"got .*: `microbatch\(8, dim=1\)`"):
            microbatch(8, dim=dim)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"two parts give microbatch\(\)"):
        train_step(optimizer, microbatch(2), microbatch("auto"))
    step = train_step(optimizer, microbatch(2))(lambda x, y: F.mse_loss(model(x), y))
    with pytest.raises(ValueError, match=r"differ in \[\(3, 4\), \(2, 3\)\].*partial"):
        step(torch.ones(3, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`train_step"), train_step(optimizer, microbatch(2)):
        pass
    assert step.updates == 0


@pytest.mark.parametrize("size", [2, "auto"])
@pytest.mark.parametrize("place", ["first chunk", "later chunk", "discard", "weight"])
def test_an_error_in_a_later_chunk_drops_the_window_and_in_the_first_only_the_batch(size, place):
    model, theirs, calls = make_model(), make_model(), []

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), accumulate(2), microbatch(size))
    def step(batch, fails=False):
        calls.append(fails)
        if fails and calls.count(True) == 1 + (place == "later chunk"):
            if place == "discard":  # stays discarded although the chunk fails
                step.backward(loss_of(model, batch))
                step.discard()
            if place == "weight":
                return loss_of(model, batch), 2  # after losses without one
            raise TypeError("of the user")
        return loss_of(model, batch)

    first, second, third, fourth = make_batches([4, 4, 4, 4])
    step.chunk_sizes[7] = 2
    step(first)
    with pytest.raises(TypeError, match=r"of the user|`return loss, weight`"):
        step(second, fails=True)
    is_kept = place in ("first chunk", "weight")
    assert step(third).complete is is_kept
    assert is_kept or step(fourth).complete
    used = [first, third] if is_kept else [third, fourth]
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), used, 2)
    assert distance(list(model.parameters()), list(theirs.parameters())) <= 1e-12


@pytest.mark.parametrize("size", [2, "auto"])
def test_a_window_is_saved_between_two_batches_and_not_inside_one(size, tmp_path):
    results = []
    for interrupted in (False, True):
        model = make_model()

        def new(model=model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            step = train_step(optimizer, accumulate(3), microbatch(size))
            return step(functools.partial(loss_of, model))

        step = new()
        step.chunk_sizes[7] = 2
        for i, batch in enumerate(make_batches([5, 6, 7, 4, 3, 2])):
            step(batch)
            if interrupted and i == 0:
                torch.save(step.state_dict(), tmp_path / "state")
                step = new()
                step.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
                assert step.chunk_sizes == {7: 2}
        assert step.updates == 2
        results.append(list(model.parameters()))
    assert distance(*results) == 0

    @train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch(3))
    def saving(batch):
        if len(batch[0]) == 1:  # the second chunk
            with pytest.raises(RuntimeError, match=r"inside a batch.*`step\(batch\)`"):
                saving.state_dict()
        return loss_of(model, batch)

    assert saving(make_batches([4])[0]).updated
