"""What checkpoints hold, and what is not loaded: damage, and code."""

import hashlib
import json
import os
import pickle
import random
import shutil
import tempfile
import warnings
from collections import Counter, OrderedDict, deque
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saving_runs import Killed, names, run_small, same, small
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from trainkit import resumable, train_step


class Kept:
    def __init__(self, value=None):
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, state):
        self.value = state


class Tagged(torch.Tensor):
    pass


class Small:
    """An object with a value."""

    def __init__(self, value):
        self.value = value


def through(path, value):
    """The value as it comes back."""
    run_small(path, objects={**small(), "kept": Kept(value)}, loader=[torch.ones(1, 8)], every=9)
    with resumable(path, kept=(kept := Kept()), **small()):
        return kept.value


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
values = st.recursive(
    simple,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text() | st.integers() | st.tuples(st.integers(), st.booleans()), inner, max_size=3
        )
    ),
)


@settings(max_examples=15)
@given(values)
def test_values_come_back_as_they_were(value):
    with tempfile.TemporaryDirectory() as path:
        again = through(path, value)
        assert repr(again) == repr(value)  # which tells nan, -0.0, True and 1 apart


def test_tensors_arrays_and_containers_come_back_as_they_were(tmp_path):
    big = torch.arange(10_000.0).view(10, 10, 10, 10)
    dtypes = (torch.bool, torch.bfloat16, torch.uint16, torch.complex64)
    value = {
        "dtypes": [torch.tensor([1, 0, 1]).to(dtype) for dtype in dtypes],
        "shapes": [torch.empty(0, 3), torch.tensor(1.5), torch.ones(2, 0), big],
        "last": big.contiguous(memory_format=torch.channels_last),
        "view": big[:, ::2].transpose(0, 1),
        "sparse": torch.eye(3).to_sparse().to_dense(),
        "containers": [OrderedDict(b=1, a=2), Counter("aab"), {1, 2}, frozenset("x"), b""],
        "kinds": [torch.Size([1, 2]), torch.float16, 1j],
    }
    arrays = [np.arange(3, dtype=np.int16), np.float64(1.5), np.zeros((2, 0)), np.bool_(True)]
    arrays += [np.array(["ab"]), np.zeros(2, [("a", "i4"), ("b", "f8")])]
    again = through(tmp_path, {**value, "arrays": arrays})
    assert same(again["containers"], value["containers"])
    assert all(same(again[name], value[name]) for name in ("dtypes", "shapes", "last", "view"))
    assert again["last"].is_contiguous(memory_format=torch.channels_last)
    assert again["view"].untyped_storage().nbytes() == again["view"].nbytes  # and not all of big
    assert repr(again["kinds"]) == repr(value["kinds"])
    for ours, theirs in zip(again["arrays"], arrays, strict=True):
        assert type(ours) is type(theirs) and ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, object()], r"log\.0\.1 .*object.*`torch\.serialization.*\(\[object\]\)`"),
        (len, r"log\.0 .*add_safe_globals\(\[len\]\)`"),
        (lambda: 0, r"log\.0 .*function.*`"),
        (torch.eye(2).as_subclass(Tagged), r"log\.0 .*add_safe_globals\(\[Tagged\]\)`"),
        (np.array([None]), r"log\.0 .*Object arrays.*`"),
        ({"a": deque([Small(1)])}, r"log\.0\.a\.0 .*test_storage\.Small.*`"),
    ],
)
def test_what_cannot_be_stored_is_named_and_no_checkpoint_is_written(value, words, tmp_path):
    with pytest.raises(TypeError, match=words):  # before the loop, if it is there already
        run_small(tmp_path, objects={**small(), "log": [value]}, at_batch=pytest.fail)
    log, counts = [], []

    def change(count):
        counts.append(count)
        log.append(value)

    with pytest.raises(TypeError, match=words):  # after the first update
        run_small(tmp_path, objects={**small(), "log": log}, at_batch=change)
    assert len(counts) == 2
    with (
        pytest.raises(TypeError, match=words),
        resumable(tmp_path, **small(), log=(log := [])) as run,
    ):
        list(run.epochs(1))
        log.append(value)
    run_small(tmp_path, loader=[])
    assert names(tmp_path) == ["00000001"]


def test_a_class_that_the_user_allows_is_stored(tmp_path):
    with torch.serialization.safe_globals([Small]):
        assert through(tmp_path, [Small(3)])[0].value == 3
    with pytest.raises(pickle.UnpicklingError, match=r"test_storage\.Small"):
        resumable(tmp_path, kept=Kept(), **small()).__enter__()


def test_schedulers_optimizers_and_a_compiled_model_have_states_that_it_holds(tmp_path):
    model, optim, lr = nn.Linear(2, 2), torch.optim, torch.optim.lr_scheduler
    for make in (optim.SGD, optim.NAdam, optim.Rprop, optim.ASGD, optim.Adafactor):
        optimizer = make(model.parameters(), lr=0.1)
        constant, polynomial = lr.ConstantLR(optimizer), lr.PolynomialLR(optimizer)
        schedules = [
            lr.OneCycleLR(optimizer, 0.1, 10) if make is optim.SGD else lr.LinearLR(optimizer),
            lr.CosineAnnealingWarmRestarts(optimizer, 5),
            lr.SequentialLR(optimizer, [constant, polynomial], [2]),
            lr.LambdaLR(optimizer, lambda epoch: 1.0),
            lr.ReduceLROnPlateau(optimizer),
        ]
        if torch.__version__ >= (2, 7):  # the state of the 2.6 SWALR has a function
            schedules.insert(0, optim.swa_utils.SWALR(optimizer, 0.1))
        objects = {f"schedule{i}": schedule for i, schedule in enumerate(schedules)}
        objects |= {"ema": optim.swa_utils.AveragedModel(model), "optimizer": optimizer}
        objects |= {"scaler": torch.amp.GradScaler("cpu"), "model": torch.compile(model)}
        states = []
        for _ in range(2):
            step = train_step(optimizer)(lambda x: model(x).square().mean())
            with resumable(tmp_path / make.__name__, step=step, **objects) as run:
                for _ in run.epochs(1):
                    for x in step.over(torch.ones(3, 1, 2)):
                        step(x)
                        for schedule in schedules:
                            schedule.step(*[1.0] * (schedule is schedules[-1]))
            states.append([thing.state_dict() for thing in objects.values()])
        assert same(*states)


# Damage.


def two_checkpoints(path):
    """Returns the parameters as of the newest and of the one before."""
    before, newest = small(), small()
    run_small(path, 1, objects=before)
    run_small(path, 2, objects=newest)
    assert names(path) == ["00000001", "00000002"]
    return newest, before


def test_a_damaged_checkpoint_is_never_loaded(tmp_path):
    """A bit of each of its files, at both ends and in between; each cut, emptied, and gone."""
    newest, before = two_checkpoints(tmp_path)
    folder, draw = tmp_path / "00000002", random.Random(0)

    def loads(expected):
        objects = small()
        with resumable(tmp_path, **objects):
            for name in ("model", "optimizer"):
                assert same(objects[name].state_dict(), expected[name].state_dict())

    for file in list(folder.iterdir()):
        whole = file.read_bytes()
        places = [0, 64, len(whole) - 1, draw.randrange(len(whole))]
        bits = [(i, whole[i] ^ (1 << draw.randrange(8))) for i in places]
        flipped = [bytes([*whole[:i], bit, *whole[i + 1 :]]) for i, bit in bits]
        for content in (*flipped, whole[: len(whole) // 2], whole + b"\0", b"", None):
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.warns(
                UserWarning, match="00000002 is damaged .*; resuming from .*00000001"
            ):
                loads(before)
        file.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loads(newest)


def test_after_damage_the_one_before_is_kept_until_there_are_newer_ones(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "00000002" / "rank0.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="resuming from .*00000001"):
        run_small(tmp_path, 2)
    assert names(tmp_path) == ["00000001", "00000003"]
    for name in names(tmp_path):
        (tmp_path / name / "manifest.json").unlink()
    with pytest.raises(RuntimeError, match=r"00000003 is damaged .*00000001 is damaged .*delete"):
        run_small(tmp_path)


def test_killed_in_the_middle_of_a_save(tmp_path, monkeypatch):
    """At each of the calls that change something on the disk."""
    run_small(tmp_path / "whole", 2, objects=(whole := small()))
    calls = []

    def counted(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) == after:
                raise Killed
            return function(*arguments, **options)

        return call

    for after in range(3, 99):
        path = tmp_path / str(after)
        run_small(path)
        calls.clear()
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            patch.setattr(Path, "mkdir", counted(Path.mkdir))
            try:
                run_small(path, 2, keep=1, every=99)
                break
            except Killed:
                pass
        assert run_small(path, 2, objects=(objects := small())) in (0, 8)
        assert same(objects["model"].state_dict(), whole["model"].state_dict())
    assert after > 15


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("name", ["FileSystemReader.read_data", "FileSystemWriter.write_data"])
def test_ctrl_c_and_a_full_disk_come_out_as_they_are(name, error, tmp_path, monkeypatch):
    """Within PyTorch's exception they would be no KeyboardInterrupt, and not even an Exception."""
    run_small(tmp_path)

    def fail(*arguments, **options):
        raise error("it")

    monkeypatch.setattr(f"torch.distributed.checkpoint.{name}", fail)
    with pytest.raises(error, match="it"):
        run_small(tmp_path, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    opened = Path.open

    def full(path, *mode):
        return opened(Path("/dev/full") if path.name == "rank0.pt" else path, *mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        run_small(tmp_path)


# Code.


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def forge(folder, name, content):
    """Replaces a file of a checkpoint, with the hashes that it should have."""
    with (folder / name).open("wb") as stream:
        pickle.dump(content, stream) if name == ".metadata" else torch.save(content, stream)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_bytes().partition(b"\n")[2])
    content["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    text = json.dumps(content).encode()
    manifest.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


@pytest.mark.parametrize("name", [".metadata", "rank0.pt", "shared.pt", "__0_0.distcp"])
def test_code_in_a_checkpoint_is_never_run(name, tmp_path):
    """What has it is refused, and .metadata, which is a pickle for PyTorch's tools, not read."""
    run_small(tmp_path)
    thing = Malicious()
    thing.path = str(tmp_path / "ran")
    others = (Metadata({"a": BytesStorageMetadata()}), Metadata({}, planner_data=thing))
    for content in (thing, *(others if name == "shared.pt" else ())):
        forge(tmp_path / "00000001", name, content)
        words = None if name == "__0_0.distcp" else "Weights only"
        with nullcontext() if name == ".metadata" else pytest.raises(Exception, match=words):
            run_small(tmp_path)
        assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_format(tmp_path):
    run_small(tmp_path)
    text = json.dumps({"format": 1, "files": {}, "ranks": []}).encode()
    file = tmp_path / "00000001" / "manifest.json"
    file.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    with pytest.raises(ValueError, match=r"has format 1, .*give another path"):
        run_small(tmp_path)
