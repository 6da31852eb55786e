"""doctor MODULE:FUNCTION: that the parts measured are those named, on the user's own model, from the same parameters."""

import json
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from trainkit import trial as measured_by
from trainkit.tools.doctor.targets import WrongTarget
from trainkit.tools.doctor.trial import Measurement, _variants, largest_that, run_trial

SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        ran.append(self)
        return x + self.outer(self.inner(x).relu())

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.few = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.ReLU())
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, labels=None):
        x = self.few(x)
        for block in self.blocks:
            x = block(x)
        return x if labels is None else {"loss": (x - labels).pow(2).mean()}

made, seen, ran = [], [], []

def tensor():
    made[:] = [Model()]
    seen.clear(), ran.clear()
    def loss_fn(model, batch):
        loss = model(batch).pow(2).mean()
        flags = [parameter.requires_grad for parameter in model.parameters()]
        seen.append((len(batch), loss.item(), flags, torch.is_autocast_enabled("cpu")))
        return loss
    return made[0], torch.linspace(-1, 1, 1024 * 16).reshape(1024, 16), loss_fn

def pair():
    return Model(), (torch.ones(8, 16), torch.zeros(8, 16))

def mapping():
    return Model(), {"x": torch.ones(8, 16), "labels": torch.zeros(8, 16)}

def without_a_loss():
    return Model(), torch.ones(8, 16)

def of_different_lengths():
    return Model(), (torch.ones(8, 16), torch.zeros(1, 16))

def of_no_blocks():
    return nn.Linear(16, 16), torch.ones(8, 16), lambda model, batch: model(batch).mean()

def takes_labels_out():
    def loss_fn(model, batch):
        labels = batch[0].pop("labels")
        return (model(**batch[0]) - labels).pow(2).mean()
    return Model(), [{"x": torch.ones(8, 16), "labels": torch.zeros(8, 16)}], loss_fn

def fails_in_its_loss():
    def loss_fn(model, batch):
        raise KeyError("the user's own")
    return Model(), torch.ones(8, 16), loss_fn

def too_large():
    def loss_fn(model, batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return model(batch).mean()
    return Model(), torch.ones(8, 16), loss_fn
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_own.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import users_own

        yield users_own


def tried(function, steps=1, layers=None):
    return json.loads(run_trial(f"users_own:{function}", steps, "cpu", layers, True))


def names_of(found):
    return [variant["name"] for variant in found["variants"]]


def test_each_part_is_measured_by_what_it_does(user):
    found = tried("tensor", steps=2)
    assert (found["target"], found["device"], found["rows"], found["steps"]) == (
        "users_own:tensor",
        "cpu",
        1024,
        2,
    )
    assert names_of(found) == [
        "plain",
        "amp()",
        "frozen blocks[:2]",
        "microbatch(256)",
        "recompute blocks[:]",
        "all of these",
    ]
    plain, *parts = found["variants"]
    assert all(variant["seconds"] > 0 and variant["failure"] == "" for variant in found["variants"])
    assert all(part["peak_bytes"] < plain["peak_bytes"] for part in parts)
    assert all(parts[-1]["peak_bytes"] < part["peak_bytes"] for part in parts[:-1])
    assert all(variant["largest_batch"] is None for variant in found["variants"])


def test_they_take_turns_and_begin_from_the_same_parameters(user):
    tried("tensor", steps=2)
    # Two steps of each in every turn, of which there are three: one for the memory, and two for the time.
    position, firsts = 0, {}
    for _ in range(3):
        for name, chunks in zip(
            ["plain", "amp", "frozen", "chunks", "recompute", "all"],
            [1, 1, 1, 4, 1, 4],
            strict=True,
        ):
            calls = user.seen[position : position + 2 * chunks]
            position += len(calls)
            firsts.setdefault(name, []).append(calls[0][1])
            assert {rows for rows, *_ in calls} == {1024 // chunks}
            frozen_ones = [not flag for flag in calls[0][2]]
            assert sum(frozen_ones) == (8 if name in ("frozen", "all") else 0) and not any(
                frozen_ones[:4] + frozen_ones[12:]
            )
            assert all(call[3] == (name in ("amp", "all")) for call in calls)
    assert position == len(user.seen)
    assert all(len(set(losses)) == 1 for losses in firsts.values())
    assert firsts["plain"] == firsts["frozen"] == firsts["recompute"] != firsts["amp"]
    # Blocks run again in backward where they are recomputed, and only there.
    assert user.ran.count(user.made[0].blocks[0]) == len(user.seen) + 3 * 2 * (1 + 4)


@pytest.mark.parametrize("function", ["pair", "mapping", "takes_labels_out"])
def test_a_model_with_a_loss_needs_no_function_for_it_and_a_function_may_take_things_out_of_its_batch(
    user, function
):
    found = tried(function)
    assert found["rows"] == 8 and all(variant["failure"] == "" for variant in found["variants"])


def test_layers_can_be_named(user):
    assert names_of(tried("tensor", layers=["blocks[0]", "blocks[1]"]))[2::2] == [
        "frozen blocks[0] blocks[1]",
        "recompute blocks[0] blocks[1]",
    ]
    with pytest.raises(
        WrongTarget, match=r"--layers: the pattern 'block' matches nothing in the Model; .*'blocks'"
    ):
        tried("tensor", layers=["block"])


def test_a_model_without_blocks_has_nothing_frozen_or_recomputed(user):
    assert names_of(tried("of_no_blocks")) == ["plain", "amp()", "microbatch(2)", "all of these"]


def test_a_lower_half_without_which_nothing_is_trained_is_not_frozen(user, monkeypatch):
    block = nn.Linear(16, 16)
    for blocks in ([block, nn.Sigmoid()], [block] * 4):
        made = nn.Sequential(*blocks), torch.ones(8, 16), lambda model, batch: model(batch).mean()
        monkeypatch.setattr(user, "of_one_half", lambda made=made: made, raising=False)
        assert names_of(found := tried("of_one_half")) == [
            "plain",
            "amp()",
            "microbatch(2)",
            "recompute [:]",
            "all of these",
        ]
        assert all(variant["failure"] == "" for variant in found["variants"])
    failures = [variant["failure"] for variant in tried("of_one_half", layers=["**"])["variants"]]
    assert (
        failures[2]
        == failures[5]
        == "ValueError: nothing is left to train: name less, `--layers PATTERN`"
    )


def test_the_blocks_of_a_compiled_model_are_found(user):
    model = torch.compile(user.Model(), backend="eager")
    assert [variant.name for variant in _variants(model, None, 8)][2::2] == [
        "frozen blocks[:2]",
        "recompute blocks[:]",
    ]


def test_a_part_that_cannot_be_says_why_and_the_others_go_on(user):
    found = tried("of_different_lengths")
    failures = [variant["failure"] for variant in found["variants"]]
    assert (
        failures[3].startswith("ValueError: microbatch cuts tensors") and failures[3] == failures[5]
    )
    assert failures[0] == failures[1] == failures[2] == failures[4] == ""
    table = run_trial("users_own:of_different_lengths", 1, "cpu", None, False)
    assert (
        "microbatch(1), all of these: ValueError: microbatch cuts tensors" in table
        and max(map(len, table.splitlines())) <= 100
    )


def test_what_the_user_has_to_change_is_said(user):
    with pytest.raises(
        WrongTarget, match=r"returns a Tensor without a loss: .*`return model, batch, loss_fn`"
    ):
        tried("without_a_loss")
    with pytest.raises(WrongTarget, match="got 0: `--steps 5`"):
        tried("tensor", steps=0)
    with pytest.raises(KeyError, match="the user's own"):
        tried("fails_in_its_loss")


def test_a_batch_that_does_not_fit_is_a_result(user):
    found = tried("too_large")
    assert [variant["failure"] for variant in found["variants"]] == ["out of memory"] * 3 + [
        "",
        "out of memory",
        "",
    ]
    assert found["advice"] == [
        "This batch does not fit as it is; it does with microbatch(2), all of these."
    ]


def test_the_largest_batch_is_found_by_running_out_of_memory(user):
    model, batch, loss_fn = user.too_large()
    trial = measured_by._Trial(model, batch, loss_fn, torch.device("cpu"))
    plain, *_, all_of_these = measured_by._variants(model, None, 8)
    assert trial.largest(plain, 8) == 3
    assert trial.largest(all_of_these, 8) == 12  # in four
    trial.loss_fn = lambda model, batch: (
        model(batch).mean() if len(batch) < 20 else 1 / 0
    )  # kernels have limits, too
    assert trial.largest(plain, 8) == 19


@pytest.mark.parametrize("rows", [1, 8, 30, 100])
@pytest.mark.parametrize("limit", [0, 1, 7, 8, 9, 100, 1000, 10**9])
def test_the_search_is_right_to_a_sixteenth(rows, limit):
    tries = []

    def fits(count):
        tries.append(count)
        return count <= limit

    found = largest_that(fits, rows)
    assert found <= limit < found + max(1, found // 16) + 1 or (
        found <= limit and 32 * rows < found <= 64 * rows
    )
    assert max(tries) <= 64 * rows and min(tries) >= 1 and len(tries) <= 16


def test_the_table_has_ratios_and_what_follows_from_them(user):
    rows = run_trial("users_own:tensor", 1, "cpu", None, False).splitlines()
    assert rows[0] == "users_own:tensor on cpu, a batch of 1024 rows" and rows[1].startswith(
        "the median of 1 steps"
    )
    assert (
        max(map(len, rows)) <= 100 and rows[4].split()[0] == "plain" and rows[4].count("1.00x") == 2
    )
    assert rows[-2].startswith("amp() takes ")


def conclusions(**changes):
    names = {
        "plain": (1.0, 100),
        "amp()": (0.5, 60),
        "microbatch(2)": (1.1, 30),
        "recompute blocks": (1.3, 20),
        "all": (0.7, 9),
    }
    names |= changes
    return measured_by._conclusions([Measurement(name, *values) for name, values in names.items()])


def test_the_advice_is_that_of_the_figures():
    use, saving = conclusions()
    assert use == "amp() takes 0.50x the time: use it."
    assert saving == "Where memory is short, first microbatch(2): 0.30x memory, 1.10x time."
    assert "recompute blocks: 0.20x" in conclusions(**{"microbatch(2)": (1.6, 30)})[1]
    assert "leave it out" in conclusions(**{"amp()": (1.2, 60)})[0]
    assert len(conclusions(**{"microbatch(2)": (1.1, 99), "recompute blocks": (1.3, 95)})) == 1
    assert conclusions(plain=(1.0, None)) == [use]  # as on a device that does not tell


def test_buffers_and_random_numbers_are_put_back_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    trial = measured_by._Trial(
        model.train(),
        torch.randn(8, 4),
        lambda model, batch: model(batch).pow(2).mean(),
        torch.device("cpu"),
    )
    plain = measured_by._variants(model, None, 8)[0]
    means = []
    hook = model[1].register_forward_pre_hook(
        lambda module, _: means.append(module.running_mean.clone())
    )
    hook_after = model.register_forward_hook(
        lambda module, args, output: means.append(output.detach().clone())
    )
    for _ in range(2):
        assert trial.attempt(trial.seconds, plain, trial.batch, 8)[0] > 0
    hook.remove(), hook_after.remove()
    first, second = means[:4], means[4:]
    assert all(map(torch.equal, first, second)) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize(
    "layers, error", [(None, None), (None, ZeroDivisionError), (["nowhere"], WrongTarget)]
)
def test_a_model_that_somebody_goes_on_with_is_given_back_as_it_was(
    user, monkeypatch, layers, error
):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return model(batch).pow(2).mean() if error is None or len(calls) < 2 else 1 / 0

    monkeypatch.setattr(user, "kept", lambda: (model, torch.randn(8, 4), loss_fn), raising=False)
    with pytest.raises(error) if error else nullcontext():
        tried("kept", layers=layers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimizer_has_what_is_trained_and_is_gone_when_the_next_is_made(user, monkeypatch):
    sizes, made, AdamW = [], [], torch.optim.AdamW

    def recorded(parameters, **options):
        assert all(reference() is None for reference in made)
        optimizer = AdamW(parameters, **options)
        sizes.append(len(parameters))
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", recorded)
    tried("tensor")
    assert sizes == [20, 20, 12, 20, 20, 12] * 2
