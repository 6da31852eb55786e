"""Checkpoints on disk: written whole or not at all, and loaded only if no byte has changed.

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
import shutil
import sys
import tempfile
import types
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from trainkit.core.plan import check
from trainkit.core.precision import current_device
from trainkit.core.warning import warn
from trainkit.ranks.collectives import all_gather_objects, cpu_group, rank, world_size

FORMAT = 4
MANIFEST, SHARED, ASIDE = "manifest.json", "shared.pt", ".saving"


class Checkpoints:
    """The checkpoints in a folder, ``00000001`` and so on. All ranks call every method together."""

    def __init__(self, path: Path, keep: int) -> None:
        self._path, self._keep = path, keep
        self._damaged: list[str] = []

    def check_path(self) -> None:
        """Raise ValueError if no checkpoint can be written."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryDirectory(dir=self._path).cleanup()
        except OSError as error:
            advice = "give a writable path, to which `shutil.copytree(old, new)` copies checkpoints"
            raise ValueError(f"no checkpoint can be written ({error}): {advice}") from None

    def save(self, values: Mapping[str, Any], shared: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, then delete all but the last ``keep``.

        ``shared``: the tensors in ``values`` that are the same on all ranks, under unique keys.

        Raises:
            TypeError: for a value that cannot be stored. The older checkpoints stay.
        """
        aside = self._path / ASIDE
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
            aside.mkdir(parents=True)
        all_gather_objects(None)
        file = aside / f"rank{rank()}.pt"
        with file.open("w+b") as stream:
            try:
                tensors = _store(values, stream, shared)
            except NOT_STORED:
                check_storable(values, shared)
                raise
        with _distributed_checkpoint() as dcp:
            writer = dcp.FileSystemWriter(aside)
            metadata = dcp.save(tensors, storage_writer=writer, process_group=cpu_group())
        own = [file, *aside.glob(f"__{rank()}_*")]
        if rank() == 0:
            # .metadata, for PyTorch's tools, is a pickle that may run code. We read our own copy.
            metadata.storage_meta = None
            torch.save(metadata, aside / SHARED)
            own += [aside / ".metadata", aside / SHARED]
        for file in own:
            _sync(file)
        hashes = all_gather_objects({file.name: _hash(file) for file in own})
        if rank() == 0:
            files = {name: found for part in hashes for name, found in part.items()}
            text = json.dumps({"format": FORMAT, "files": files}).encode()
            digest = hashlib.sha256(text).hexdigest().encode()
            (aside / MANIFEST).write_bytes(digest + b"\n" + text)
            _sync(aside / MANIFEST)
            _sync(aside)
            last = max(map(int, self._names()), default=0)
            os.rename(aside, self._path / f"{last + 1:08d}")
            _sync(self._path)
            good = [name for name in self._names() if name not in self._damaged]
            for name in set(self._names()) - set(good[-self._keep :]):
                # Renamed first: a half-deleted checkpoint must not look like a damaged one.
                os.rename(self._path / name, aside)
                shutil.rmtree(aside)
        all_gather_objects(None)

    def newest(self) -> Path | None:
        """Return the newest undamaged checkpoint, or None.

        Raises:
            RuntimeError: if there are checkpoints, and all are damaged.

        Warns:
            UserWarning: if a newer one is damaged.
        """
        damage = ""
        for name in reversed(all_gather_objects(self._names())[0]):
            path, reason = Path(self._path, name), ""
            try:
                _check_files(path)
            except OSError as error:
                reason = str(error)
            if not (reason := first_of_ranks(reason)):
                if damage:
                    warn(f"{damage}resuming from {path}, the one before")
                return path
            damage += f"the checkpoint {path} is damaged ({reason}); "
            self._damaged.append(name)
        advice = f"there is no other: to begin anew, delete {self._path} or give another path"
        check(not damage, RuntimeError, f"{damage}{advice}")
        return None

    def _names(self) -> list[str]:
        return sorted(path.name for path in self._path.glob("[0-9]" * 8))


def first_of_ranks(text: str) -> str:
    """Return the first text that is not empty, in the order of ranks, or ""."""
    return next(filter(None, all_gather_objects(text)), "")


def load(path: Path, like: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the values of a checkpoint. A rank without a file in it gets the values of rank 0.

    A shared tensor gets the device, strides and shards of a tensor in ``like`` of the same shape:
    if possible, of the one with its key, or with its key up to the last dot, which is the
    parameter that the state of an optimizer belongs to.
    """
    metadata = _load(path / SHARED, *_metadata_classes())
    tensors: dict[str, Tensor] = {}

    @functools.wraps(_shared_tensor)
    def shared_tensor(key: str) -> Tensor:
        found = metadata.state_dict_metadata[key]
        patterns = [like.get(key), like.get(key.rpartition(".")[0]), *like.values()]
        fits = (one for one in patterns if one is not None and one.shape == found.size)
        pattern = next(fits, torch.empty(found.size))
        tensors[key] = torch.empty_like(pattern, dtype=found.properties.dtype)
        return tensors[key]

    file = path / f"rank{rank()}.pt"
    values: dict[str, Any] = _load(file if file.exists() else path / "rank0.pt", shared_tensor)
    with _distributed_checkpoint() as dcp:
        reader = dcp.FileSystemReader(path)
        reader.read_metadata = lambda *_, **__: metadata  # the usual one unpickles .metadata
        dcp.load(tensors, storage_reader=reader, process_group=cpu_group())
    return values


# Values.


def check_storable(values: Mapping[str, Any], shared: Mapping[str, Tensor]) -> None:
    """Raise TypeError for a value that ``load`` could not return. Name the innermost one."""
    for name, value in values.items():
        try:
            _store(value, file := io.BytesIO(), shared)
            file.seek(0)
            _load(file, functools.wraps(_shared_tensor)(lambda key: torch.empty(0)))
        except NOT_STORED as error:
            check_storable({f"{name}.{key}": part for key, part in parts_of(value)}, shared)
            fault = f"{name} is of type {type(value).__name__}, which cannot be stored"
            reason = " ".join(str(error).split())[:120]
            advice = "keep tensors, numbers, lists or dicts, `{'basis': tensor}`"
            raise TypeError(f"{fault} ({reason}): {advice}") from None


def parts_of(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return pairs of a key, or a position, and a value in a container."""
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple, deque)) else ()


def _store(value: Any, file: IO[bytes], shared: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a value, without the tensors that ``torch.distributed.checkpoint`` is to write.

    Returns these tensors. Raises an error in NOT_STORED for a value that ``_load`` would refuse.
    """
    tensors: dict[str, Tensor] = {}
    keys = {id(tensor): key for key, tensor in shared.items()}
    numpy: Any = sys.modules.get("numpy")

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
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
            if numpy and (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
                # As an .npy file: a pickle of an array can turn bytes into pointers to objects.
                numpy.save(npy := io.BytesIO(), value, allow_pickle=False)
                data = torch.frombuffer(npy.getbuffer(), dtype=torch.uint8)
                return _array, (data, type(value) is numpy.ndarray)
            return NotImplemented

    torch.save(value, file, types.SimpleNamespace(__name__="pickle", Pickler=Pickler))
    file.seek(0)
    with torch.serialization.safe_globals([*ALLOWED, _shared_tensor]):
        if found := torch.serialization.get_unsafe_globals_in_checkpoint(file):
            remedy = f"`torch.serialization.add_safe_globals([{found[0].rpartition('.')[2]}])`"
            raise pickle.PicklingError(f"{found[0]} is not allowed, {remedy}")
    return tensors


def _shared_tensor(key: str) -> Tensor:
    """In the file of a rank, take the place of a tensor that is stored elsewhere; see ``load``."""
    raise NotImplementedError


def _array(data: Tensor, is_array: bool) -> Any:
    array = import_module("numpy").load(io.BytesIO(bytes(data.numpy())), allow_pickle=False)
    return array if is_array else array[()]


def _load(file: Path | IO[bytes], *allowed: Any) -> Any:
    """Read what ``torch.save`` wrote; run no code."""
    with torch.serialization.safe_globals([*ALLOWED, *allowed]):
        return torch.load(file, map_location=_place, weights_only=True)


def _place(storage: Any, location: str) -> Any:
    """Put a tensor from an accelerator on that of this process, or on the CPU without one."""
    device = current_device()
    if device.type == "cpu" or location.partition(":")[0] != device.type:
        return storage
    return torch.serialization.default_restore_location(storage, str(device))  # type: ignore[no-untyped-call]


# These are allowed besides the classes that every PyTorch since 2.6 allows.
ALLOWED = (_array, bytes, complex, Counter, deque, frozenset, range, set, slice)
NOT_STORED = (pickle.PickleError, AttributeError, RuntimeError, TypeError, ValueError)


def _metadata_classes() -> list[type]:
    """Return the classes in the metadata of a checkpoint of tensors."""
    names = "ChunkStorageMetadata Metadata MetadataIndex TensorProperties TensorStorageMetadata"
    metadata = import_module("torch.distributed.checkpoint.metadata")
    info = import_module("torch.distributed.checkpoint.filesystem")._StorageInfo
    return [info, metadata._MEM_FORMAT_ENCODING, *(getattr(metadata, n) for n in names.split())]


# Files.


@contextmanager
def _distributed_checkpoint() -> Iterator[Any]:
    """Give ``torch.distributed.checkpoint``; raise the errors that are in its exceptions."""
    dcp: Any = import_module("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a single process
        try:
            yield dcp
        except dcp.CheckpointException as error:  # no Exception; may hold Ctrl-C
            raise next(iter(error.failures.values()))[0] from error


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk, so that no power failure loses it."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
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


def _check_files(path: Path) -> None:
    """Raise OSError if a file that this rank checks is damaged."""
    digest, _, text = (path / MANIFEST).read_bytes().partition(b"\n")
    if digest.decode(errors="replace") != hashlib.sha256(text).hexdigest():
        raise OSError(f"{MANIFEST} does not have the hash in its first line")
    manifest = json.loads(text)
    message = f"{path} has format {manifest['format']}, and this trainkit reads {FORMAT}"
    advice = "use the version that wrote it, or give another path to begin anew"
    check(manifest["format"] == FORMAT, ValueError, f"{message}: {advice}")
    for name, digest in sorted(manifest["files"].items())[rank() :: world_size()]:
        if _hash(path / name) != digest:
            raise OSError(f"{name} does not have the hash that it was written with")
