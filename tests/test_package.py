"""What the package promises about itself."""

import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import trainkit


def loaded_by(statement):
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_only_torch_and_the_standard_library_are_imported():
    foreign = (
        {name.partition(".")[0] for name in loaded_by("import trainkit")}
        - set(sys.stdlib_module_names)
        - {"trainkit", "torch"}
    )
    assert not foreign


def test_what_only_some_need_is_imported_when_they_do():
    loaded = loaded_by("import trainkit")
    assert not {"torch.distributed.checkpoint", "tqdm", "matplotlib", "pandas"} & set(loaded)


def test_imports_run_one_way(monkeypatch):
    """Importing a file alone must not bring in one that stands above it; the package's own __init__ is left out for that."""

    def loaded_with(name):
        package = types.ModuleType("trainkit")
        package.__path__ = trainkit.__path__
        with monkeypatch.context() as patch:
            for module in [m for m in sys.modules if m.partition(".")[0] == "trainkit"]:
                patch.delitem(sys.modules, module)
            patch.setitem(sys.modules, "trainkit", package)
            importlib.import_module(f"trainkit.{name}")
            found = {m.removeprefix("trainkit.") for m in sys.modules if m.startswith("trainkit.")}
            for module in found:
                del sys.modules[f"trainkit.{module}"]
        return found

    above = {
        "layers": {"layers"},
        "batches": {"batches"},
        "freezing": {"layers", "freezing"},
        "recomputation": {"layers", "recomputation"},
        "update": {"update"},
        "window": {"window"},
        "loaders": {"loaders"},
        "losses": {"losses", "window"},
        "plan": {"plan"},
        "allocation": {"allocation"},
        "machine": {"machine", "plan"},
        "targets": {"targets", "plan"},
        "parallel": {"parallel"},
        "precautions": {"precautions", "parallel", "plan", "warning"},
        "gradients": {"gradients", "plan"},
        "backward": {"backward"},
        "generators": {"generators"},
        "scaler": {
            "scaler",
            "answer",
            "gradients",
            "parallel",
            "plan",
            "precautions",
            "update",
            "warning",
            "window",
        },
        "result": {"result", "window"},
        "answer": {"answer"},
        "readings": {"readings", "answer", "window"},
        "progress": {"progress", "answer", "batches", "loaders", "parallel", "readings", "window"},
        "plots": {"plots", "answer", "readings", "window"},
        "summary": {"summary", "layers"},
        "randomness": {"randomness", "plan"},
        "storage": {"storage", "parallel", "plan", "warning"},
        "warning": {"warning"},
        "places": {"places", "loaders", "parallel", "plan", "randomness"},
    }
    above["step"] = {
        "step",
        "backward",
        "batches",
        "generators",
        "loaders",
        "losses",
        "progress",
        "readings",
        "result",
    }
    above["step"] |= above["scaler"]
    above["history"] = {"history", "plots"} | above["step"]
    above["compose"] = {"compose", *above["step"]}
    above["parts"] = {"parts", *above["compose"]}
    above["microbatching"] = {"microbatching", *above["compose"]}
    above["states"] = {"states", "layers", "randomness"} | above["step"]
    above["checkpointing"] = (
        {"checkpointing"} | above["states"] | above["places"] | above["storage"]
    )
    for name, allowed in above.items():
        assert loaded_with(name) == allowed, name


def test_nothing_else_is_public():
    assert sorted(trainkit.__all__) == [
        "History",
        "Step",
        "StepResult",
        "accumulate",
        "amp",
        "freeze",
        "frozen",
        "frozen_parameters",
        "microbatch",
        "model_summary",
        "recompute",
        "resumable",
        "train_step",
        "trainable_parameters",
        "unfreeze",
    ]
    assert all(getattr(trainkit, name).__doc__ for name in trainkit.__all__)


def test_every_file_stands_in_the_readme():
    package = Path(trainkit.__file__).parent
    listed = re.findall(
        r"(\w+)\.py\b", (package.parent / "README.md").read_text().partition("## The files")[2]
    )
    files = [path.stem for path in package.glob("*.py") if not path.stem.startswith("__")]
    assert sorted(set(listed) - {"test_package"}) == sorted(files)
