"""Warnings that point at the line of the user, through however many calls of the package it was come to."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """``warnings.warn(message)`` of the innermost line that is not of this package.

    A step is called, closed by ``step.last``, entered by hand or asked for its next batch: a fixed ``stacklevel`` is right for
    one of these. Lifted, the package is the file that this stands in; and where that was pasted into a script, the line is the
    one outside of all functions.

    Source: ``find_stack_level`` of https://github.com/pandas-dev/pandas/blob/main/pandas/util/_exceptions.py
    """
    ours = warn.__code__.co_filename.removesuffix(
        "warning.py"
    )  # the folder of the package, or the file that this is lifted into
    level, frame = 1, sys._getframe()
    while (
        frame.f_code.co_filename.startswith(ours)
        and frame.f_code.co_name != "<module>"
        and frame.f_back is not None
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
