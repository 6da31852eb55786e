"""Warnings that point at the user's line."""

from __future__ import annotations

import contextlib
import sys
import warnings


def warn(message: str) -> None:
    """Warn at the innermost line outside this package.

    A fixed ``stacklevel`` would be right for one way into a step, and wrong for the others. Lifted,
    the package is one file; pasted into a script, it is what runs inside functions.

    Source: ``find_stack_level`` of
    https://github.com/pandas-dev/pandas/blob/main/pandas/util/_exceptions.py
    """
    package = warn.__code__.co_filename.removesuffix("core/warning.py")  # or a lifted file
    ours = (package, contextlib.__file__)
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(ours) and frame.f_code.co_name != "<module>":
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
