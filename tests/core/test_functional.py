"""Models with other, computed or wrapped parameters (torch.func, parametrizations, adapters)."""

import contextlib
import re
from functools import partial

import pytest
import torch
from oracles import windows_of
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations, parametrize

from trainkit import accumulate, amp, freeze, frozen, train_step, unfreeze

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # of old-style weight_norm, and within transformers


def nothing(model):
    pass


def train_by_hand(model, optimizer, batches, loss, held, dtype=None, between=nothing):
    """Two micro-batches make a window. ``held`` matches how names of what is held begin."""
    for name, parameter in model.named_parameters():
        if re.search(held, name):
            parameter.requires_grad, parameter.grad = False, None
    scaler = torch.amp.GradScaler("cpu", 1024.0, enabled=dtype == torch.float16)
    for window in windows_of(batches, 2):
        for batch in window:
            model.train()
            for name, module in model.named_modules():
                if re.search(held, name + "."):
                    module.eval()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                value = loss(model, *batch)
            scaler.scale(value / len(window)).backward()
            between(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@contextlib.contextmanager
def for_good(model, layers):
    freeze(model, layers)
    yield
    unfreeze(model, layers)


BLOCKS = {
    "a block": frozen,
    "for good": for_good,
    "a part": lambda model, layers: contextlib.nullcontext(),
}
HOW = pytest.mark.parametrize("how", BLOCKS)


def train(model, optimizer, batches, loss, layers, how, dtype=None, between=nothing):
    parts = [
        accumulate(2),
        *([amp(dtype=dtype, init_scale=1024.0)] if dtype else []),
        *([frozen(model, layers)] if how == "a part" else []),
    ]
    step = train_step(optimizer, *parts)(lambda *batch: loss(model, *batch))
    with BLOCKS[how](model, layers):
        for batch in step.over(batches):
            model.train()
            step(*batch)
            between(model)


def found_in(model):
    modes = {
        name: (module.training, "train" in module.__dict__)
        for name, module in model.named_modules()
    }
    return modes, {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_as_by_hand(make, batches, loss, layers, held, how="a block", may_move="^$", **options):
    """As by hand. What is held has not moved, all else trainable has; what was found is back."""
    (ours, optimizer), (theirs, their_optimizer) = make(), make()
    before, found = bits(ours), found_in(ours)
    train(ours, optimizer, batches, loss, layers, how, **options)
    train_by_hand(theirs, their_optimizer, batches, loss, held, **options)
    after = bits(ours)
    tolerance = (
        1e-4 if options.get("dtype") == torch.float16 else 1e-12
    )  # its subnormals are scaled a little differently
    torch.testing.assert_close(after, bits(theirs), rtol=tolerance, atol=tolerance)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {
        name for name, p in ours.named_parameters() if p.requires_grad and not re.search(held, name)
    }
    assert trainable and trainable <= moved
    still = {name for name, _ in ours.named_parameters()} - trainable
    assert not {
        name
        for name in moved
        if re.search(held, name) or (name in still and not re.search(may_move, name))
    }
    assert found_in(ours) == found
    return True


# torch.func: the parameters are handed in.


def batches_of(n=5, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return [
        tuple(torch.randn(size, k, generator=generator, dtype=dtype) for k in (4, 3))
        for _ in range(n)
    ]


def make_mlp(dtype=torch.float64, norm=nn.BatchNorm1d):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), norm(4), nn.Tanh(), nn.Linear(4, 3)).to(
        dtype
    )
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def plain(model, x, y):
    return mse_loss(model(x), y)


def stateless(model, x, y):
    """With everything by name, running statistics included."""
    return mse_loss(
        functional_call(
            model, {**dict(model.named_parameters()), **dict(model.named_buffers())}, x
        ),
        y,
    )


def fast_weights(model, x, y):
    """One differentiable step on half of the batch, the loss on the other (Finn et al. 2017)."""
    slow = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = torch.autograd.grad(
        mse_loss(model(x[::2]), y[::2]), list(slow.values()), create_graph=True
    )
    fast = {name: p - 0.1 * g for (name, p), g in zip(slow.items(), inner, strict=True)}
    return mse_loss(functional_call(model, fast, x[1::2]), y[1::2])


def per_sample_clipped(model, x, y):
    """A loss whose gradient is the mean of those of the samples, each clipped to norm 1."""
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    of_samples = per_sample_gradients(model, theta, x, y)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in of_samples.values()]).norm(dim=0)
    clipped = {
        name: (g / norms.clamp(min=1).view(-1, *[1] * (g.dim() - 1))).mean(0)
        for name, g in of_samples.items()
    }
    return sum(
        (p * clipped[name].to(p.dtype)).sum()
        for name, p in model.named_parameters()
        if name in clipped
    )


def per_sample_gradients(model, theta, x, y):
    def loss(theta, x, y):
        return mse_loss(functional_call(model, theta, x[None]), y[None])

    return vmap(grad(loss), (None, 0, 0))(theta, x, y)


def look_at_samples(model):
    """An evaluation in the middle of windows, of gradients of what is frozen, too."""
    model.eval()
    found = per_sample_gradients(
        model, dict(model.named_parameters()), *batches_of(1, dtype=model[0].weight.dtype)[0]
    )
    assert all(
        g.shape == (6, *model.get_parameter(name).shape) and g.any() for name, g in found.items()
    )
    model.train()


DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])


@HOW
@DTYPES
@pytest.mark.parametrize("loss", [stateless, fast_weights])
def test_a_model_called_with_other_parameters(loss, dtype, how):
    wide = torch.float32 if dtype else torch.float64
    for layers, held in (("[:2]", r"^[01]\."), ("[3].bias", r"^3\.bias$"), ([], "^$")):
        assert is_as_by_hand(
            lambda: make_mlp(wide), batches_of(dtype=wide), loss, layers, held, how, dtype=dtype
        )


@HOW
@DTYPES
def test_gradients_of_samples(dtype, how):
    wide = torch.float32 if dtype else torch.float64
    norm = (
        (lambda size: nn.Identity()) if dtype else nn.LayerNorm
    )  # of which torch has no vmap under autocast
    make, batches = (lambda: make_mlp(wide, norm)), batches_of(dtype=wide)
    for layers, held in (("[:2]", r"^[01]\."), ([], "^$")):
        assert is_as_by_hand(
            make,
            batches,
            per_sample_clipped,
            layers,
            held,
            how,
            dtype=dtype,
            between=look_at_samples,
        )


def test_an_ensemble_of_stacked_parameters():
    """The optimizer has tensors that are in no module."""

    def run(train_it, *rest):
        members = [make_mlp()[0].eval() for _ in range(3)]
        parameters, buffers = stack_module_state(members)
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)

        def loss(_, x, y):
            outputs = vmap(lambda *state: functional_call(members[0], state, x))(
                parameters, buffers
            )
            return mse_loss(outputs, torch.stack([y, 2 * y, 3 * y]))

        train_it(nn.Module(), optimizer, batches_of(), loss, *rest)
        return parameters

    ours = run(train, [], "a block")
    torch.testing.assert_close(ours, run(train_by_hand, "^$"), rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours["0.weight"][0], ours["0.weight"][1])


# Parametrizations: the weight is computed from parameters that live elsewhere.


class Gain(nn.Module):
    """Has a parameter of its own, and a buffer that moves in training."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, weight):
        if self.training:
            self.seen += 1
        return weight * self.gain


def with_gain(layer):
    parametrize.register_parametrization(layer, "weight", Gain())
    return layer


def with_both(layer):
    return with_gain(parametrizations.spectral_norm(layer))


NEW = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    with_gain,
    with_both,
]
OLD = [nn.utils.weight_norm, nn.utils.spectral_norm]


def make_parametrised(wrap):
    torch.manual_seed(1)
    model = nn.Sequential(wrap(nn.Linear(4, 4).double()), nn.Tanh(), nn.Linear(4, 3).double())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def twice(model, x, y):
    return mse_loss(model(x) + model(-x), y)


def cached(model, x, y):
    with parametrize.cached():
        return twice(model, x, y)


@HOW
@pytest.mark.parametrize(
    ("wrap", "loss"), [*((wrap, twice) for wrap in NEW + OLD), *((wrap, cached) for wrap in NEW)]
)
def test_parametrised_layers(wrap, loss, how):
    """Frozen whole, their weight alone, and trained beside a frozen layer."""
    choices = [("[0]", r"^0\."), ("[2]", r"^2\."), ([], "^$")] + [
        ("[0].weight", r"^0\.parametrizations\.")
    ] * (wrap in NEW)
    for layers, held in choices:
        assert is_as_by_hand(lambda: make_parametrised(wrap), batches_of(), loss, layers, held, how)


# Adapters: peft wraps the model, freezes what it had, and adds parameters beside it.


def adapted(base, adapters=("default",), **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def make_bert(dtype=torch.float32, **options):
    """The encoder in dtype, adapters and classifier in float32."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, **no_dropout)
    )
    base.bert.to(dtype)
    return adapted(base, target_modules=["query", "value"], **options)


def bert_batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randint(20, (4, 6), generator=generator),
            torch.randint(2, (4,), generator=generator),
        )
        for _ in range(5)
    ]


def bert_loss(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss


ADAPTED = {
    "one matrix": ("**.lora_B", r"\.lora_B\.", {}),
    "one adapter of two": (
        "**.lora_*.other",
        r"\.lora_[AB]\.other\.",
        {"adapters": ("default", "other")},
    ),
    "a module to save": (
        "**.modules_to_save",
        r"\.modules_to_save\.",
        {"modules_to_save": ["classifier"]},
    ),
    "none": ([], "^$", {"modules_to_save": ["classifier"]}),
}
HALVES = [torch.bfloat16, torch.float16]
PRECISIONS = [(torch.float32, None, how) for how in BLOCKS]
PRECISIONS += [(base, half, "a part") for half in HALVES for base in (torch.float32, half)]


@pytest.mark.parametrize(("base", "dtype", "how"), PRECISIONS)
def test_adapters(base, dtype, how):
    """Beside a frozen base of float32, bfloat16 or float16, which the optimizer has, too."""
    for layers, held, options in ADAPTED.values():
        assert is_as_by_hand(
            partial(make_bert, base, **options),
            bert_batches(),
            bert_loss,
            layers,
            held,
            how,
            dtype=dtype,
        )


def make_adapted_mlp():
    return adapted(make_mlp()[0], target_modules=["0", "3"])


@pytest.mark.parametrize("how", ["a block", "a part"])
def test_statistics_of_an_adapted_model(how):
    """peft freezes the parameters of a batch norm, not its statistics."""
    for layers in (
        "base_model.model[1]",
        "**.running_var",
        lambda name, parameter: ".model.1." in name,
    ):
        assert is_as_by_hand(make_adapted_mlp, batches_of(), plain, layers, r"\.model\.1\.", how)


@HOW
def test_adapters_merged_for_an_evaluation_in_the_middle_of_a_window(how):
    """Merging rounds the base, and so moves it."""

    def merged_evaluation(model):
        model.merge_adapter()
        with torch.no_grad():
            model.eval()(batches_of(1)[0][0])
        model.train()
        model.unmerge_adapter()

    options = {"between": merged_evaluation, "may_move": "base_layer"}
    assert is_as_by_hand(
        make_adapted_mlp, batches_of(), plain, "**.lora_B", r"\.lora_B\.", how, **options
    )
