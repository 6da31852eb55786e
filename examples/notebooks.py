"""Lift, run and save the notebooks of this folder again, with small outputs: make notebooks

python examples/notebooks.py            all of them, in place
python examples/notebooks.py tour       one of them
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from trainkit.tools.lift import lift

HERE = Path(__file__).parent
HEAD = "%%writefile trainkit.py\n"
# A cell that opens collapsed: on Kaggle, and in Jupyter.
COLLAPSED = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}


def lifted(source):
    """Return a cell; if it writes trainkit.py, what the command in its first line prints now."""
    if not source.startswith(HEAD):
        return source
    words = re.search(r"`python -m trainkit lift ([^`]*)` prints", source)[1].split()
    names = [word for word in words if not word.startswith("--")]
    return HEAD + lift(names, docs="--docs" in words, bare="--bare" in words).rstrip("\n")


def smaller(picture):
    """Return the same picture in at most 64 colours, which is a third of the size."""
    found = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).quantize(64).save(found, "png", optimize=True)
    return base64.b64encode(found.getvalue()).decode()


def run(path, folder):
    """Return the notebook after its cells were lifted and run in an empty folder.

    Lifted cells are collapsed. Raises the exception of a cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = lifted(cell.source)
    shell = {
        key: value for key, value in os.environ.items() if key != "MPLBACKEND"
    }  # without pictures, where a Makefile says so
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute(
        env=shell
    )
    for cell in notebook.cells:
        cell.metadata = COLLAPSED if cell.source.startswith(HEAD) else {}
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata.get("language_info", {}).pop("version", None)
    return notebook


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(run(path, folder), path)
            print(f"{path.name}: {path.stat().st_size / 2**10:.0f} KiB")
