"""Loaders on several ranks: every rank gets as many batches as the longest loader has."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor

from trainkit.core.loop import Delivery, length_of
from trainkit.core.plan import check


def lockstep(
    loader: Iterable[Any],
    window_length: Callable[[], float],
    exchange: Callable[..., Tensor],
    last_batch: Any = None,
) -> Iterator[Delivery]:
    """Yield the same number of batches on every rank.

    A rank that has run out repeats its last batch, so that the others do not wait for it forever.
    The repeated batch counts nothing.

    Before every window the ranks exchange two numbers in one collective: how many micro-batches
    they have for the window, and whether they have more. In a window without a known length, they
    exchange before every micro-batch. A loader without a length is read ahead by a window and one
    batch. A loader with a length is read ahead only at its end, which checks the length.

    Args:
        window_length: returns the number of micro-batches in the next window, inf if unknown.
        exchange: takes two numbers of this rank, and returns an int64 tensor ``[ranks, 2]``.
        last_batch: the batch before the position of a resumed pass, to repeat if it was the last.

    Raises:
        ValueError: on every rank, if a rank has no batch at all, or if an endless loader ends.
        RuntimeError: if a loader ends a window or more before its length.
    """
    size, number = length_of(loader), 0
    is_endless = size > sys.maxsize // 2
    iterator, ahead = iter(loader), deque[Any]()
    batch, has_more = last_batch, True
    while has_more:
        length = window_length()
        length = 1 if length == math.inf else int(length)
        wanted = length + 1 if size - number <= length else int(batch is None)
        ahead.extend(itertools.islice(iterator, max(wanted - len(ahead), 0)))
        if len(ahead) < wanted:
            iterator = iter(())  # a loader may begin again after its end
        left = size - number if len(ahead) == wanted <= length else len(ahead)
        counts, more = exchange(min(left, length), left > length).T.tolist()
        has_more = any(more)
        if 0 in counts and (is_endless or (batch is None and any(counts))):
            missing = [rank for rank, count in enumerate(counts) if not count]
            call = "step.over(list(loader), updates=N)" if is_endless else "DistributedSampler(...)"
            raise ValueError(f"the loaders of ranks {missing} have no batch: `{call}`")
        for i in range(max(counts)):
            if i < left:
                following = ahead.popleft() if ahead else next(iterator, _END)
                if following is _END:
                    fault = f"a loader of length {size} ended before batch {number + 1}"
                    remedy = "and ranks wait for it: correct its `__len__`"
                    check(is_endless, RuntimeError, f"{fault}, {remedy}")
                    left, size = i, number  # the next exchange tells all ranks
                else:
                    batch = following
            # A copy: the loop may remove entries of a batch that is repeated later.
            given = copy.copy(batch) if isinstance(batch, (MutableMapping, list)) else batch
            present = sum(count > i for count in counts) / len(counts)
            is_last = i + 1 == max(counts) and not has_more
            yield Delivery(given, is_last, number, present, i >= left)
            number += 1


_END = object()
