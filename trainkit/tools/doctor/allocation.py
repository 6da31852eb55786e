"""How much memory of a CPU something takes: torch counts it for its accelerators, and here only while it is profiled."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated_by(function: Callable[[], Any]) -> int:
    """The most bytes of CPU memory that torch had allocated at once while a function ran, over what it had before.

    Memory from before that the function frees is not taken off. Source:
    https://docs.pytorch.org/docs/stable/profiler.html, ``profile_memory`` and ``export_chrome_trace``
    """
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [
        event["args"]
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    totals = [change["Total Allocated"] for change in changes]
    return (
        max(totals) - (totals[0] - changes[0]["Bytes"]) if changes else 0
    )  # torch counts on from one profile to the next


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the profiler from writing to stderr, which it does by file descriptor and at every log level."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
