"""Every Python block of docs/ runs, in order, each page in one namespace with what its reader has.

Comments that do not show in a page tell what is needed besides:

    <!-- test: needs accelerate -->     the next block needs this package, or a name in one
    <!-- test: setup                    code that runs between two blocks
    ...
    -->
"""

import functools
import io
import json
import math
import pkgutil
import re
import socket
import subprocess
import sys
import tokenize
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import trainkit
from trainkit import Step

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# A block of code, or a comment to this test.
PIECE = re.compile(
    r"^```python\n(?P<block>.*?)^```$"
    r"|^<!-- test: (?:setup\n(?P<setup>.*?)|needs (?P<needs>\S+) )-->$",
    re.MULTILINE | re.DOTALL,
)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.LayerNorm(self.dense(x).tanh())


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(3, 4)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embeddings(x)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.head(x)


def what_the_reader_has():
    model, G, D = Encoder(), nn.Linear(2, 3), nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    return {
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "loss_fn": nn.functional.cross_entropy,
        "loader": [(torch.randn(4, 3), y) for _ in range(6)],
        "x": x,
        "y": y,
        "G": G,
        "D": D,
        "optimizer_g": torch.optim.AdamW(G.parameters(), fused=True),
        "optimizer_d": torch.optim.AdamW(D.parameters(), fused=True),
    }


@pytest.fixture
def as_torchrun_starts_it(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_there(name):
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_block_runs(page, as_torchrun_starts_it, monkeypatch, tmp_path):
    text = page.read_text()
    assert text.count("```python") == len(blocks_of(page)), "a block that PIECE does not find"
    monkeypatch.chdir(tmp_path)  # some of them write
    # This backend needs no C++ compiler.
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    torch.manual_seed(0)
    # A module, since what is made in it is looked up there, by pickle for one.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(what_the_reader_has())
    needed = []
    for piece in PIECE.finditer(text):
        if piece["needs"]:
            needed.append(piece["needs"])
            continue
        if piece["block"] and not all(map(is_there, needed)):
            needed.clear()
            continue
        if piece["block"]:
            needed.clear()
        code = piece["block"] or piece["setup"]
        line = text.count("\n", 0, piece.start("block" if piece["block"] else "setup"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            # No file has this name: torch.compile of 2.6 would read Python in the page.
            exec(compile("\n" * line + code, f"{page} ", "exec"), vars(module))
        for loop in re.findall(r"in (\w+)\.over\(", code):
            step = getattr(module, loop)
            assert isinstance(step, Step) and step.updates + step.skipped > 0


def blocks_of(page):
    return [piece["block"] for piece in PIECE.finditer(page.read_text()) if piece["block"]]


def without_comments(code):
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    left_out = (tokenize.COMMENT, tokenize.NL)
    return [token.string for token in tokens if token.type not in left_out]


def test_the_chinese_pages_are_those_of_the_quick_start_and_the_primitives():
    translated = {DOCS / "index.md", *(DOCS / "primitives").glob("*.md")}
    assert {page.relative_to(DOCS / "zh") for page in (DOCS / "zh").rglob("*.md")} == {
        p.relative_to(DOCS) for p in translated
    }
    for page in translated:
        ours, theirs = blocks_of(page), blocks_of(DOCS / "zh" / page.relative_to(DOCS))
        assert list(map(without_comments, ours)) == list(map(without_comments, theirs)), page


def test_the_time_of_an_update_is_the_one_that_was_measured_last():
    table = (
        (ROOT / "BENCHMARKS.md")
        .read_text()
        .partition("### An update alone")[2]
        .partition("###")[0]
        .splitlines()
    )
    (head,), (row,) = (
        [line.split("|") for line in table if word in line]
        for word in ("40 M", "**train_step, returning")
    )
    (cell,) = (cell for name, cell in zip(head, row, strict=True) if "40 M" in name)
    ratio = re.search(r"us, (\S+) ", cell)[1]
    for page, unit in {
        "README.md": "x",
        "docs/primitives/amp.md": " of the time",
        "docs/zh/primitives/amp.md": " 倍",
    }.items():
        (line,) = (
            line
            for line in (ROOT / page).read_text().splitlines()
            if re.search("40 M param|4000 万个参数", line)
        )
        assert ratio + unit in line, page


MIGRATION = (DOCS / "migration.md").read_text()


def trained(make_step):
    """The state of a model with a BatchNorm after some updates by the step that is made for it."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"stem": nn.Linear(3, 4), "bn": nn.BatchNorm1d(4), "head": nn.Linear(4, 1)}
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = make_step(
        model,
        optimizer,
        lambda x: model["head"](model["bn"](model["stem"](x)).relu()).pow(2).mean(),
    )
    for x in torch.randn(5, 6, 3, dtype=torch.float64):
        model.train()
        step(x)
    return model.state_dict()


def test_what_replaces_a_batch_norm_in_evaluation_mode_is_that_loop():
    def by_hand(model, optimizer, loss):
        def step(x):
            model["bn"].eval()
            loss(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def written(model, optimizer, loss):
        (call,) = re.findall(r"^\| `model\.bn\.eval\(\)` .* \| `(.*?)`", MIGRATION, re.MULTILINE)
        eval(call, {"freeze": trainkit.freeze, "model": model})
        return trainkit.train_step(optimizer)(loss)

    assert all(map(torch.equal, trained(by_hand).values(), trained(written).values()))


def test_what_replaces_clipping_by_value_is_that_loop():
    def clip(model):
        nn.utils.clip_grad_value_(model.parameters(), 0.01)

    def by_hand(model, optimizer, loss):
        return lambda x: (loss(x).backward(), clip(model), optimizer.step(), optimizer.zero_grad())

    def written(model, optimizer, loss):
        def step(x):
            yield loss(x)
            clip(model), optimizer.step(), optimizer.zero_grad()

        return trainkit.train_step(optimizer)(step)

    assert all(map(torch.equal, trained(by_hand).values(), trained(written).values()))
    assert (
        '| `gradient_clip_algorithm="value"` '
        "| `clip_grad_value_(parameters, 1.0)` below a `yield loss` |" in MIGRATION
    )


@pytest.mark.parametrize(
    "replaced", ["`scaler.get_scale() < before`", "`accelerator.optimizer_step_was_skipped`"]
)
def test_an_update_is_said_to_be_skipped_where_one_was_and_not_within_a_window(replaced):
    (said,) = re.findall(rf"^\| {re.escape(replaced)}.* \| `(.*?)`", MIGRATION, re.MULTILINE)
    found = []

    def make_step(model, optimizer, loss):
        step = trainkit.train_step(optimizer, trainkit.accumulate(2), max_norm=1.0)(
            lambda x: loss(x) * (math.nan if found else 1)
        )
        return lambda x: found.append(eval(said, {"result": step(x)}))

    trained(make_step)
    assert found == [False, True, False, True, False]


def test_the_reference_has_all_that_is_public():
    assert set(
        re.findall(r"^::: trainkit\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    ) == set(trainkit.__all__)


def anchors_of(page):
    """The anchors that mkdocs makes of headings; benchmarks.md shows BENCHMARKS.md."""
    text = (ROOT / "BENCHMARKS.md" if page == DOCS / "benchmarks.md" else page).read_text()
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_pages_lead_somewhere():
    """To a page, and to a heading of it where they name one; Chinese pages to English ones, too."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page}: {target}"
            if anchor and found.suffix == ".md":
                assert anchor in anchors_of(found), f"{page}: {target}"


def test_nobody_is_told_to_install_what_belongs_to_somebody_else():
    for page in PAGES:
        assert not re.search(
            r"(pip|uv|conda|poetry)\b.*\b(install|add) .*\btrainkit\b(?!/)", page.read_text()
        ), page


@pytest.mark.skipif(
    not (find_spec("material") and find_spec("mkdocstrings")),
    reason="needs the docs extra: `make docs`",
)
def test_the_site_is_built_without_a_warning(tmp_path):
    for config, folder in (("mkdocs.yml", "."), ("mkdocs.zh.yml", "zh")):
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
        command += ["--config-file", config, "--site-dir", tmp_path / folder]
        subprocess.run(command, cwd=ROOT, check=True)
    searched = json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]
    assert not any(re.search(r"[\u4e00-\u9fff]", entry["text"]) for entry in searched)
