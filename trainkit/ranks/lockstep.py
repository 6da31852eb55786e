"""Loaders on several ranks: every rank gets as many batches as the rank with most."""

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

    A rank that has run out repeats its last batch, which counts nothing, so that the others need
    not wait for it.

    Before every window the ranks exchange two numbers in one collective: how many micro-batches
    they have for it, and whether they have more. A loader without a length is read ahead by a
    window and one batch, one with a length only at its end, where reading checks the length. If it
    is not known when the window closes, ranks exchange before every micro-batch.

    Args:
        window_length: returns the number of micro-batches in the next window, inf if not known.
        exchange: takes the numbers of this rank, returns those of all, int64 ``[ranks, numbers]``.
        last_batch: the batch before, if the pass is resumed and this rank may have no further one.

    Raises:
        ValueError: on every rank, if one of them has no batch at all, or no further one where
            loaders are iterated over again and again.
        RuntimeError: if a loader ends a window or more before its length.
    """
    size, seen, number = length_of(loader), 0, 0
    is_endless = size > sys.maxsize // 2
    iterator, ahead = iter(loader), deque[Any]()
    batch, has_more = last_batch, True
    while has_more:
        length = window_length()
        length = 1 if length == math.inf else int(length)
        wanted = length + 1 if size - seen <= length else int(batch is None)
        ahead.extend(itertools.islice(iterator, max(wanted - len(ahead), 0)))
        left = size - seen if len(ahead) == wanted <= length else len(ahead)
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
                    came = f"a loader of length {size} ended before batch {seen + 1}"
                    remedy = "and ranks wait for it: correct its `__len__`"
                    check(is_endless, RuntimeError, f"{came}, {remedy}")
                    left, size = i, seen  # ranks learn it in the next exchange
                else:
                    batch, seen = following, seen + 1
            # The loop may remove entries of its batch, which may have to be repeated.
            given = copy.copy(batch) if isinstance(batch, (MutableMapping, list)) else batch
            present = sum(count > i for count in counts) / len(counts)
            is_last = i + 1 == max(counts) and not has_more
            yield Delivery(given, is_last, number, present, i >= left)
            number += 1


_END = object()
