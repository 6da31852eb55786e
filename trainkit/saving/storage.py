"""Checkpoints on disk: states that are written whole or not at all, and read only if every byte is what was written.

A checkpoint is a folder of torch.distributed.checkpoint with a manifest beside: the hash of every file and, as JSON, all that is
no large tensor. Nothing in it is code. ``.metadata``, which PyTorch pickles, is read by an unpickler that knows a dozen harmless
names, and the tensors are read with ``weights_only``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.precision import current_device
from trainkit.core.warning import warn
from trainkit.ranks.parallel import count_ranks, cpu_group, everyone, this_rank

MANIFEST, SAVING, DELETING = "manifest.json", ".saving", ".deleting"
# What lies in JSON is a tenth of a millisecond faster than an entry of torch.distributed.checkpoint; random states do.
SMALL = 8192
ALLOWED = "numbers, strings, None, lists, tuples, sets, dicts, bytes, strided or COO tensors and NumPy arrays"


class Damaged(Exception):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints in a folder, ``00000001`` and so on. On several ranks all of them call every method, at the same time."""

    def __init__(self, path: Path, keep: int) -> None:
        self._path, self._keep = path, keep
        self._damaged: list[str] = []

    def check(self, values: Mapping[str, Any], shared: Container[str]) -> None:
        """Raises TypeError for what ``save`` cannot hold, and ValueError where it could not write."""
        for name, value in values.items():
            _encode(value, name, {}, shared)
        if failure := next(filter(None, everyone(self._failure())), ""):
            raise ValueError(
                f"no checkpoint can be written to {self._path} ({failure}): give a path that can be written; to go on from "
                "what lies there, a copy of it, `shutil.copytree(old, new)`"
            )

    def save(self, values: Mapping[str, Any], shared: Container[str]) -> None:
        """Writes one, and deletes those older than the last ``keep``; TypeError for what it cannot hold, before it writes.

        Tensors whose key or first name, of ``"model.0.weight"``, is ``shared`` are the same on all ranks. They are stored once,
        as DTensors are, and everything else for every rank.
        """
        rank, aside = this_rank(), self._path / SAVING
        tensors: dict[str, Tensor] = {}
        encoded = {name: _encode(value, name, tensors, shared) for name, value in values.items()}
        if rank == 0:
            self._clear()
            aside.mkdir(parents=True)
        everyone(None)
        with _distributed_checkpoint() as dcp:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside), process_group=cpu_group())
        mine = [
            file
            for file in aside.iterdir()
            if file.name.startswith(f"__{rank}_") or (rank == 0 and file.name == ".metadata")
        ]
        told = everyone(({file.name: _hash(file) for file in mine}, encoded))
        if rank == 0:
            content = {
                "format": 1,
                "files": {k: v for files, _ in told for k, v in files.items()},
                "ranks": [t for _, t in told],
            }
            _write_manifest(aside / MANIFEST, content)
            _sync(aside)
            names = self._names()
            os.rename(aside, self._path / f"{1 + max(map(int, names), default=0):08d}")
            _sync(self._path)
            good = [name for name in self._names() if name not in self._damaged]
            for name in set(self._names()) - set(good[-self._keep :]):
                # Under another name first: half of it must not be taken for a checkpoint.
                os.rename(self._path / name, self._path / DELETING)
                shutil.rmtree(self._path / DELETING)
        everyone(None)

    def newest(self) -> Saved | None:
        """The newest that is whole; None where there is none at all.

        Warns:
            UserWarning: where a newer one is damaged.

        Raises:
            RuntimeError: where all are.
        """
        if this_rank() == 0:
            self._clear()
        reasons: dict[str, str] = {}
        for name in reversed(everyone(self._names())[0]):
            reason, manifest = _check_files(self._path / name)  # each rank looks at a part
            if reason := next(filter(None, everyone(reason)), ""):
                reasons[name] = reason
                continue
            if reasons:
                warn(f"{self._told(reasons)}; going on from {self._path / name}, the one before")
            self._damaged = list(reasons)
            return Saved(self._path / name, manifest)
        if reasons:
            raise RuntimeError(
                f"{self._told(reasons)}, and there is no other: to begin anew, delete {self._path} or give another path"
            )
        return None

    def _told(self, reasons: Mapping[str, str]) -> str:
        return "; ".join(
            f"the checkpoint {self._path / name} is damaged ({reason})"
            for name, reason in reasons.items()
        )

    def _names(self) -> list[str]:
        there = self._path.iterdir() if self._path.is_dir() else ()
        return sorted((path.name for path in there if re.fullmatch(r"\d{8,}", path.name)), key=int)

    def _failure(self) -> str:
        """Why nothing can be written, or ""."""
        there = next(path for path in (self._path, *self._path.parents) if path.exists())
        try:
            with tempfile.TemporaryDirectory(dir=there):
                pass
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _clear(self) -> None:
        """Removes what was left by a process that was killed."""
        for name in (SAVING, DELETING):
            shutil.rmtree(self._path / name, ignore_errors=True)


class Saved:
    """A checkpoint that is whole, as this rank reads it; one that was not there when it was written reads what rank 0 wrote."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.ranks: list[dict[str, Any]] = manifest["ranks"]
        self.is_own = this_rank() < len(self.ranks)
        self._mine = self.ranks[this_rank() if self.is_own else 0]
        self.names = set(self._mine)

    def same_on_all_ranks(self, name: str, key: str) -> bool:
        """Whether all ranks wrote the same under this key of a dict."""
        first, *others = (dict(rank[name]["dict"])[key] for rank in self.ranks)
        return all(other == first for other in others)

    def load(self, like: Mapping[str, Tensor]) -> dict[str, Any]:
        """What was saved. A tensor whose key, with or without its last name, is in ``like`` is sharded as that one is."""
        tensors: dict[str, Tensor] = {}
        values = {name: _decode(value, tensors, like) for name, value in self._mine.items()}
        with _distributed_checkpoint() as dcp:
            dcp.load(tensors, storage_reader=_reader(self.path), process_group=cpu_group())
        return values


# Values as JSON: what JSON has stands as it is, everything else is an object with one key, its type.


def _encode(value: Any, key: str, tensors: dict[str, Tensor], shared: Container[str]) -> Any:
    kind = type(value)

    def inner(part: Any, name: Any) -> Any:
        return _encode(part, f"{key}.{name}", tensors, shared)

    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [inner(part, i) for i, part in enumerate(value)]
    if kind in _SEQUENCES.values():
        return {kind.__name__: [inner(part, i) for i, part in enumerate(value)]}
    if kind in _MAPPINGS.values():
        return {
            kind.__name__: [[inner(name, name), inner(part, name)] for name, part in value.items()]
        }
    if kind is bytes:
        return {"bytes": _text(value)}
    if (
        isinstance(value, Tensor) and value.layout == torch.sparse_coo
    ):  # as the gradients of an embedding in an open window
        indices, entries = inner(value._indices(), "indices"), inner(value._values(), "values")
        return {"sparse": [indices, entries, list(value.shape), value.is_coalesced()]}
    if isinstance(value, Tensor):
        return _encode_tensor(value, key, tensors, shared)
    numpy = sys.modules.get("numpy")
    if (
        numpy is not None
        and kind.__module__ == "numpy"
        and (kind is numpy.ndarray or isinstance(value, numpy.generic))
    ):
        dtype = value.dtype.str
        if not value.dtype.hasobject and numpy.dtype(dtype) == value.dtype:
            name = "array" if kind is numpy.ndarray else "scalar"
            return {
                name: [dtype, list(value.shape), _text(numpy.ascontiguousarray(value).tobytes())]
            }
    raise TypeError(
        f"{key} is of type {kind.__module__}.{kind.__qualname__}, and a checkpoint holds no objects but {ALLOWED}"
    )


def _encode_tensor(
    tensor: Tensor, key: str, tensors: dict[str, Tensor], shared: Container[str]
) -> dict[str, Any]:
    sharded = hasattr(tensor, "full_tensor")  # a DTensor, without the import
    if not sharded and (
        type(tensor) not in (Tensor, nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.is_quantized
    ):
        raise TypeError(
            f"{key} is of type {type(tensor).__name__} and layout {tensor.layout}, and a checkpoint holds only {ALLOWED}"
        )
    tensor = tensor.detach()
    dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
    description = {"dtype": dtype, "shape": shape, "device": tensor.device.type}
    if not sharded and key not in shared and key.partition(".")[0] not in shared:
        if tensor.numel() * tensor.element_size() <= SMALL:
            flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().flatten()
            data = bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
            return {"tensor": {**description, "data": _text(data)}}
        key = f"rank{this_rank()}.{key}"
    while key in tensors:  # "a.b" in a dict, and "b" in the dict "a" of it
        key += "'"
    tensors[key] = tensor
    if (
        not sharded and not tensor.is_contiguous()
    ):  # empty_like keeps an order of dimensions, and no gaps
        description["stride"] = list(torch.empty_like(tensor, device="meta").stride())
    return {"tensor": {**description, "key": key}}


def _decode(value: Any, tensors: dict[str, Tensor], like: Mapping[str, Tensor]) -> Any:
    """The value, with empty tensors, also in ``tensors``, for those that are then loaded into them."""
    if isinstance(value, list):
        return [_decode(part, tensors, like) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_decode(content, tensors, like))
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](
            {_decode(k, tensors, like): _decode(v, tensors, like) for k, v in content}
        )
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "tensor":
        return _decode_tensor(content, tensors, like)
    if kind == "sparse":
        (indices, entries), (shape, is_coalesced) = _decode(content[:2], tensors, like), content[2:]
        # Not looked into: the parts may be loaded only after this.
        return torch.sparse_coo_tensor(
            indices, entries, shape, check_invariants=False, is_coalesced=is_coalesced
        )
    numpy = import_module("numpy")
    dtype, shape, data = content
    array = numpy.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    return array if kind == "array" else array[()]


def _decode_tensor(
    content: dict[str, Any], tensors: dict[str, Tensor], like: Mapping[str, Tensor]
) -> Tensor:
    dtype, shape, device = getattr(torch, content["dtype"]), content["shape"], content["device"]
    if current_device().type != device:
        device = "cpu"
    if "data" in content:
        data = bytearray(base64.b64decode(content["data"]))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(shape).to(device)
    key = content["key"]
    sharded = like.get(key, like.get(key.rpartition(".")[0]))
    if sharded is not None and list(sharded.shape) == shape:
        tensors[key] = torch.empty_like(sharded, dtype=dtype)
    elif "stride" in content:
        tensors[key] = torch.empty_strided(shape, content["stride"], dtype=dtype, device=device)
    else:
        tensors[key] = torch.empty(shape, dtype=dtype, device=device)
    return tensors[key]


_SEQUENCES: dict[str, Any] = {kind.__name__: kind for kind in (tuple, set, frozenset, torch.Size)}
_MAPPINGS: dict[str, Any] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Files.


@contextmanager
def _distributed_checkpoint() -> Iterator[Any]:
    """``torch.distributed.checkpoint``; what is raised in it comes out as it was, and not in an exception around it."""
    dcp: Any = import_module("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process is no news
        try:
            yield dcp
        except dcp.CheckpointException as error:  # also around Ctrl-C, and no Exception itself
            raise next(iter(error.failures.values()))[0] from error


def _hash(file: Path) -> list[Any]:
    """Size and sha256."""
    found, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            found.update(part)
            size += len(part)
    return [size, found.hexdigest()]


def _write_manifest(file: Path, content: dict[str, Any]) -> None:
    """As JSON, under a line with its hash."""
    text = json.dumps(content).encode()
    with file.open("wb") as stream:
        stream.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        stream.flush()
        os.fsync(stream.fileno())


def _read_manifest(file: Path) -> dict[str, Any]:
    found, _, text = file.read_bytes().partition(b"\n")
    if found.decode(errors="replace") != hashlib.sha256(text).hexdigest():
        raise Damaged(f"{MANIFEST} does not have the hash that it begins with")
    content: dict[str, Any] = json.loads(text)
    if content["format"] != 1:
        raise ValueError(
            f"{file} is of format {content['format']}, which this version of trainkit does not know: update trainkit, or give "
            "another path to begin anew"
        )
    return content


def _check_files(path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with the part of a checkpoint that this rank looks at, or ""; and its manifest."""
    try:
        manifest = _read_manifest(path / MANIFEST)
        for name, expected in sorted(manifest["files"].items())[this_rank() :: count_ranks()]:
            size, found = _hash(path / name)
            if size != expected[0]:
                raise Damaged(f"{name} has {size:,} bytes, and {expected[0]:,} were written")
            if found != expected[1]:
                raise Damaged(f"{name} does not have the hash of what was written")
    except (Damaged, OSError) as error:
        return str(error), {}
    return "", manifest


def _sync(folder: Path) -> None:
    """Has the names in a folder survive a loss of power, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reader(path: Path) -> Any:
    """torch.distributed.checkpoint's reader, with an unpickler that makes nothing but what ``.metadata`` is made of."""
    dcp: Any = import_module("torch.distributed.checkpoint")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name in _NAMES.get(module, ()):
                return super().find_class(module, name)
            if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
            if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
                return PurePath
            raise ValueError(
                f"{path / '.metadata'} asks for {module}.{name}, which no checkpoint needs: it is not loaded"
            )

    with (path / ".metadata").open("rb") as stream:
        metadata = Unpickler(stream).load()

    class Reader(dcp.FileSystemReader):  # type: ignore[misc]
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    return Reader(path)


_NAMES = {
    # Without BytesStorageMetadata: what is stored so is unpickled freely.
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}
