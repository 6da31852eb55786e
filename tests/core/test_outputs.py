"""``result.output``: what the function handed over, without the graph, whatever it is made of."""

import collections
import copy
import dataclasses
import gc
import types
import weakref

import pytest
import torch
from oracles import BATCHES, loss_of, make_model
from torch import nn

from trainkit import train_step


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class FrozenOutput:
    loss: torch.Tensor
    logits: torch.Tensor


@dataclasses.dataclass(slots=True)
class SlotsOutput:
    loss: torch.Tensor
    logits: torch.Tensor


Named = collections.namedtuple("Named", "loss logits")


class Own(tuple):
    """A tuple with a constructor of its own, and a loss."""

    def __new__(cls, loss, logits):
        return super().__new__(cls, (loss, logits))

    def __getnewargs__(self):
        return tuple(self)

    @property
    def loss(self):
        return self[0]


class Wrapper(collections.abc.MutableMapping):
    """Its items are in another dict, which a shallow copy shares."""

    def __init__(self, **items):
        self.inner = items

    def __getitem__(self, key):
        return self.inner[key]

    def __setitem__(self, key, value):
        self.inner[key] = value

    def __delitem__(self, key):
        del self.inner[key]

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)


class WithAttributes(dict):
    """A dict that has tensors beside its items."""

    def __init__(self, loss, logits):
        super().__init__(loss=loss)
        self.logits = logits


class Cache:
    """As the keys and values of a language model."""

    def __init__(self, loss, logits):
        self.loss, self.layers = loss, [types.SimpleNamespace(keys=logits, seen=3)]


class Cyclic:
    def __init__(self, loss, logits):
        self.loss, self.child = loss, types.SimpleNamespace(parent=self, names=["a"])
        self.child.logits = logits


def in_a_list(loss, logits):
    found = [logits]
    found.append(found)
    return {"loss": loss, "list": found}


def bound(loss, logits):
    return {"loss": loss, "call": Cache(loss, logits).layers.__len__}


KINDS = {
    "pair": lambda loss, logits: (loss, 4),
    "tensor as weight": lambda loss, logits: (loss, torch.tensor(4)),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits, "names": ["a", "b"]},
    "nested": lambda loss, logits: {"loss": loss, "by layer": [{"a": (logits, None)}, {1}]},
    "shared": lambda loss, logits: {"loss": loss, "a": logits, "b": [logits]},
    "ordered": lambda loss, logits: collections.OrderedDict(loss=loss, logits=logits),
    "default": lambda loss, logits: collections.defaultdict(list, loss=loss, logits=[logits]),
    "deque": lambda loss, logits: {"loss": loss, "last": collections.deque([logits], maxlen=3)},
    "set": lambda loss, logits: {"loss": loss, "some": {logits}, "more": frozenset([logits])},
    "dataclass": Output,
    "frozen dataclass": FrozenOutput,
    "slots": SlotsOutput,
    "named tuple": Named,
    "own tuple": Own,
    "named tuple inside": lambda loss, logits: {"loss": loss, "n": Named(1, [logits])},
    "user dict": lambda loss, logits: collections.UserDict(loss=loss, logits=logits),
    "mapping": lambda loss, logits: Wrapper(loss=loss, logits=logits),
    "attributes": WithAttributes,
    "namespace": lambda loss, logits: types.SimpleNamespace(loss=loss, logits=logits),
    "cache": Cache,
    "cycle of objects": Cyclic,
    "cycle of lists": in_a_list,
    "bound method": bound,
    "of torch": lambda loss, logits: {"loss": loss, "max": logits.max(0), "size": logits.shape},
    "distribution": lambda loss, logits: {"loss": loss, "d": torch.distributions.Normal(logits, 1)},
    "mixture": lambda loss, logits: {
        "loss": loss,
        "d": torch.distributions.Independent(torch.distributions.Categorical(logits=logits), 1),
    },
    "packed": lambda loss, logits: {
        "loss": loss,
        "p": nn.utils.rnn.pack_sequence([logits, logits[:1]]),
    },
}


class Token:
    """Lives as long as a graph."""


class Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def with_graph(value):
    """Every tensor with a graph that is reachable, found in another way than the package does."""
    found, seen, todo = [], set(), [value]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found += [one] * one.requires_grad
        elif isinstance(one, collections.abc.Mapping):
            todo += one.values()
        elif isinstance(one, (tuple, list, set, frozenset, collections.deque)):
            todo += one
        todo += getattr(one, "__dict__", {}).values()
        todo += [getattr(one, name) for name in getattr(one, "__slots__", ()) if name != "__dict__"]
    return found


def values_of(value):
    """The numbers of all tensors at some depth, by the way to them."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, collections.abc.Mapping):
        return {key: values_of(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list, collections.deque)):
        return [values_of(inner) for inner in value if inner is not value]
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_types_and_numbers_and_no_graph(kind):
    model, seen = make_model(), []

    @train_step(torch.optim.SGD(model.parameters()))
    def step(batch):
        logits = model(batch[0])
        output = KINDS[kind]((logits - batch[1]).square().mean(), logits)
        seen.append((output, with_graph(output), values_of(output)))
        return output

    result = step(BATCHES[0])
    ((output, tensors, values),) = seen
    assert type(result.output) is type(output) and result.output is not output
    assert values_of(result.output) == values == values_of(output)
    assert not with_graph(result.output)
    # The function's own are as they were.
    assert tensors and [id(x) for x in with_graph(output)] == [id(x) for x in tensors]


@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_stays_alive(kind):
    model, graphs = make_model(), []

    @train_step(torch.optim.SGD(model.parameters()))
    def step(batch):
        token = Token()
        graphs.append(weakref.ref(token))
        logits = Held.apply(model(batch[0]), token)
        return KINDS[kind]((logits - batch[1]).square().mean(), logits)

    result = step(BATCHES[0])
    gc.collect()  # of the cycles that the function made
    assert graphs[0]() is None
    assert result.output is not None


def test_what_leads_to_no_tensor_is_the_same_object():
    model = make_model()
    config, names, plain = types.SimpleNamespace(a={"b": [1]}), ["a", ["b"]], {1: {2: 3}}
    config.own = config  # a cycle without a tensor

    @train_step(torch.optim.SGD(model.parameters()))
    def step(batch):
        loss = loss_of(model, batch)
        return {"loss": loss, "of": [config, names, loss], "plain": plain, "model": model}

    found = step(BATCHES[0]).output
    assert found["of"][0] is config and found["of"][1] is names
    assert found["plain"] is plain and found["model"] is model
    assert found["of"][2] is found["loss"]  # one tensor remains one


class Uncopied:
    def __init__(self, loss):
        self.loss = loss

    def __reduce_ex__(self, version):
        raise TypeError("no copies")


@pytest.mark.parametrize(
    "wrap", [Uncopied, lambda loss: {"loss": loss, "view": types.MappingProxyType({0: loss})}]
)
def test_what_cannot_be_copied_is_none_and_the_step_is_made(wrap):
    model = make_model()
    step = train_step(torch.optim.SGD(model.parameters()))
    result = step(lambda batch: wrap(loss_of(model, batch)))(BATCHES[0])
    assert result.output is None and result.updated and result.loss.isfinite()


def test_it_shares_the_memory_of_what_was_handed_over_and_none_of_it_is_kept():
    model, seen = make_model(), []

    @train_step(torch.optim.SGD(model.parameters()))
    def step(batch):
        seen[:] = [{"loss": loss_of(model, batch), "big": model(batch[0])}]
        return seen[0]

    result = step(BATCHES[0])
    assert result.output["big"].data_ptr() == seen[0]["big"].data_ptr()
    alive = weakref.ref(result.output["big"])
    del result
    assert alive() is None


def test_a_kept_result_keeps_neither_model_nor_optimizer():
    def trained():
        model = make_model()
        step = train_step(torch.optim.SGD(model.parameters()))(lambda b: loss_of(model, b))
        return step(BATCHES[0]), weakref.ref(model)

    trained()  # torch keeps what its first call makes
    gc.collect()
    result, model = trained()
    assert result.updated and model() is None and copy.deepcopy(result).loss == result.loss


def test_yielding_returning_block_and_close():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())

    @train_step(optimizer)
    def yielding(batch):
        yield {"loss": loss_of(model, batch), "rows": len(batch[0])}
        optimizer.step()

    assert yielding(BATCHES[0]).output["rows"] == 4
    by_hand = train_step(optimizer)
    with by_hand as result:
        by_hand.backward(loss_of(model, BATCHES[0]))
    assert result.output is None and by_hand.close().output is None
    alone = train_step(optimizer)(lambda batch: loss_of(model, batch))(BATCHES[0])
    assert torch.equal(alone.output, alone.loss) and not alone.output.requires_grad


def test_outputs_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    cache = pytest.importorskip("transformers").DynamicCache()
    model = make_model()

    @train_step(torch.optim.SGD(model.parameters()))
    def step(batch):
        logits = model(batch[0])
        cache.update(logits[None, None], logits[None, None] + 1, 0)
        loss = (logits - batch[1]).square().mean()
        return outputs.CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    found = step(BATCHES[0]).output
    assert type(found) is outputs.CausalLMOutputWithPast and list(found) == [
        "loss",
        "logits",
        "past_key_values",
    ]
    assert found.logits is found["logits"] and not found.logits.requires_grad
    keys = found.past_key_values.layers[0].keys
    assert not keys.requires_grad and cache.layers[0].keys.requires_grad
    assert torch.equal(keys, cache.layers[0].keys)
    assert isinstance(copy.deepcopy(found), type(found))
