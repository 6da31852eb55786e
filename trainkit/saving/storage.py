"""Checkpoints on disk: written whole or not at all, and loaded only if every byte is as written.

A checkpoint is a folder. ``torch.distributed.checkpoint`` stores tensors that all ranks share, and
shards of DTensors. ``torch.save`` stores everything else, in one file per rank. It is read with
``torch.load(weights_only=True)``, which runs no code. A manifest has the hash of every file.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import types
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from trainkit.core.plan import check
from trainkit.core.precision import current_device
from trainkit.core.warning import warn
from trainkit.ranks.collectives import all_gather_objects, cpu_group, rank, world_size

FORMAT = 2
MANIFEST, SHARED, SAVING, DELETING = "manifest.json", "shared.pt", ".saving", ".deleting"


class Saved(NamedTuple):
    """An undamaged checkpoint, and the number of ranks that wrote it."""

    path: Path
    ranks: int


class Checkpoints:
    """The checkpoints in a folder, ``00000001`` and so on. All ranks call every method together."""

    def __init__(self, path: Path, keep: int) -> None:
        self._path, self._keep = path, keep
        self._damaged: list[str] = []

    def check_path(self) -> None:
        """Raise ValueError if no checkpoint can be written."""
        there = next(path for path in (self._path, *self._path.parents) if path.exists())
        failure = ""
        try:
            tempfile.TemporaryDirectory(dir=there).cleanup()
        except OSError as error:
            failure = error.strerror or str(error)
        failure = first_of_ranks(failure)
        advice = "give a writable path; to resume from here, copy it, `shutil.copytree(old, new)`"
        check(not failure, ValueError, f"{self._path} cannot be written ({failure}): {advice}")

    def save(self, values: Mapping[str, Any], shared: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, then delete those older than the last ``keep``.

        ``shared``: the tensors in ``values`` that are the same on all ranks, under unique keys.

        Raises:
            TypeError: for a value that cannot be stored; the older checkpoints stay.
        """
        aside = self._path / SAVING
        if rank() == 0:
            self._clear()
            aside.mkdir(parents=True)
        all_gather_objects(None)
        tensors: dict[str, Tensor] = {}
        mine = [aside / f"rank{rank()}.pt"]
        with _synced(mine[0]) as stream:
            if _store(values, stream, shared, tensors):
                check_storable(values, shared)
        with _distributed_checkpoint() as dcp:
            writer = dcp.FileSystemWriter(aside)
            metadata = dcp.save(tensors, storage_writer=writer, process_group=cpu_group())
        mine += aside.glob(f"__{rank()}_*")
        if rank() == 0:
            # PyTorch's tools read its .metadata, which may run code. We read our own copy.
            metadata.storage_meta = None
            mine += [aside / ".metadata", aside / SHARED]
            with _synced(aside / SHARED) as stream:
                torch.save(metadata, stream)
        hashes = all_gather_objects({file.name: _hash(file) for file in mine})
        if rank() == 0:
            files = {name: found for part in hashes for name, found in part.items()}
            _write_manifest(aside / MANIFEST, {"ranks": world_size(), "files": files})
            _sync_folder(aside)
            last = max(map(int, self._names()), default=0)
            os.rename(aside, self._path / f"{last + 1:08d}")
            _sync_folder(self._path)
            self._delete_old()
        all_gather_objects(None)

    def newest(self) -> Saved | None:
        """The newest undamaged checkpoint; None if there are no checkpoints.

        Raises:
            RuntimeError: if all checkpoints are damaged.

        Warns:
            UserWarning: if a newer one is damaged.
        """
        if rank() == 0:
            self._clear()
        damage = ""
        for name in reversed(all_gather_objects(self._names())[0]):
            path = self._path / name
            ranks, reason = _check_files(path)  # each rank checks some of the files
            if not (reason := first_of_ranks(reason)):
                if damage:
                    warn(f"{damage}resuming from {path}, the one before")
                return Saved(path, ranks)
            damage += f"the checkpoint {path} is damaged ({reason}); "
            self._damaged.append(name)
        advice = f"there is no other: to begin anew, delete {self._path} or give another path"
        check(not damage, RuntimeError, f"{damage}{advice}")
        return None

    def _names(self) -> list[str]:
        there = self._path.iterdir() if self._path.is_dir() else ()
        return sorted((path.name for path in there if re.fullmatch(r"\d{8,}", path.name)), key=int)

    def _delete_old(self) -> None:
        names = self._names()
        good = [name for name in names if name not in self._damaged]
        for name in set(names) - set(good[-self._keep :]):
            # Renamed first: a half-deleted checkpoint must not look like a damaged one.
            os.rename(self._path / name, self._path / DELETING)
            shutil.rmtree(self._path / DELETING)

    def _clear(self) -> None:
        """Delete what a killed process left."""
        for name in (SAVING, DELETING):
            shutil.rmtree(self._path / name, ignore_errors=True)


def first_of_ranks(text: str) -> str:
    """The first text that is not empty, in the order of ranks; "" if there is none."""
    return next(filter(None, all_gather_objects(text)), "")


def load(saved: Saved, like: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values of a checkpoint. A rank that did not write it gets what rank 0 wrote.

    A shared tensor has the strides and shards of the tensor in ``like`` with the same shape and
    key: its own, or its own without the last part (of a state of an optimizer).
    """
    metadata = _load(saved.path / SHARED, *_metadata_classes())
    tensors: dict[str, Tensor] = {}

    @functools.wraps(_shared_tensor)
    def shared_tensor(key: str) -> Tensor:
        found = metadata.state_dict_metadata[key]
        pattern = like.get(key, like.get(key.rpartition(".")[0]))
        if pattern is None or pattern.shape != found.size:
            pattern = torch.empty(found.size)
        tensors[key] = torch.empty_like(pattern, dtype=found.properties.dtype)
        return tensors[key]

    number = rank() if rank() < saved.ranks else 0
    values: dict[str, Any] = _load(saved.path / f"rank{number}.pt", shared_tensor)
    with _distributed_checkpoint() as dcp:
        reader = dcp.FileSystemReader(saved.path)
        reader.read_metadata = lambda *_, **__: metadata  # its own unpickles .metadata
        dcp.load(tensors, storage_reader=reader, process_group=cpu_group())
    return values


# Values.


def check_storable(values: Mapping[str, Any], shared: Mapping[str, Tensor]) -> None:
    """Raise TypeError for the first value, or part of one, that cannot be stored."""

    def check_part(key: str, value: Any) -> None:
        if not (reason := _store(value, io.BytesIO(), shared, {})):
            return
        if isinstance(value, (dict, list, tuple)):
            for name, part in value.items() if isinstance(value, dict) else enumerate(value):
                check_part(f"{key}.{name}", part)
        kind = type(value)
        raise TypeError(
            f"{key} is of type {kind.__module__}.{kind.__qualname__} and cannot be stored "
            f"({reason}): keep tensors, numbers, lists or dicts instead, or allow its class, "
            f"`torch.serialization.add_safe_globals([{kind.__name__}])`"
        )

    for name, value in values.items():
        check_part(name, value)


def _store(
    value: Any, stream: IO[bytes], shared: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> str:
    """Write a value; return why ``_load`` would refuse it, or "".

    The tensors that ``torch.distributed.checkpoint`` is to write are added to ``tensors``.
    """
    keys = {id(tensor): key for key, tensor in shared.items()}

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            numpy = sys.modules.get("numpy")
            if id(value) in keys or hasattr(value, "full_tensor"):  # shared, or a DTensor
                key = keys.get(id(value), f"sharded {len(tensors)}")
                tensors[key] = value.detach()
                return _shared_tensor, (key,)
            if type(value) is Tensor and value.layout == torch.strided:
                value = value.detach()
                if value.untyped_storage().nbytes() > value.nbytes:  # a view of a larger tensor
                    value = value.clone()
                return value.__reduce_ex__(2)
            if type(value) is deque:
                return deque, (list(value), value.maxlen)
            if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
                return _reduce_array(value, numpy)
            return NotImplemented

    module = types.SimpleNamespace(__name__="pickle", Pickler=Pickler)
    try:
        torch.save(value, stream, pickle_module=module)
        stream.seek(0)
        return ", ".join(_unsafe_globals(stream, _shared_tensor))
    except OSError:
        raise
    except Exception as error:  # objects may raise anything when they are pickled
        return str(error) or repr(error)


def _shared_tensor(key: str) -> Tensor:
    """What the file of a rank has in place of a tensor that is stored elsewhere; see ``load``."""
    raise NotImplementedError


def _reduce_array(value: Any, numpy: Any) -> Any:
    """As an .npy file. NumPy's pickles can pass off bytes as pointers to objects."""
    if type(value) not in (numpy.ndarray, value.dtype.type):
        return NotImplemented
    numpy.save(file := io.BytesIO(), value, allow_pickle=False)
    data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return _array, (data, type(value) is numpy.ndarray)


def _array(data: Tensor, is_array: bool) -> Any:
    array = import_module("numpy").load(io.BytesIO(bytes(data.numpy())), allow_pickle=False)
    return array if is_array else array[()]


def _load(file: Path, *allowed: Any) -> Any:
    """Read what ``torch.save`` wrote; run no code."""
    unsafe = ", ".join(_unsafe_globals(file, *allowed))
    advice = "if it is a class of yours, `torch.serialization.add_safe_globals([Class])`"
    check(not unsafe, ValueError, f"{file} asks for {unsafe} and is not loaded: {advice}")
    with torch.serialization.safe_globals([*ALLOWED, *allowed]):
        return torch.load(file, map_location=_place, weights_only=True)


def _unsafe_globals(file: Any, *allowed: Any) -> list[str]:
    with torch.serialization.safe_globals([*ALLOWED, *allowed]):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))


def _place(storage: Any, location: str) -> Any:
    """Put what was on an accelerator on the one of this process, if that is of the same kind."""
    device = current_device()
    if device.type == "cpu" or location.partition(":")[0] != device.type:
        return storage
    return torch.serialization.default_restore_location(storage, str(device))  # type: ignore[no-untyped-call]


# Besides what PyTorch allows: some of these since 2.6, some not at all.
ALLOWED = (_array, bytes, complex, Counter, deque, frozenset, set)


def _metadata_classes() -> list[type]:
    """What the metadata of ``torch.distributed.checkpoint`` is made of, if it stores tensors."""
    names = "ChunkStorageMetadata Metadata MetadataIndex TensorProperties TensorStorageMetadata"
    metadata = import_module("torch.distributed.checkpoint.metadata")
    filesystem = import_module("torch.distributed.checkpoint.filesystem")
    found = [getattr(metadata, name) for name in (*names.split(), "_MEM_FORMAT_ENCODING")]
    return [*found, filesystem._StorageInfo]


# Files.


@contextmanager
def _distributed_checkpoint() -> Iterator[Any]:
    """``torch.distributed.checkpoint``, whose errors are raised as what they were."""
    dcp: Any = import_module("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a single process
        try:
            yield dcp
        except dcp.CheckpointException as error:  # even around Ctrl-C, and no Exception itself
            raise next(iter(error.failures.values()))[0] from error


@contextmanager
def _synced(file: Path) -> Iterator[IO[bytes]]:
    with file.open("w+b") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """So that the names in a folder survive a power failure, where a folder can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hash(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            found.update(part)
    return found.hexdigest()


def _write_manifest(file: Path, content: dict[str, Any]) -> None:
    """As JSON, under a line with its hash."""
    text = json.dumps({"format": FORMAT, **content}).encode()
    with _synced(file) as stream:
        stream.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def _check_files(path: Path) -> tuple[int, str]:
    """The number of ranks, and what is wrong with the files that this rank checks, or ""."""
    try:
        digest, _, text = (path / MANIFEST).read_bytes().partition(b"\n")
        if digest.decode(errors="replace") != hashlib.sha256(text).hexdigest():
            return 0, f"{MANIFEST} does not have the hash in its first line"
        manifest = json.loads(text)
        message = f"{path} has format {manifest['format']}, and this trainkit reads {FORMAT}"
        advice = "use the version that wrote it, or give another path to begin anew"
        check(manifest["format"] == FORMAT, ValueError, f"{message}: {advice}")
        for name, digest in sorted(manifest["files"].items())[rank() :: world_size()]:
            if _hash(path / name) != digest:
                return 0, f"{name} does not have the hash that it was written with"
    except OSError as error:
        return 0, str(error)
    return manifest["ranks"], ""
