"""Sixteen public training loops, rebuilt small: by hand and with trainkit, on the same trajectory.

Models and data are tiny. What is kept is what a loop accumulates, clips, scales and schedules, also
where the original is wrong. The last part measures patterns of public loops that are wrong, and
holds docs/migration.md to the figures.
"""

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from oracles import distance, loss_of, make_model, windows_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from trainkit import accumulate, amp, frozen, microbatch, train_step


def randn(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape, seed=5):
    return torch.randint(1, 11, shape, generator=torch.Generator().manual_seed(seed))


ROWS = list(zip(randn(13, 4, 4).unbind(), randn(13, 4, 3, seed=6).unbind(), strict=True))
TEXT = list(tokens(12, 3, 6).unbind())
# Autocast leaves float64 alone: what is left of these is the loss scale.
SCALED = amp(dtype=torch.float16, init_scale=1024.0, growth_interval=2)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, ids):
        return self.hidden(self.embedding(ids)).tanh() @ self.embedding.weight.T

    def loss(self, ids):
        return F.cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def agree(make, by_hand, ours, bound=1e-10):
    """Both loops leave the same parameters and buffers, and tell the same numbers, at each note."""
    trajectories = []
    for loop in (by_hand, ours):
        torch.manual_seed(3)
        model, notes = make().double(), []

        def note(*numbers, model=model, notes=notes):
            found = [*model.parameters(), *model.buffers(), *numbers]
            notes += [torch.as_tensor(one, dtype=torch.float64).detach().clone() for one in found]

        loop(model, note)
        note()
        trajectories.append(notes)
    assert distance(*reversed(trajectories)) <= bound


def adamw(model, lr=0.01, **options):
    return torch.optim.AdamW(model.parameters(), lr=lr, **options)


def average_of(model):
    """An average of the weights that is part of the model: what is noted sees it, too."""
    for name, parameter in list(model.named_parameters()):
        model.register_buffer("ema_" + name.replace(".", "_"), parameter.detach().clone())

    def update(decay=0.9):
        for name, parameter in model.named_parameters():
            getattr(model, "ema_" + name.replace(".", "_")).lerp_(parameter.detach(), 1 - decay)

    return update


def test_nanogpt():
    """karpathy/nanoGPT, train.py: the loop sets the learning rate; loss / n, unscale_, clip."""

    def lr_of(i):
        return 0.01 * (i + 1) / 2 if i < 2 else 0.005 * (1 + math.cos(math.pi * i / 4))

    def optimizer_of(model):
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = {"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))

    def by_hand(model, note):
        optimizer, scaling, batches = optimizer_of(model), scaler(), iter(TEXT)
        for i in range(4):
            for group in optimizer.param_groups:
                group["lr"] = lr_of(i)
            for _ in range(3):
                scaling.scale(model.loss(next(batches)) / 3).backward()
            scaling.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.3)
            scaling.step(optimizer)
            scaling.update()
            optimizer.zero_grad(set_to_none=True)
            note(scaling.get_scale())

    def ours(model, note):
        optimizer, batches = optimizer_of(model), iter(TEXT)
        step = train_step(optimizer, accumulate(3), SCALED, max_norm=0.3)(model.loss)
        for i in range(4):
            for group in optimizer.param_groups:
                group["lr"] = lr_of(i)
            for _ in range(3):
                step(next(batches))
            note(step.loss_scale)

    agree(LanguageModel, by_hand, ours)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz (https://kellerjordan.github.io/posts/muon)."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])
                x /= x.norm() + 1e-7
                for _ in range(3):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                p.sub_(x, alpha=group["lr"])


def test_nanochat():
    """karpathy/nanochat, scripts/base_train.py: two optimizers, schedules for each, no clipping."""

    def optimizers_of(model):
        optimizers = [
            torch.optim.AdamW([model.embedding.weight, model.hidden.bias], lr=0.02),
            Muon([model.hidden.weight], lr=0.05),
        ]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return optimizers

    def schedule(optimizers, i):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - i / 4)
        optimizers[1].param_groups[0]["momentum"] = 0.85 + 0.03 * i

    def by_hand(model, note):
        optimizers, batches = optimizers_of(model), iter(TEXT)
        for i in range(4):
            for _ in range(3):
                loss = model.loss(next(batches))
                (loss / 3).backward()
            schedule(optimizers, i)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            note(loss)

    def ours(model, note):
        optimizers, batches = optimizers_of(model), iter(TEXT)
        step = train_step(optimizers, accumulate(3))(model.loss)
        for i in range(4):
            schedule(optimizers, i)
            for _ in range(3):
                result = step(next(batches))
            note(result.loss)

    agree(LanguageModel, by_hand, ours, bound=0)


def regression():
    return make_model()


def test_mae():
    """facebookresearch/mae, engine_pretrain.py: a learning rate for fractions of epochs; a random
    mask; ``zero_grad`` where an epoch begins drops what the epoch before has left."""

    def loss_of_masked(model, x, y):
        mask = torch.rand(len(x)) < 0.75
        return ((model(x) - y).square().mean(dim=1) * mask).sum() / mask.sum().clamp(min=1)

    def set_lr(optimizer, at):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, at)

    def by_hand(model, note):
        optimizer, n = adamw(model, betas=(0.9, 0.95)), 4
        for epoch in range(2):
            optimizer.zero_grad()
            for i, (x, y) in enumerate(ROWS):  # 13, of which one is dropped
                if i % n == 0:
                    set_lr(optimizer, i / len(ROWS) + epoch)
                loss = loss_of_masked(model, x, y)
                loss /= n
                loss.backward()
                if (i + 1) % n == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    note()

    def ours(model, note):
        optimizer, n = adamw(model, betas=(0.9, 0.95)), 4
        step = train_step(optimizer, accumulate(n))(lambda x, y: loss_of_masked(model, x, y))
        for epoch in range(2):
            for i, (x, y) in enumerate(ROWS):
                if i % n == 0:
                    set_lr(optimizer, i / len(ROWS) + epoch)
                if step(x, y).complete:
                    note()
            step.discard()

    agree(regression, by_hand, ours, bound=0)


def test_yolov5():
    """ultralytics/yolov5, train.py: sums of losses; the length of a window is warmed up, like the
    learning rate and the momentum; clipping at 10; an EMA. ``zero_grad`` where an epoch begins does
    not reset the count of batches since the last update."""

    def warm_up(optimizer, ni):
        share = min(1.0, ni / 6)
        for j, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * share + (0.1 if j else 0.0) * (1 - share)
            group["momentum"] = 0.8 + 0.137 * share
        return max(1, round(1 + 3 * share))

    def optimizer_of(model):
        groups = [{"params": [p for p in model.parameters() if (p.dim() < 2) == is_bias]}
                  for is_bias in (False, True)]  # fmt: skip
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)

    def by_hand(model, note):
        optimizer, scaling, update_ema, last = optimizer_of(model), scaler(), average_of(model), -1
        for epoch in range(2):
            optimizer.zero_grad()
            for i, (x, y) in enumerate(ROWS):
                ni = i + len(ROWS) * epoch
                n = warm_up(optimizer, ni)
                scaling.scale(F.mse_loss(model(x), y) * len(x)).backward()
                if ni - last >= n:
                    scaling.unscale_(optimizer)
                    norm = clip_grad_norm_(model.parameters(), 10.0)
                    scaling.step(optimizer)
                    scaling.update()
                    optimizer.zero_grad()
                    update_ema()
                    last = ni
                    note(norm)

    def ours(model, note):
        optimizer, last = optimizer_of(model), -1
        parts = accumulate(None, reduction="sum"), SCALED

        @train_step(optimizer, *parts, max_norm=10.0, after=average_of(model))
        def step(x, y):
            return F.mse_loss(model(x), y) * len(x)

        for epoch in range(2):
            step.discard()
            for i, (x, y) in enumerate(ROWS):
                ni = i + len(ROWS) * epoch
                n = warm_up(optimizer, ni)
                step(x, y)
                if ni - last >= n:
                    result, last = step.close(), ni
                    note(result.grad_norm)

    agree(regression, by_hand, ours)


def test_timm():
    """huggingface/pytorch-image-models, train.py: the last window is divided by its own length; the
    scheduler and the EMA count updates."""
    loader, n = ROWS[:10], 4

    def lr_of(updates):
        return 0.01 * (1 + math.cos(math.pi * updates / 6)) / 2

    def by_hand(model, note):
        optimizer, update_ema, updates = adamw(model), average_of(model), 0
        for _ in range(2):
            accum_steps, last_steps = n, len(loader) % n
            optimizer.zero_grad()
            for i, (x, y) in enumerate(loader):
                need_update = i == len(loader) - 1 or (i + 1) % accum_steps == 0
                if i >= len(loader) - last_steps:
                    accum_steps = last_steps
                loss = F.mse_loss(model(x), y)
                (loss / accum_steps).backward()
                if not need_update:
                    continue
                clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                updates += 1
                optimizer.zero_grad()
                update_ema()
                optimizer.param_groups[0]["lr"] = lr_of(updates)
                note(updates)

    def ours(model, note):
        optimizer = adamw(model)

        def schedule():
            optimizer.param_groups[0]["lr"] = lr_of(step.updates)

        @train_step(optimizer, accumulate(n), max_norm=0.5, after=[average_of(model), schedule])
        def step(x, y):
            return F.mse_loss(model(x), y)

        for _ in range(2):
            for x, y in step.over(loader):
                if step(x, y).updated:
                    note(step.updates)

    agree(regression, by_hand, ours)


class AWP:
    """Adversarial weight perturbation as notebooks have it, without the ``zero_grad``."""

    def __init__(self, model):
        self.model, self.saved = model, {}

    def attack(self):
        for name, p in self.model.named_parameters():
            if p.grad is None or "weight" not in name:
                continue
            self.saved[p] = found = p.data.clone()
            bound = 0.05 * found.abs()
            p.data.add_(0.5 * p.grad / (p.grad.norm() + 1e-6) * (found.norm() + 1e-6))
            p.data = torch.min(torch.max(p.data, found - bound), found + bound)

    def restore(self):
        for p, found in self.saved.items():
            p.data = found
        self.saved.clear()


def test_a_deberta_of_kaggle_with_awp():
    """furu-kaggle/feedback_local, src/awp.py and its loop: after each backward a second one where
    the weights are worse along the gradient so far; unscale_, clip, a scheduler of updates."""

    def scheduled(model):
        optimizer = adamw(model)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)

    def by_hand(model, note):
        (optimizer, scheduler), scaling, attacker = scheduled(model), scaler(), AWP(model)
        for i, batch in enumerate(ROWS[:12], 1):
            scaling.scale(loss_of(model, batch) / 3).backward()
            attacker.attack()
            scaling.scale(loss_of(model, batch) / 3).backward()
            attacker.restore()
            if i % 3 == 0:
                scaling.unscale_(optimizer)
                norm = clip_grad_norm_(model.parameters(), 0.5)
                scaling.step(optimizer)
                scaling.update()
                optimizer.zero_grad()
                scheduler.step()
                note(norm)

    def ours(model, note):
        (optimizer, scheduler), attacker = scheduled(model), AWP(model)
        parts = accumulate(3), SCALED
        step = train_step(optimizer, *parts, max_norm=0.5, after=scheduler.step)
        for batch in step.over(ROWS[:12]):
            with step as result:
                step.backward(loss_of(model, batch))
                attacker.attack()
                step.backward(loss_of(model, batch))
                attacker.restore()
            if result.updated:
                note(result.grad_norm)

    agree(regression, by_hand, ours)


def endless(loader):
    while True:
        yield from loader


def test_denoising_diffusion():
    """lucidrains/denoising-diffusion-pytorch, Trainer.train: updates over an endless loader; the
    loss of a window is summed up; clipping; an EMA."""

    def loss(model, x):
        noise, t = torch.randn_like(x), torch.rand(len(x), 1, dtype=x.dtype)
        return F.mse_loss(model(x.lerp(noise, t)), noise[:, :3])

    loader = [x for x, _ in ROWS[:5]]

    def by_hand(model, note):
        optimizer, update_ema, batches = adamw(model), average_of(model), endless(loader)
        for _ in range(4):
            total = 0.0
            for _ in range(2):
                part = loss(model, next(batches)) / 2
                total += part.item()
                part.backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            update_ema()
            note(total)

    def ours(model, note):
        parts = {"max_norm": 0.5, "after": average_of(model)}
        step = train_step(adamw(model), accumulate(2), **parts)(lambda x: loss(model, x))
        for x in step.over(loader, updates=4):
            if (result := step(x)).updated:
                note(result.window_loss)

    agree(regression, by_hand, ours)


def test_enwik8():
    """lucidrains/x-transformers, train_enwik8: a loop that is no function, with a validation."""

    def validated(model):
        model.eval()
        with torch.no_grad():
            loss = model.loss(TEXT[-1])
        model.train()
        return loss

    def by_hand(model, note):
        optimizer, batches = torch.optim.Adam(model.parameters(), lr=0.01), iter(TEXT)
        for _ in range(5):
            for _ in range(2):
                loss = model.loss(next(batches))
                (loss / 2).backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            note(validated(model))

    def ours(model, note):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        step = train_step(optimizer, accumulate(2), max_norm=0.5)
        for ids in step.over(TEXT[:10]):
            with step as result:
                step.backward(model.loss(ids))
            validation = validated(model)  # in an open window, too
            if result.updated:
                note(validation)

    agree(LanguageModel, by_hand, ours)


@pytest.mark.parametrize("is_sum", [True, False], ids=["as it is", "a mean"])
def test_guided_diffusion(is_sum):
    """openai/guided-diffusion, train_util.py: a batch in micro-batches whose means are added up;
    weights of the sampled times; a linear schedule; an EMA. ``microbatch`` has the mean."""

    def losses(model, x, y, weights):
        return ((model(x) - y).square().mean(dim=1) * weights).mean()

    batches = [
        (torch.cat([a, c]), torch.cat([b, d]), randn(8, seed=7).abs())
        for (a, b), (c, d) in itertools.pairwise(ROWS[:6])
    ]

    def by_hand(model, note):
        optimizer, update_ema = adamw(model), average_of(model)
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            for start in range(0, 8, 2):
                chunk = [part[start : start + 2] for part in batch]
                (losses(model, *chunk) / (1 if is_sum else 4)).backward()
            optimizer.step()
            update_ema()
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - (i + 1) / 5)
            note()

    def ours(model, note):
        optimizer = adamw(model)
        part = accumulate(None, reduction="sum") if is_sum else microbatch(2)
        step = train_step(optimizer, part, after=average_of(model))(
            lambda *chunk: losses(model, *chunk)
        )
        for i, batch in enumerate(batches):
            if is_sum:
                for start in range(0, 8, 2):
                    step(*[part[start : start + 2] for part in batch])
                assert step.close().updated
            else:
                step(*batch)
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - (i + 1) / 5)
            note()

    agree(regression, by_hand, ours)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(3, 3)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def features(self, batch):
        images, texts = batch
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)

    def loss(self, images, texts):
        logits, target = self.log_scale.exp() * images @ texts.T, torch.arange(len(images))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def test_open_clip():
    """mlfoundations/open_clip, train_one_epoch with --accum-freq: cached features; the loss of all
    of them once for each micro-batch, added up; the scale is clamped after each update."""

    def losses(model, window):
        """The loss of all features, with the graph of one micro-batch after the other."""
        with torch.no_grad():
            cached = [model.features(batch) for batch in window]
        for j, batch in enumerate(window):
            features = [*cached[:j], model.features(batch), *cached[j + 1 :]]
            yield model.loss(*(torch.cat(side) for side in zip(*features, strict=True)))

    def clamp(model):
        with torch.no_grad():
            model.log_scale.clamp_(0, 2.01)

    model, window = Pair().double(), ROWS[:3]
    seen = gradient(losses(model, window), model)
    large = gradient(
        [model.loss(*model.features([torch.cat(side) for side in zip(*window, strict=True)]))],
        model,
    )
    times = torch.tensor(
        [3.0 if p is model.log_scale else 1.0 for p in model.parameters() for _ in range(p.numel())]
    )
    assert off(seen, large * times) <= 1e-12  # the large batch, but for the scale

    def by_hand(model, note):
        optimizer = adamw(model)
        for window in windows_of(ROWS[:12], 3):
            optimizer.zero_grad()
            for loss in losses(model, window):
                loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            clamp(model)
            note()

    def ours(model, note):
        parts = {"max_norm": 1.0, "after": lambda: clamp(model)}
        step = train_step(adamw(model), accumulate(3, reduction="sum"), **parts)
        for window in windows_of(ROWS[:12], 3):
            for loss in losses(model, window):
                with step:
                    step.backward(loss)
            note()

    agree(Pair, by_hand, ours)


def test_ppo():
    """vwxyzjn/cleanrl, ppo.py: epochs over shuffled minibatches, three terms, clipping; the loop is
    left where the policy has moved too far."""

    def make():
        return nn.ModuleDict({"actor": make_model(), "critic": nn.Linear(4, 1)})

    def losses(model, batch):
        x, actions, advantages, returns, before = batch
        policy = torch.distributions.Categorical(logits=model["actor"](x))
        ratio_log = policy.log_prob(actions) - before
        ratio, kl = ratio_log.exp(), ((ratio_log.exp() - 1) - ratio_log).mean()
        clipped = ratio.clamp(0.8, 1.2)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
        value_loss = 0.5 * (model["critic"](x).squeeze(1) - returns).square().mean()
        return policy_loss - 0.01 * policy.entropy().mean() + 0.5 * value_loss, kl

    def rollout(model):
        x = torch.randn(16, 4, dtype=torch.float64)
        with torch.no_grad():
            policy = torch.distributions.Categorical(logits=model["actor"](x))
        actions = policy.sample()
        numbers = torch.randn(2, 16, dtype=torch.float64)
        return x, actions, *numbers, policy.log_prob(actions)

    def loop(model, note, update):
        epochs = 0
        for _ in range(2):
            batch = rollout(model)
            for _ in range(4):
                epochs += 1
                for rows in torch.randperm(16).split(4):
                    kl = update([part[rows] for part in batch])
                note(kl)
                if kl > 0.02:
                    break
        assert epochs < 8  # left early

    def by_hand(model, note):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-5)

        def update(batch):
            loss, kl = losses(model, batch)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            return kl.detach()

        loop(model, note, update)

    def ours(model, note):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-5)

        @train_step(optimizer, max_norm=0.5)
        def step(batch):
            loss, kl = losses(model, batch)
            return {"loss": loss, "kl": kl}

        loop(model, note, lambda batch: step(batch).output["kl"])

    agree(make, by_hand, ours)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_sac(is_frozen):
    """vwxyzjn/cleanrl, sac_continuous_action.py: two critics, an actor whose loss runs through
    them, a temperature, target networks."""

    def make():
        torch.manual_seed(1)
        critics = {name: nn.Linear(7, 1) for name in ("q1", "q2")}
        targets = {"target_" + name: copy.deepcopy(q) for name, q in critics.items()}
        model = nn.ModuleDict({"actor": make_model(), **critics, **targets})
        model.log_alpha = nn.Parameter(torch.zeros(()))
        return model

    def act(model, x):
        mean = model["actor"](x)
        noise = torch.randn_like(mean)
        return (mean + 0.3 * noise).tanh(), (-noise.square() / 2).sum(dim=1, keepdim=True)

    def value(model, names, x, action):
        return [model[name](torch.cat([x, action], dim=1)) for name in names]

    def q_loss(model, x, action):
        with torch.no_grad():
            following, log_prob = act(model, x)
            best = torch.min(*value(model, ("target_q1", "target_q2"), x, following))
            wanted = x[:, :1] + 0.9 * (best - model.log_alpha.exp() * log_prob)
        return sum(F.mse_loss(q, wanted) for q in value(model, ("q1", "q2"), x, action))

    def actor_loss(model, x):
        action, log_prob = act(model, x)
        best = torch.min(*value(model, ("q1", "q2"), x, action))
        return (model.log_alpha.exp().detach() * log_prob - best).mean()

    def alpha_loss(model, x):
        with torch.no_grad():
            _, log_prob = act(model, x)
        return (-model.log_alpha.exp() * (log_prob + 3)).mean()

    def optimizers_of(model):
        q = [*model["q1"].parameters(), *model["q2"].parameters()]
        parameters = q, model["actor"].parameters(), [model.log_alpha]
        return [torch.optim.Adam(ps, lr=0.01) for ps in parameters]

    def loop(model, note, update_q, update_actor, update_alpha):
        for i, (x, action) in enumerate(ROWS[:8]):
            update_q(x, action)
            if i % 2 == 0:
                for _ in range(2):
                    update_actor(x)
                    update_alpha(x)
            with torch.no_grad():
                for name in ("q1", "q2"):
                    for p, target in zip(
                        model[name].parameters(), model["target_" + name].parameters(), strict=True
                    ):
                        target.lerp_(p, 0.1)
            note()

    def by_hand(model, note):
        def update(optimizer, loss):
            def run(*batch):
                optimizer.zero_grad()
                loss(model, *batch).backward()
                optimizer.step()

            return run

        losses = q_loss, actor_loss, alpha_loss
        loop(model, note, *map(update, optimizers_of(model), losses))

    def ours(model, note):
        def step(optimizer, loss, *parts):
            return train_step(optimizer, *parts)(lambda *batch: loss(model, *batch))

        q, actor, alpha = optimizers_of(model)
        held = [frozen(model, ["q1", "q2"])] if is_frozen else []
        steps = step(q, q_loss), step(actor, actor_loss, *held), step(alpha, alpha_loss)
        loop(model, note, *steps)

    agree(make, by_hand, ours, bound=0)


def test_dcgan():
    """pytorch/examples, dcgan/main.py: two backwards for D; G's loss runs through the same fake."""

    def make():
        g = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
        d = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.LeakyReLU(0.2), nn.Linear(5, 1))
        return nn.ModuleDict({"g": g, "d": d})

    def criterion(output, label):
        return F.binary_cross_entropy_with_logits(output, torch.full_like(output, label))

    def optimizers_of(model):
        return [
            torch.optim.Adam(model[which].parameters(), lr=0.01, betas=(0.5, 0.999))
            for which in ("d", "g")
        ]

    def by_hand(model, note):
        (optimizer_d, optimizer_g), g, d = optimizers_of(model), model["g"], model["d"]
        for real, _ in ROWS[:6]:
            d.zero_grad()
            criterion(d(real), 1.0).backward()
            fake = g(torch.randn(len(real), 2, dtype=torch.float64))
            criterion(d(fake.detach()), 0.0).backward()
            optimizer_d.step()
            g.zero_grad()
            criterion(d(fake), 1.0).backward()
            optimizer_g.step()
            note()

    def ours(model, note):
        (optimizer_d, optimizer_g), g, d = optimizers_of(model), model["g"], model["d"]

        @train_step(optimizer_d)
        def step_d(real):
            step_d.backward(criterion(d(real), 1.0))
            fakes.append(g(torch.randn(len(real), 2, dtype=torch.float64)))
            return criterion(d(fakes[-1].detach()), 0.0)

        step_g = train_step(optimizer_g)(lambda fake: criterion(d(fake), 1.0))
        fakes = []
        for real, _ in ROWS[:6]:
            step_d(real)
            step_g(fakes.pop())
            note()

    agree(make, by_hand, ours, bound=0)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(11, 4), nn.LSTM(4, 5)
        self.decoder = nn.Linear(5, 11)

    def loss(self, ids, state):
        output, state = self.rnn(self.embedding(ids[:-1]), state)
        return F.cross_entropy(self.decoder(output).flatten(0, 1), ids[1:].flatten()), state


def test_word_language_model():
    """pytorch/examples, word_language_model/main.py: a hidden state that is detached; clipping; no
    optimizer, but a learning rate that is divided where the validation does not improve."""

    def detached(state):
        return tuple(part.detach() for part in state)

    def update(model, lr):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-lr)

    def loop(model, note, run):
        lr, best = 8.0, math.inf
        for _ in range(3):
            state = torch.zeros(1, 6, 5, dtype=torch.float64), torch.zeros(1, 6, 5).double()
            for ids in TEXT[:4]:
                state = run(ids, detached(state), lr)
                note()
            with torch.no_grad():
                loss = model.loss(TEXT[5], detached(state))[0].item()
            lr, best = (lr, loss) if loss < best else (lr / 4, best)
            note(lr)

    def by_hand(model, note):
        def run(ids, state, lr):
            model.zero_grad()
            loss, state = model.loss(ids, state)
            loss.backward()
            clip_grad_norm_(model.parameters(), 0.25)
            update(model, lr)
            return state

        loop(model, note, run)

    def ours(model, note):
        @accumulate(1, model)
        @amp(dtype=torch.float32, max_norm=0.25)
        def step(ids, state, lr):
            loss, state = model.loss(ids, state)
            yield {"loss": loss, "state": state}
            update(model, lr)

        loop(model, note, lambda *batch: step(*batch).output["state"])

    agree(Recurrent, by_hand, ours)


def test_accelerate_complete_nlp_example():
    """huggingface/accelerate, examples/complete_nlp_example.py: ``step % n == 0`` from 0, so that a
    window of one begins each epoch, together with what the epoch before has left."""
    n = 4

    def optimizer_of(model):
        optimizer = adamw(model)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)

    def by_hand(model, note):
        optimizer, scheduler = optimizer_of(model)
        for _ in range(2):
            for i, batch in enumerate(ROWS[:11]):
                (loss_of(model, batch) / n).backward()
                if i % n == 0:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    note()

    def ours(model, note):
        optimizer, scheduler = optimizer_of(model)
        parts = accumulate(None, reduction="sum")
        step = train_step(optimizer, parts, after=scheduler.step)(
            lambda *batch: loss_of(model, batch) / n
        )
        for _ in range(2):
            for i, batch in enumerate(ROWS[:11]):
                step(*batch)
                if i % n == 0:
                    step.close()
                    note()

    agree(regression, by_hand, ours, bound=0)


def padded(rows=5):
    """Token ids with padding of 0 to the right, and labels that leave it out."""
    lengths = tokens(rows, 1, seed=8).clamp(min=3)
    ids = tokens(rows, 10) * (torch.arange(10) < lengths)
    return ids, ids.masked_fill(ids == 0, -100)


def summed(model, ids, labels):
    logits, labels = model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum")


def test_accelerate_for_autoregressive_models():
    """huggingface/accelerate, by_feature/gradient_accumulation_for_autoregressive_models.py: the
    tokens of a window are counted before it; a short last window. Here with the right count."""
    ids, labels = padded(20)
    batches = list(zip(ids.split(2), labels.split(2), strict=True))

    def by_hand(model, note):
        optimizer = adamw(model)
        for window in windows_of(batches, 4):
            count = sum((labels[:, 1:] != -100).sum() for _, labels in window)
            for batch in window:
                (summed(model, *batch) / count).backward()
            norm = clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            note(norm)

    def ours(model, note):
        @train_step(adamw(model), accumulate(4), max_norm=0.5)
        def step(ids, labels):
            count = (labels[:, 1:] != -100).sum()
            return summed(model, ids, labels) / count, count

        for batch in step.over(batches):
            if (result := step(*batch)).updated:
                note(result.grad_norm)

    agree(LanguageModel, by_hand, ours)


# Patterns of public loops that are wrong, and by how much: the table of docs/migration.md.
MIGRATION = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()


def gradient(losses, model, divisor=1):
    """The gradient of the sum of losses, divided."""
    found = torch.autograd.grad(sum(losses) / divisor, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def off(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def mean_over(model, batches):
    return gradient([loss_of(model, batch) for batch in batches], model, len(batches))


def windows_of_timm(length, n):
    """Where the test ``(i + 1) % n`` ends windows after n was overwritten near the end."""
    steps, last = n, length % n
    for i in range(length):
        if i == length - 1 or (i + 1) % steps == 0:
            yield i + 1
        if i >= length - last:
            steps = last


def modulo_after_overwriting():
    """The last update of 13 batches in windows of 8: of 3 batches in place of 5."""
    ends = list(windows_of_timm(13, 8))
    assert ends == [8, 10, 13]
    model = make_model()
    seen = gradient([loss_of(model, batch) for batch in ROWS[ends[-2] :]], model, 13 % 8)
    return off(seen, mean_over(model, ROWS[8:13]))


def counted_from_zero():
    """The first update: one batch, divided by 4."""
    model = make_model()
    return off(mean_over(model, ROWS[:1]) / 4, mean_over(model, ROWS[:4]))


def leaking_tail():
    """The first update of the second epoch, after an epoch of 11 batches in windows of 4."""
    model = make_model()
    leaked = ROWS[8:11] + ROWS[:4]
    return off(mean_over(model, leaked) * len(leaked) / 4, mean_over(model, ROWS[:4]))


def dropped_tail():
    """What an epoch of 11 batches in windows of 4 leaves out, as a part of its batches."""
    return len(ROWS[8:11]) / 11


def clipped_while_scaled():
    """An update of gradients that were clipped to 1 with a loss scale of 65,536 in them."""
    model = make_model()
    for batch in ROWS[:4]:
        (65536.0 * loss_of(model, batch) / 4).backward()
    clip_grad_norm_(model.parameters(), 1.0)
    seen = torch.cat([p.grad.flatten() for p in model.parameters()]) / 65536.0
    true = mean_over(model, ROWS[:4])
    return off(seen, true * min(1.0, 1.0 / true.norm().item()))


def zero_grad_of_awp():
    """A window of 4 with a second loss for each batch, and ``zero_grad`` between the two."""

    def run(wipes):
        model = make_model()
        attacker = AWP(model)
        for batch in ROWS[:4]:
            (loss_of(model, batch) / 4).backward()
            attacker.attack()
            if wipes:
                model.zero_grad()
            (loss_of(model, batch) / 4).backward()
            attacker.restore()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    return off(run(wipes=True), run(wipes=False))


def means_added_up():
    """The means of 4 micro-batches of a batch, against the mean of the batch."""
    model = make_model()
    return off(
        gradient([loss_of(model, batch) for batch in ROWS[:4]], model), mean_over(model, ROWS[:4])
    )


def first_token_counted():
    """Rows of 3 to 10 tokens, each with one token more in the count than in the loss."""
    _, labels = padded(8)
    return 1 - ((labels[:, 1:] != -100).sum() / (labels != -100).sum()).item()


@pytest.mark.parametrize(
    "measured",
    [
        modulo_after_overwriting,
        counted_from_zero,
        leaking_tail,
        dropped_tail,
        clipped_while_scaled,
        zero_grad_of_awp,
        means_added_up,
        first_token_counted,
    ],
    ids=lambda function: function.__name__,
)
def test_the_table_of_wrong_patterns_says_by_how_much(measured):
    (said,) = re.findall(rf"\| (\d+) % <!-- {measured.__name__} -->", MIGRATION)
    assert round(100 * measured()) == int(said)


def test_how_many_loaders_a_modulo_after_overwriting_gets_wrong():
    for n, said in re.findall(r"(\d+) of 100 loader lengths at n = (\d+)", MIGRATION):
        wrong = sum(
            len(list(windows_of_timm(length, int(said)))) != -(-length // int(said))
            for length in range(1, 101)
        )
        assert wrong == int(n)
