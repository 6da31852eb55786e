"""Freezing layers: ``frozen`` for a while, ``freeze`` and ``unfreeze`` for good."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from trainkit.layers.language import Chosen, Layers, Slot, normalise, select, unwrapped

P = ParamSpec("P")
R = TypeVar("R")


def _between_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Within a compiled function, has torch.compile call this between two graphs: a graph has no modes and no flags."""
    # The public torch.compiler.disable imports the compiler, which takes seconds.
    disable = getattr(getattr(torch, "_compile", None), "_disable_dynamo", None)
    return disable(function) if disable else function


class frozen:
    """Freezes layers of a module inside a ``with`` block, a function or a training step.

    Equivalent to this, where everything found is put back at the end, however the block is left::

        for parameter in selected:
            parameter.requires_grad, parameter.grad = False, None
        for module in owners_of_selected_buffers:
            module.eval()  # and it stays so, also through model.train()

    **Frozen means frozen**: inside, no optimizer, momentum, weight decay or leftover gradient moves a selected parameter, and
    no training mode a selected buffer: a frozen BatchNorm normalises with its running statistics. (Not held are what moves
    without a gradient or outside of training: LBFGS by its history, buffers written in evaluation mode.) Dropout stays, unless
    ``eval_mode=True``. Contexts nest and overlap, and may end in any order. ``frozen(m)`` twice is once; ``frozen(a)`` and
    ``frozen(b)`` commute.

    As a part, ``train_step(optimizer, accumulate(2), frozen(D))``, it is entered for every micro-batch, around forward,
    backward and update. As a decorator it takes ordinary functions.

    Args:
        module: what the layers belong to.
        layers: one or several of: a pattern ("encoder.layer[:2]", "**.bias"; `*` within one component, `**` for any depth), a
            submodule or a slice of a ModuleList, a parameter, a predicate ``(name, parameter) -> bool``. "**" is everything,
            ``[]`` nothing. A parameter that is tied is frozen under all its names.
        eval_mode: puts the selected modules into evaluation mode, dropout included.

    Returns:
        ``with frozen(...) as names`` gives the names of the frozen parameters; a tied one appears under all its names.

    Raises:
        TypeError: if module is not a torch.nn.Module, layers are of another type, or a generator function is decorated.
        ValueError: a pattern or a predicate that matches nothing, or a layer of another module.

    Example:
        >>> import torch
        >>> from trainkit import frozen
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        >>> with frozen(model, "[:2]") as names:
        ...     model(torch.ones(3, 2)).sum().backward()
        >>> names
        ['0.weight', '0.bias', '1.weight', '1.bias']
        >>> [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        ['2.weight', '2.bias']

    Source: what torch leaves to its user, https://docs.pytorch.org/docs/stable/notes/autograd.html#setting-requires-grad
    """

    def __init__(
        self, module: nn.Module, layers: Layers = "**", *, eval_mode: bool = False
    ) -> None:
        _check_module("frozen(model, 'embeddings')", module)
        self._module = module
        self._chosen = Chosen(module, layers)
        if not isinstance(eval_mode, bool):
            raise TypeError(
                f"eval_mode is True or False, got {eval_mode!r}: `frozen(model, layers, eval_mode=True)`"
            )
        self._eval_mode = eval_mode
        self._entered: list[AbstractContextManager[None]] = []

    def around_step(self) -> AbstractContextManager[None]:
        """The context, new, as a step enters it around each micro-batch."""
        selection = self._chosen.now()
        modules = selection.buffer_owners + (selection.modules if self._eval_mode else [])
        return _holding(selection.slots, list({id(m): m for m in modules}.values()))

    @_between_graphs
    def __enter__(self) -> list[str]:
        context = self.around_step()
        names = _names(self._module, self._chosen.selection.parameters)
        context.__enter__()
        self._entered += [context]  # not by a call, after which an interrupt may come
        return names

    @_between_graphs
    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        add_part = getattr(function, "_add_part", None)
        if add_part is not None:  # a training step: this joins its plan
            return add_part(self)  # type: ignore[no-any-return]
        is_part = hasattr(function, "plan") or hasattr(function, "around_step")
        if not callable(function) or isinstance(function, nn.Module) or is_part:
            raise TypeError(
                f"frozen decorates functions, got {function!r}: `with frozen(model, layers):`"
            )
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(_TOO_LATE.format(function))

        @functools.wraps(function)
        def with_frozen(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                value = function(*args, **kwargs)
            if (
                inspect.isgenerator(value)
                or inspect.iscoroutine(value)
                or inspect.isasyncgen(value)
            ):
                getattr(value, "close", bool)()  # a coroutine would warn that nobody awaited it
                raise TypeError(_TOO_LATE.format(function))
            return value

        # A step made of this function freezes around backward and update too.
        parts = (*getattr(function, "__trainkit_parts__", ()), self)
        with_frozen.__trainkit_parts__ = parts  # type: ignore[attr-defined]
        return with_frozen


def freeze(module: nn.Module, layers: Layers = "**") -> list[str]:
    """Freezes layers for good, or until ``unfreeze``: the permanent form of ``frozen``, with the same ``layers``.

    Equivalent to ``requires_grad = False`` and ``grad = None`` for each selected parameter, and ``eval()`` of the modules that
    own a selected buffer, which ``model.train()`` does not undo. Inside a ``frozen`` block it holds from its end on.

    Returns:
        The names of the parameters frozen; a tied parameter appears under all its names.

    Raises:
        TypeError, ValueError: as ``frozen`` does.

    Example:
        >>> import torch
        >>> from trainkit import freeze, frozen_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> freeze(model, "[0]")
        ['0.weight', '0.bias']
        >>> frozen_parameters(model)
        ['0.weight', '0.bias']
    """
    _check_module("freeze(model, 'embeddings')", module)
    selection = select(module, normalise(layers))
    for parameter in selection.parameters:
        if hold := _hold_of(parameter):
            hold.requires_grad, hold.grad = False, None
        parameter.requires_grad, parameter.grad = False, None
    for owner in selection.buffer_owners:
        stay = _Stay.of(owner)
        stay.for_good = True
        stay.begin()
    return _names(module, selection.parameters)


def unfreeze(module: nn.Module, layers: Layers = "**") -> list[str]:
    """Makes layers trainable: the inverse of ``freeze``, with the same ``layers``.

    Equivalent to ``requires_grad = True`` for each selected parameter. Modules that ``freeze`` keeps in evaluation mode take
    up the mode that they were last asked for. Inside a ``frozen`` block it holds from its end on.

    Returns:
        The names of the parameters that are trainable now; a tied parameter appears under all its names.

    Raises:
        TypeError, ValueError: as ``frozen`` does.

    Example:
        >>> import torch
        >>> from trainkit import freeze, frozen_parameters, unfreeze
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> _ = freeze(model)
        >>> unfreeze(model, "[-1]")
        ['1.weight', '1.bias']
        >>> frozen_parameters(model)
        ['0.weight', '0.bias']
    """
    _check_module("unfreeze(model, 'embeddings')", module)
    selection = select(module, normalise(layers))
    # Quantised weights are integers, and have no gradient.
    parameters = [p for p in selection.parameters if p.is_floating_point() or p.is_complex()]
    for parameter in parameters:
        if hold := _hold_of(parameter):
            hold.requires_grad = True
        else:
            parameter.requires_grad = True
    for owner in {*selection.modules, *selection.buffer_owners}:
        stay = owner.__dict__.get("train")
        if isinstance(stay, _Stay):
            stay.for_good = False
            stay.end()
    return _names(module, parameters)


def frozen_parameters(module: nn.Module) -> list[str]:
    """The names of the parameters of a module that do not require a gradient; a tied one appears under all its names.

    Equivalent to ``[name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]``.

    Raises:
        TypeError: if module is not a torch.nn.Module.

    Example:
        >>> import torch
        >>> from trainkit import freeze, frozen_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> _ = freeze(model, "**.bias")
        >>> frozen_parameters(model)
        ['0.bias', '1.bias']
    """
    _check_module("frozen_parameters(model)", module)
    return [
        name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
    ]


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require a gradient, each once: what an optimizer is to be given.

    Equivalent to ``[p for p in module.parameters() if p.requires_grad]``.

    Raises:
        TypeError: if module is not a torch.nn.Module.

    Example:
        >>> import torch
        >>> from trainkit import freeze, trainable_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> _ = freeze(model, "[0]")
        >>> [tuple(parameter.shape) for parameter in trainable_parameters(model)]
        [(1, 2), (1,)]
    """
    _check_module("trainable_parameters(model)", module)
    return [p for p in module.parameters() if p.requires_grad]


_TOO_LATE = (
    "{} only starts to run after its call, and would do so outside of the frozen block: hand frozen over as a part, "
    "`train_step(optimizer, frozen(model, layers))`"
)


class _Hold:
    """What a frozen parameter gets back at the end of the last context that holds it. On the parameter, where steps find it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.requires_grad, self.grad = parameter.requires_grad, parameter.grad
        self.holders: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            OrderedDict,
            (),
        )  # a pickled copy of the parameter is in no context; and torch.load knows this for nothing

    def end(self, parameter: nn.Parameter) -> None:
        """Gives back what still fits: inside, the parameter may have been cast, moved, resized or quantised."""
        parameter.__dict__.pop("_trainkit_hold", None)
        can_have_one = parameter.is_floating_point() or parameter.is_complex()
        if can_have_one and parameter.requires_grad != self.requires_grad:
            parameter.requires_grad = self.requires_grad
        grad = self.grad
        if grad is not None:
            dtype = (
                getattr(parameter, "grad_dtype", None) or parameter.dtype
            )  # sums of an open window may be wider
            grad = (
                grad.to(parameter.device, dtype)
                if can_have_one and grad.shape == parameter.shape
                else None
            )
        parameter.grad = grad


def _hold_of(parameter: nn.Parameter) -> _Hold | None:
    return getattr(parameter, "_trainkit_hold", None) or None


@contextmanager
def _holding(slots: list[Slot], modules: list[nn.Module]) -> Iterator[None]:
    held: list[tuple[Slot, _Hold]] = []
    staying: list[_Stay] = []
    try:
        # An interruption may come between any two of these: whatever is changed is first written down.
        for slot in slots:
            parameter = slot.parameter
            hold = _hold_of(parameter) or _Hold(parameter)
            held.append((slot, hold))
            hold.holders.add(id(held))
            parameter._trainkit_hold = hold  # type: ignore[attr-defined]
            parameter.requires_grad, parameter.grad = False, None
        for module in modules:
            stay = _Stay.of(module)
            staying.append(stay)
            stay.holders.add(id(held))
            stay.begin()
        yield
    finally:
        try:
            _release(held, staying)
        except BaseException:
            _release(held, staying)  # what an interruption has left of it
            raise


def _release(held: list[tuple[Slot, _Hold]], staying: list[_Stay]) -> None:
    for (owner, name, parameter), hold in held:
        hold.holders.discard(id(held))
        if not hold.holders:
            hold.end(parameter)
            # What was put in its place inside, as load_state_dict(assign=True) does, has its flag from there.
            if (
                name in owner._parameters
                and (other := owner._parameters[name]) is not parameter
                and other is not None
            ):
                other.requires_grad = other.requires_grad or (
                    hold.requires_grad and _hold_of(other) is None
                )
    for stay in reversed(
        staying
    ):  # inside out: the mode of a compiled module is that of the one it wraps
        stay.holders.discard(id(held))
        stay.end()


class _Stay:
    """Stands in for ``module.train`` while the module is to stay in evaluation mode, and remembers the mode asked for.

    On the instance, where torch.compile notices it; it does not notice hooks that are added to a compiled model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found = module.__dict__.get("train")  # people put a train of their own there, too
        self.asked = module.training
        self.holders: set[int] = set()
        self.for_good = False

    @classmethod
    def of(cls, module: nn.Module) -> _Stay:
        """The one that is there, or a new one, which is to ``begin``."""
        found = module.__dict__.get("train")
        return found if isinstance(found, cls) else cls(module)

    def begin(self) -> None:
        """From here on the module is in evaluation mode."""
        self.module.__dict__["train"] = self
        self.module.training = False

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        train = self.found or functools.partial(type(self.module).train, self.module)
        try:
            self.module.training = self.asked
            train(*args, **kwargs)
            self.asked = self.module.training
        finally:  # also where it was asked for what there is not, as `train("yes")`
            self.module.training = False
        return self.module

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module is in no context, and stays as it is until ``unfreeze``."""
        return {**self.__dict__, "holders": set(), "for_good": True}

    def end(self) -> None:
        """Gives the module its ``train`` and its mode back, unless somebody still holds it."""
        if not self.holders and not self.for_good:
            self.module.training = self.asked
            if self.found is not None:
                self.module.__dict__["train"] = self.found
            else:
                self.module.__dict__.pop("train", None)


def _names(module: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    chosen = {id(p) for p in parameters}
    return [
        name
        for name, p in unwrapped(module).named_parameters(remove_duplicate=False)
        if id(p) in chosen
    ]


def _check_module(call: str, module: Any) -> None:
    if not isinstance(module, nn.Module) or not hasattr(module, "_modules"):
        function, kind = call.partition("(")[0], type(module).__name__
        raise TypeError(
            f"{function} takes a torch.nn.Module, got an object of type {kind}: `{call}`"
        )
