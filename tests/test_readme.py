"""The README is short. Its code runs, scripts measure the same figures, and its links work."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest
import torch

import trainkit
from trainkit import accumulate, amp, train_step

ROOT = Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")
LINES = README.splitlines()
BEFORE, AFTER, SCRIPT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def run(code, space):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), space)
    return printed.getvalue()


def test_it_is_read_in_a_minute():
    assert len(LINES) <= 110
    assert max(map(len, (line for line in LINES if not line.startswith(("|", "!"))))) <= 120
    assert max(map(len, LINES)) <= 130
    assert len(SCRIPT.splitlines()) <= 20


def test_the_script_runs_as_it_stands_and_learns():
    space = {}
    epochs = run(SCRIPT, space).splitlines()
    losses = [float(re.search(r"loss (\S+),", line)[1]) for line in epochs]
    assert space["step"].updates + space["step"].skipped == 5 * 10 and losses[-1] < losses[0] / 2


def trained(code, batches):
    """The parameters after an epoch of a loop in the README, with what its reader has."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    space = {
        "torch": torch,
        "device": "cpu",
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "scaler": torch.amp.GradScaler("cpu"),
        "loss_fn": torch.nn.functional.cross_entropy,
        "loader": batches,
        "accumulate": accumulate,
        "amp": lambda: amp(dtype=torch.float16),
        "train_step": train_step,
    }
    run(code, space)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(("sizes", "agree"), [([4] * 8, True), ([4] * 6, False), ([9, 1], False)])
def test_the_two_loops_agree_but_for_what_is_wrong_in_the_first(sizes, agree):
    batches = [(torch.randn(size, 3), torch.arange(size) % 2) for size in sizes]
    before, after = trained(BEFORE, batches), trained(AFTER, batches)
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-5) == agree


def test_the_table_has_every_public_name():
    table = README[README.index("## The primitives") : README.index("## The folders")]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", table))))
    assert set(trainkit.__all__) <= named


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/recipes/kaggle.md"])
def test_commands_of_make_are_there(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = re.findall(r"(?:`|^)make (\w+)", (ROOT / page).read_text(), re.MULTILINE)
    assert found and set(found) <= set(targets)


def test_contributing_names_every_file():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = {line.split("|")[1].strip(" `/"): line for line in page.splitlines() if "/` |" in line}
    for path in (ROOT / "trainkit").glob("*/**/*.py"):
        if path.stem != "__init__":
            line = told[path.relative_to(ROOT / "trainkit").parts[0]]
            assert re.search(rf"\b{path.stem}\b", line.split("|")[2]), path


def test_links_lead_to_files_and_headings():
    for target in re.findall(r"\]\(([^)\s:]+)\)", README):
        path, _, anchor = target.partition("#")
        page = (ROOT / path).read_bytes()
        if anchor:
            titles = re.findall(r"^#+ (.*)", page.decode(), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, target


def test_the_gradient_errors_are_those_of_the_benchmark(benchmark, capsys):
    usual, exact = zip(*benchmark("gradient_error").main(), strict=True)
    stated = f"{round(100 * min(usual))} to {round(100 * max(usual))} %"
    assert README.count(f"off by {stated}") == 2 and max(exact) < 3e-15


def test_the_sizes_are_those_of_the_package(benchmark):
    """They are stated rounded up; a message says what they are now."""
    size = benchmark("size")
    folders, _ = size.package_sizes()
    measured = {
        r"The core is\s([\d,]+) lines of code": folders["trainkit/core"],
        r"the package ([\d,]+),": sum(folders.values()),
        r"the cell of `lift accumulate amp` ([\d,]+),": size.cell_size("accumulate", "amp")[0],
        r"of `lift frozen` ([\d,]+)\.": size.cell_size("frozen")[0],
    }
    for pattern, lines in measured.items():
        stated = int(re.search(pattern, README)[1].replace(",", ""))
        assert lines <= stated <= 1.03 * lines, f"{pattern}: now {lines:,}"
