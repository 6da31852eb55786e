"""Fine-tunes an encoder with three loops in turns, and compares them: make demo

    python examples/compare.py             three to four minutes on two CPU cores
    python examples/compare.py --quick     the same on fewer sentences, in less than one

| loop | file | settings |
|---|---|---|
| plain | ``plain_loop.py`` | float32, dropout, padding to 64 tokens, every layer trained |
| by hand | ``by_hand_loop.py`` | the settings of trainkit, written out |
| trainkit | ``wrapped_loop.py`` | bfloat16, no dropout, little padding, two layers of six frozen |

All three begin with the same weights and train on the same sentences. The loops by hand and with
trainkit get the same micro-batches in the same order, so that their losses should be equal. The
loops take turns of a few windows, in changing order, so that a busy machine is fair to all.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

# Without it the profiler reports that it starts and stops. torch reads this when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import by_hand_loop
import plain_loop
import torch
import wrapped_loop
from sentiment import (
    LONGEST,
    TokenBatches,
    accuracy,
    load,
    new_model,
    new_parser,
    new_task,
    settings,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm import tqdm
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

SLICES = 24  # turns of each loop


class PlainArm:
    """The plain loop as people have it: four sentences in a micro-batch, four of these a window."""

    loop, window, attention = staticmethod(plain_loop.train), 4, "sdpa"

    def __init__(self, task, seed):
        order = RandomSampler(task.rows, generator=torch.Generator().manual_seed(seed))
        self.task, self.batches = task, BatchSampler(order, 4, drop_last=False)

    def load(self, batches):
        """Return a loader of padded micro-batches."""
        collate = DataCollatorWithPadding(self.task.tokenizer, "max_length", LONGEST)
        return DataLoader(self.task.rows, batch_sampler=batches, collate_fn=collate)

    def start(self, model, batches, epochs=1, recorder=None):
        """Return an iterator that trains for one window at a time, and gives its loss."""
        optimizer = recorder or torch.optim.AdamW(model.parameters(), lr=5e-5)
        return self.loop(model, self.load(batches), optimizer, epochs=epochs, n=self.window)


class TunedArm:
    """The loop by hand or with trainkit: the same settings, and the same micro-batches."""

    def __init__(self, loop, task, seed, fit):
        self.loop, self.task, self.fit = loop, task, fit
        self.window, self.attention = fit.window, fit.attention
        self.batches = TokenBatches(task.rows, fit.tokens, seed)

    def load(self, batches):
        """Return a loader of padded micro-batches."""
        return load(batches, self.task.rows, self.task.tokenizer)

    def start(self, model, batches, epochs=1, recorder=None):
        """Return an iterator that trains for one window at a time, and gives its loss."""
        optimizer = recorder or torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
        updates = windows_in(self, batches) * epochs
        schedule = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
        max_norm = math.inf if recorder else 1.0  # so that a recorder gets the whole gradient
        options = {"epochs": epochs, "n": self.window, "dtype": self.fit.dtype}
        return self.loop(
            model, self.load(batches), optimizer, schedule, max_norm=max_norm, **options
        )


def windows_in(arm, batches):
    return math.ceil(len(batches) / arm.window)


def train_in_turns(runs, windows, wait):
    """Train with all loops, a slice at a time. Return the losses, and the seconds of each slice."""
    clock = time.perf_counter if wait else time.process_time
    losses, seconds = {name: [] for name in runs}, {name: [] for name in runs}
    slices = min(SLICES, *windows.values())
    orders = itertools.cycle(itertools.permutations(runs))
    # Each loop has its own random state. A GPU's is for dropout, which only the plain loop has.
    random_states = dict.fromkeys(runs, torch.get_rng_state())
    for number in tqdm(range(slices), desc="training"):
        for name in next(orders):
            begin, end = (windows[name] * i // slices for i in (number, number + 1))
            torch.set_rng_state(random_states[name])
            start = clock()
            # The last slice also runs what stands behind the last window of a loop.
            count = end - begin if number + 1 < slices else None
            found = torch.stack(list(itertools.islice(runs[name], count)))
            losses[name] += found.tolist()  # waits for the device, so that the clock is right
            seconds[name].append(clock() - start)
            random_states[name] = torch.get_rng_state()
    return losses, seconds


def peak_memory(arm, model, batches):
    """Return how many MiB tensors take at most: parameters, gradients, moments, activations."""
    if model.device.type == "cuda":
        others = torch.cuda.memory_allocated() - memory_of(model)
        torch.cuda.reset_peak_memory_stats()
        list(arm.start(model, batches))
        return (torch.cuda.max_memory_allocated() - others) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        list(arm.start(model, batches))
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]  # left by an earlier profile
    most = max(change["Total Allocated"] for change in changes) - before
    return (most + memory_of(model)) / 2**20  # the profiler does not count what was there before


def memory_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients of its updates, and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.gradients = []

    def step(self):
        self.gradients.append(all_gradients(self.param_groups[0]["params"]))


def all_gradients(parameters):
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def gradient_error(arm, model, batches):
    """Return the relative L2 distance of the worst window's gradient from the full batch's.

    The loop itself runs, with a model in float64 and an optimizer that keeps the gradients.
    """
    model.double()
    recorder = Recorder(model.parameters())
    list(arm.start(model, batches, recorder=recorder))
    errors = []
    windows = range(0, len(batches), arm.window)
    for begin, gradient in zip(windows, recorder.gradients, strict=True):
        rows = list(itertools.chain.from_iterable(batches[begin : begin + arm.window]))
        (full_batch,) = arm.load([rows])
        model.zero_grad()
        model(**full_batch).loss.backward()
        true = all_gradients(model.parameters())
        errors.append(((gradient - true).norm() / true.norm()).item())
    return max(errors)


def lines_of(loop):
    """Return how many lines a loop has, without comments, its docstring and blank lines."""
    lines = [line.strip() for line in inspect.getsource(loop).splitlines()]
    return sum(not line.startswith(("#", '"""')) for line in lines if line)


def compare(task, options, device):
    """Train with the three loops. Return the measurements of each."""
    fit = settings(device)
    arms = {
        "plain": PlainArm(task, options.seed),
        "by hand": TunedArm(by_hand_loop.train, task, options.seed, fit),
        "trainkit": TunedArm(wrapped_loop.train, task, options.seed, fit),
    }
    found, models, runs, windows = {}, {}, {}, {}
    for name, arm in arms.items():
        batches = list(arm.batches)  # of one epoch
        last = batches[-arm.window - (len(batches) % arm.window or arm.window) :]
        found[name] = {
            "lines": lines_of(arm.loop),
            "error": gradient_error(arm, check_model(task, options), last),
            "memory": peak_memory(
                arm, new_model(task, options, arm.attention).to(device), batches[: 3 * arm.window]
            ),
        }
        models[name] = new_model(task, options, arm.attention).to(device)
        runs[name] = arm.start(models[name], arm.batches, options.epochs)
        windows[name] = windows_in(arm, batches) * options.epochs
    # ``last`` is of the loops by hand and with trainkit, whose micro-batches differ in rows.
    uneven = gradient_error(arms["plain"], check_model(task, options), last)
    losses, seconds = train_in_turns(runs, windows, wait=device.type != "cpu")
    for name, model in models.items():
        found[name] |= {"losses": losses[name], "seconds": seconds[name]}
        found[name]["accuracy"] = accuracy(model, task)
    found["plain"]["uneven error"] = uneven
    return found


def check_model(task, options):
    return new_model(task, options, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def print_table(found, clock):
    """Print the measurements as a table, and how equal the losses are."""
    print(f"\n| | {clock} | / by hand | accuracy | peak memory | lines | gradient error |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        pairs = zip(row["seconds"], found["by hand"]["seconds"], strict=True)
        low, middle, high = quartiles(mine / theirs for mine, theirs in pairs)
        print(
            f"| {name} | {sum(row['seconds']):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['accuracy']:.3f} | {row['memory']:,.0f} MiB | {row['lines']} "
            f"| {row['error']:.2g} |"
        )
    pairs = zip(found["by hand"]["losses"], found["trainkit"]["losses"], strict=True)
    apart = max(abs(mine - theirs) / theirs for mine, theirs in pairs)
    print(
        "\n/ by hand: time of a slice over the time of the same slice by hand, with quartiles."
        "\nGradient error: of the worst of the last two windows, against the full batch, float64; "
        f"plain, given the micro-batches of the others: {found['plain']['uneven error']:.2f}."
        f"\nLosses of {len(found['trainkit']['losses'])} windows, trainkit and by hand: "
        f"{apart:.1e} apart at most."
    )


def quartiles(values):
    values = list(values)
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def draw(found, sentences, path):
    """Draw the losses, each a mean over the last eighth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = {"plain": ("C7", "-", 2), "by hand": ("C1", "-", 5), "trainkit": ("C0", "-", 1.5)}
    for name, (color, line, width) in styles.items():
        losses = torch.tensor(found[name]["losses"])
        span = max(1, len(losses) // 8)
        means = losses.unfold(0, span, 1).mean(1)
        seen = torch.linspace(sentences * span / len(losses), sentences, len(means))
        axis.plot(seen, means, line, color=color, linewidth=width, label=name)
    axis.set(xlabel="sentences", ylabel="training loss, mean over an eighth of the run")
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"Loss curves: {path}")


def main():
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="250 sentences, 500 held out: too few to learn much"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="several runs; default: --seed")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="folder for the loss curves"
    )
    options = parser.parse_args()
    if options.quick:
        options.train, options.evaluate = 250, 500
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    clock = "seconds of CPU time" if device.type == "cpu" else "seconds"
    for seed in options.seeds or [options.seed]:
        options.seed = seed
        task = new_task(options)
        print(
            f"seed {seed}: training on {len(task.rows):,} sentences, {len(task.held_out):,} others "
            f"held out; {device}, {torch.get_num_threads()} threads",
            flush=True,
        )
        found = compare(task, options, device)
        print_table(found, clock)
        draw(found, len(task.rows) * options.epochs, options.output / f"compare_{seed}.png")


if __name__ == "__main__":
    main()
