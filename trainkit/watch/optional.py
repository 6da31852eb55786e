"""Optional packages, which trainkit imports only when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, needed_by: str) -> Any:
    """Import and return a module. The ImportError says how to install its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        advice = f"{needed_by} needs {package} ({error}): `pip install {package}`"
        raise ImportError(advice) from error
