"""doctor MODULE:FUNCTION measures the parts that it names, and leaves the model as it was."""

import gc
import json
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit import amp
from trainkit.tools.doctor import trial
from trainkit.tools.doctor.trial import (
    Task,
    largest_batch,
    make_variants,
    peak_memory,
    run_trial,
    table,
)

CPU, MIB = torch.device("cpu"), 2**20
SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        ran.append(self)
        return x + self.outer(self.inner(x).relu())

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.few = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.ReLU())
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, labels=None):
        x = self.few(x)
        for block in self.blocks:
            x = block(x)
        return x if labels is None else {"loss": (x - labels).pow(2).mean()}

seen, ran = [], []

def tensor():
    seen.clear(), ran.clear()
    def loss_fn(model, batch):
        loss = model(batch).pow(2).mean()
        frozen = [not parameter.requires_grad for parameter in model.parameters()]
        seen.append((len(batch), loss.item(), frozen, torch.is_autocast_enabled("cpu")))
        return loss
    return Model(), torch.linspace(-1, 1, 512 * 8).reshape(512, 8), loss_fn

def pair():
    return Model(), (torch.ones(8, 8), torch.zeros(8, 8))

def mapping():
    return Model(), {"x": torch.ones(8, 8), "labels": torch.zeros(8, 8)}

def takes_labels_out():
    def loss_fn(model, batch):
        labels = batch[0].pop("labels")
        return (model(**batch[0]) - labels).pow(2).mean()
    return Model(), [{"x": torch.ones(8, 8), "labels": torch.zeros(8, 8)}], loss_fn

def only_a_model():
    return Model()

def of_different_lengths():
    return Model(), (torch.ones(8, 8), torch.zeros(1, 8))

def fails_in_its_loss():
    def loss_fn(model, batch):
        raise KeyError("the user's own")
    return Model(), torch.ones(8, 8), loss_fn

def too_large():
    def loss_fn(model, batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return model(batch).mean()
    return Model(), torch.ones(8, 8), loss_fn

made = None

def given():
    return made
"""
ALL = ["plain", "amp()", "frozen blocks[:2]", "microbatch", "recompute blocks[:]", "all of these"]


@pytest.fixture(autouse=True)
def quick_collect(monkeypatch):
    """``gc.collect`` takes long among everything that tests have made."""
    monkeypatch.setattr(gc, "collect", int)


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_own.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import users_own

        yield users_own


def tried(function, steps=1, layers=None):
    found = run_trial(f"users_own:{function}", steps, "cpu", layers)
    table(found)
    return json.loads(json.dumps(found, default=vars))


def column(found, key):
    return [variant[key] for variant in found["variants"]]


def mean_loss(model, batch):
    return model(batch).pow(2).mean()


def test_each_part_is_measured_by_what_it_does(user):
    found = tried("tensor")
    known = {"target": "users_own:tensor", "device": "cpu", "rows": 512, "steps": 1}
    assert known.items() <= found.items() and column(found, "failure") == [""] * 6
    assert [name.replace("(128)", "") for name in column(found, "name")] == ALL
    assert all(seconds > 0 for seconds in column(found, "seconds"))
    assert column(found, "largest_batch") == [None] * 6  # the memory of a CPU is not run out of
    plain, *parts, all_of_these = column(found, "peak_bytes")
    assert all_of_these < min(parts) and max(parts) < plain


@pytest.fixture
def alike(monkeypatch):
    """No gradients are compared: what runs is what is measured."""
    monkeypatch.setattr(trial, "compare", lambda *_, **__: "")


@pytest.mark.usefixtures("alike")
def test_variants_start_from_the_same_parameters_and_take_the_same_steps(user):
    tried("tensor", steps=2)
    calls, losses = iter(user.seen), {}
    for name in ALL:
        chunks = 4 if name in ("microbatch", "all of these") else 1
        for _ in range(4 * chunks):  # the first step, two that are timed, the one for the memory
            rows, loss, frozen, autocast = next(calls)
            assert rows == 512 // chunks
            assert autocast is (name in ("amp()", "all of these"))
            lower_half = name in ("frozen blocks[:2]", "all of these")
            assert frozen == [False] * 4 + [lower_half] * 8 + [False] * 8
            losses.setdefault(name, loss)
    assert next(calls, None) is None
    assert losses["plain"] == losses["frozen blocks[:2]"] == losses["recompute blocks[:]"]
    # Blocks run again in backward if they are recomputed: 4 steps of 1 and of 4 chunks.
    assert len(user.ran) == 4 * (len(user.seen) + 4 * (1 + 4))


@pytest.mark.parametrize("function", ["pair", "mapping", "takes_labels_out"])
def test_a_model_may_have_its_own_loss_and_a_function_may_take_things_out_of_its_batch(
    user, function
):
    found = tried(function)
    assert found["rows"] == 8 and column(found, "failure") == [""] * 6


def test_layers_can_be_named(user):
    found = tried("pair", layers=["blocks[0]", "blocks[1]"])
    names = column(found, "name")
    assert names[2::2] == ["frozen blocks[0] blocks[1]", "recompute blocks[0] blocks[1]"]
    failures = column(tried("pair", layers=["block"]), "failure")
    assert failures[1] == failures[3] == "" and "'blocks'" in failures[2]


def names_of(model):
    return list(make_variants(Task(model, None, mean_loss, CPU, 8), None))


def test_blocks_are_found_in_a_compiled_model_and_may_be_missing(user):
    compiled = torch.compile(user.Model(), backend="eager")
    assert names_of(compiled)[2::2] == ["frozen blocks[:2]", "recompute blocks[:]"]
    assert names_of(nn.Linear(8, 8)) == ["plain", "amp()", "microbatch(2)", "all of these"]


def test_a_part_that_fails_says_why_and_the_others_are_measured(user):
    failures = column(tried("of_different_lengths"), "failure")
    assert failures[3].startswith("ValueError: ") and failures[3] == failures[5]
    assert [bool(failure) for failure in failures] == [False, False, False, True, False, True]


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(8, dtype=torch.cfloat))

    def forward(self, x):
        return (x * self.filter).abs()


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (nn.Embedding(4, 8, sparse=True), torch.arange(4).repeat(8)),
        (Complex(), torch.ones(32, 8)),
    ],
    ids=["sparse", "complex"],
)
def test_gradients_that_adamw_refuses_are_measured_with_sgd(user, monkeypatch, model, batch):
    monkeypatch.setattr(user, "made", (model, batch, mean_loss))
    found = tried("given")
    assert column(found, "seconds")[0] > 0 and found["variants"][0]["failure"] == ""


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("users_own:only_a_model", TypeError, "returned Model: `return model, batch, loss_fn`"),
        ("users_own:of_size", AttributeError, "users_own.*of_size"),
        ("no_such_module:make", ModuleNotFoundError, "no_such_module"),
        ("users_own:fails_in_its_loss", KeyError, "the user's own"),
    ],
)
def test_errors_of_python_and_of_the_user_pass_through(user, target, error, message):
    with pytest.raises(error, match=message):
        run_trial(target, 1, "cpu", None)


def test_a_batch_that_does_not_fit_is_a_result(user):
    found = tried("too_large")
    is_out = ["out of memory" in failure for failure in column(found, "failure")]
    assert is_out == [True, True, True, False, True, False]


@pytest.mark.parametrize(
    ("rows", "limit"), [(1, 7), (1, 100), (30, 0), (30, 7), (48, 100), (30, 10**9)]
)
def test_the_largest_batch_is_right_to_a_sixteenth(rows, limit):
    tries = []

    def loss_fn(model, batch):
        tries.append(len(batch))
        return model(batch).mean() if len(batch) <= limit else 1 / 0

    task = Task(nn.Linear(1, 1), torch.ones(rows, 1), loss_fn, CPU, rows)
    variants, unit = make_variants(task, None), max(1, rows // 16)
    found = largest_batch(variants["plain"], task, rows)
    assert found <= limit < found + unit or found > 64 * rows - unit
    assert min(tries) >= 1 and max(tries) <= 64 * rows and len(tries) <= 2 * 11
    if limit == 7:  # in four chunks four times as many fit
        assert largest_batch(variants["all of these"], task, rows) == 28


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_the_model_stays_as_it_was(user, monkeypatch, error):
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), []
    model[1].eval()
    model[2].bias.requires_grad_(False)
    mean_loss(model, torch.ones(2, 4)).backward()
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    values = [value.clone() for value in model.state_dict().values()]

    def loss_fn(model, batch):
        calls.append(1)
        return mean_loss(model, batch) if error is None or len(calls) < 2 else 1 / 0

    monkeypatch.setattr(user, "made", (model, torch.randn(8, 4), loss_fn))
    if error is None:
        failures = column(tried("given"), "failure")
        assert [bool(failure) for failure in failures] == [name == 3 for name in range(6)]
    else:
        with pytest.raises(error):
            tried("given")
    assert all(map(torch.equal, values, model.state_dict().values()))
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not model[2].bias.requires_grad


@pytest.mark.usefixtures("alike")
def test_steps_are_in_training_mode_and_draw_the_same_random_numbers(user, monkeypatch):
    seen = []

    def loss_fn(model, batch):
        output = model(batch)
        seen.append((model.training, output.sum().item()))
        return output.pow(2).mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    monkeypatch.setattr(user, "made", (model, torch.ones(8, 4), loss_fn))
    tried("given", steps=2)
    assert not model.training and all(is_training for is_training, _ in seen)
    assert seen[4][1] == pytest.approx(seen[0][1], rel=0.01)  # the first step of plain and of amp


def task_of(model, *batch, function=None):
    """What the function of a user returns for a classifier."""
    loss_fn = function or (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    return model, batch, loss_fn


class Recurrent(nn.Module):
    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 5, 2, dropout=dropout), nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()

    def forward(self, x):
        return self.out(self.norm(self.rnn(x)[0][-1]))


def layers(*inner):
    return nn.Sequential(nn.Linear(3, 6), *inner, nn.Linear(6, 4))


def diffusion(model, batch):
    noise = torch.rand_like(batch[0])
    return (model(batch[0] + noise) - torch.rand(len(noise), 1)).square().mean()


def token_mean(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)


def weighted(model, batch):
    return token_mean(model, batch), (batch[1] != 0).sum()


def noted(user, monkeypatch, made):
    monkeypatch.setattr(user, "made", made)
    rows = tried("given")["variants"]
    return {row["name"]: row["failure"] or row["note"] for row in rows}, rows


ROWS, TIMES, LABELS = torch.randn(8, 3), torch.randn(7, 8, 3), torch.arange(8) % 4


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: task_of(layers(nn.ReLU()), ROWS, LABELS), ""),
        (lambda: task_of(layers(nn.BatchNorm1d(6)), ROWS, LABELS), "BatchNorm"),
        (lambda: task_of(layers(), ROWS, LABELS, function=token_mean), "`return loss, count`"),
        (lambda: task_of(layers(), ROWS, LABELS, function=weighted), ""),
        (lambda: task_of(layers(), ROWS, function=diffusion), "random numbers"),
        (lambda: task_of(layers(), ROWS, list(LABELS.tolist()), function=of_list), ""),
        (lambda: task_of(Recurrent(norm=True).eval(), TIMES, LABELS), "BatchNorm"),
    ],
)
def test_microbatch_is_measured_if_its_gradient_is_the_plain_one(user, monkeypatch, made, said):
    notes, rows = noted(user, monkeypatch, made())
    name, note = next(item for item in notes.items() if item[0].startswith("microbatch"))
    if said:
        assert note.startswith("NotExact: the gradient differs by ") and said in note
        assert rows[3]["seconds"] is None or name != rows[3]["name"]
    else:
        assert note == ""
    assert notes["plain"] == notes["all of these"] == ""


def of_list(model, batch):
    return F.cross_entropy(model(batch[0]), torch.tensor(batch[1]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_of_time_and_rows_is_cut_along_its_rows(user, monkeypatch, dropout):
    for labels in (LABELS, torch.stack([LABELS] * 7)):  # one for each row, or for each step

        def loss_fn(model, batch):
            outputs = model.out(model.rnn(batch[0])[0])
            outputs = outputs[-1] if batch[1].dim() == 1 else outputs.flatten(0, 1)
            return F.cross_entropy(outputs, batch[1].flatten())

        made = task_of(Recurrent(dropout), TIMES, labels, function=loss_fn)
        notes, rows = noted(user, monkeypatch, made)
        assert [row["name"] for row in rows][2] == "microbatch(2, dim=1)"
        assert rows[2]["failure"] == "" and rows[2]["seconds"] > 0
        assert ("dropout" in notes["microbatch(2, dim=1)"]) is (dropout > 0)


def test_dropout_is_told_apart_from_other_differences(user, monkeypatch):
    drops = layers(nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.5))
    notes, rows = noted(user, monkeypatch, task_of(drops, ROWS, LABELS))
    assert "dropout" in notes["microbatch(2)"] and rows[3]["seconds"] > 0
    made = task_of(drops, ROWS, LABELS, function=token_mean)
    notes, rows = noted(user, monkeypatch, made)
    assert "`return loss, count`" in notes["microbatch(2)"] and rows[3]["seconds"] is None
    assert notes["recompute [:]"] == ""  # with the same random numbers


def test_a_batch_that_does_not_fit_is_compared_in_part(user, monkeypatch):
    def loss_fn(model, batch):
        if len(batch[0]) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return F.cross_entropy(model(batch[0]), batch[1])

    for inner, said in ((nn.ReLU(), ""), (nn.BatchNorm1d(6), "NotExact")):
        batch = torch.randn(32, 3), torch.arange(32) % 4
        monkeypatch.setattr(user, "made", task_of(layers(inner), *batch, function=loss_fn))
        row = tried("given")["variants"][3]
        assert row["failure"].startswith(said) and (row["seconds"] is None) is bool(said)


def test_the_table_has_ratios(user):
    lines = table(run_trial("users_own:pair", 1, "cpu", None)).splitlines()
    assert lines[0] == "users_own:pair on cpu, a batch of 8 rows; the median of 1 steps"
    assert lines[3].startswith("plain ") and lines[3].count(" 1.00x") == 2
    assert max(map(len, lines)) <= 100


SDPA = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3f_64x128x128"
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_cublas"


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        ({GEMM: 0.009}, []),
        ({GEMM: 0.004, "flash_fwd_kernel": 0.005, "cudnn_batch_norm": 0.002}, []),  # two streams
        ({GEMM: 0.002}, ["idle for 80% of a step", "`torch.compile`"]),
        ({GEMM: 0.007, SDPA: 0.002}, ["cuDNN", "`torch.backends.cuda.enable_cudnn_sdp(False)`"]),
        ({SDPA: 0.001}, ["idle for 90% of a step", "cuDNN"]),
        ({}, ["idle for 100%"]),
    ],
)
def test_a_gpu_that_waits_for_launches_or_plans_is_told_from_its_kernels(kernels, said):
    note = trial.advise(kernels, 0.01)
    assert all(text in note for text in said) and bool(note) is bool(said)
    assert ("cuDNN" in note) is (SDPA in kernels)


def test_kernels_of_the_plain_step_are_looked_at_on_a_gpu_alone(user, monkeypatch):
    monkeypatch.setattr(trial, "kernel_times", lambda step: {GEMM: 0.0, SDPA: 0.0})
    assert tried("pair")["variants"][0]["note"] == ""
    gpu = Task(user.Model(), torch.ones(8, 8), mean_loss, types.SimpleNamespace(type="cuda"), 8)
    module_of = torch.get_device_module  # for torch itself, which asks for other devices

    def ask(device=None):
        return torch.cpu if device is gpu.device else module_of(device)

    monkeypatch.setattr(torch, "get_device_module", ask)
    monkeypatch.setattr(trial, "copied", lambda task, seed: task)
    monkeypatch.setattr(trial, "peak_memory", lambda step, device: 0)
    rows = [trial.measure("", parts, gpu, 1) for parts in ([], [lambda task: amp(device="cpu")])]
    assert "idle for 100% of a step" in rows[0].note and "idle" not in rows[1].note


def block(mebibytes):
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_the_peak_is_the_most_that_is_alive_at_once():
    def one_after_the_other():
        for _ in range(5):
            block(3)

    before = block(7)
    assert peak_memory(one_after_the_other, CPU) == 3 * MIB
    assert peak_memory(lambda: [block(3) for _ in range(5)], CPU) == 15 * MIB
    assert peak_memory(lambda: None, CPU) == 0
    assert peak_memory(lambda: before.add_(1).view(7, -1)[2:].reshape(-1), CPU) == 0
    assert peak_memory(lambda: before + 1, CPU) == 7 * MIB


def test_activations_are_counted_until_backward_frees_them():
    inputs = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB

    def forward_and_backward():
        loss = inputs.exp().exp().exp().sum()  # each is saved for backward
        loss.backward()

    # Three outputs; in backward the last gradient, expanded, and its product live beside them.
    assert 3 * MIB <= peak_memory(forward_and_backward, CPU) <= 5 * MIB
    assert peak_memory(lambda: inputs.detach().exp().exp_().exp_(), CPU) == MIB
