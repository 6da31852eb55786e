"""Freezing layers: ``frozen`` inside a block, ``freeze`` until ``unfreeze``."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from trainkit.layers.blocks import Block
from trainkit.layers.language import Chosen, Layers, Selection, check_module, normalise, select


class frozen(Block):
    """Freezes layers of a module inside a ``with`` block, a function or a training step.

    Equivalent to this, where the end of the block restores what was found::

        for parameter in selected:
            parameter.requires_grad, parameter.grad = False, None
        for module in owners_of_selected_buffers:
            module.eval()  # model.train() inside the block does not undo it

    A frozen BatchNorm normalises with its running statistics. Dropout stays on. Blocks nest and
    overlap. ``train_step(optimizer, frozen(D))`` freezes around each micro-batch.

    Args:
        module: the module that the layers belong to.
        layers: patterns ("encoder.layer[:2]", "**.bias"), submodules, parameters or predicates
            ``(name, parameter) -> bool``, one or several. "**" is everything, ``[]`` nothing.
        buffers: False leaves the owners of buffers as they are: a BatchNorm continues with the
            statistics of its batches, as with ``requires_grad_(False)`` alone.
        eval_mode: puts the selected modules into evaluation mode too, with their dropout.

    Raises:
        TypeError, ValueError: for another type, or for layers that match nothing.

    Example:
        >>> import torch
        >>> from trainkit import frozen
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> with frozen(model, "[0]") as names:
        ...     model(torch.ones(3, 2)).sum().backward()
        >>> names, model[0].weight.grad
        (['0.weight', '0.bias'], None)

    Source: https://docs.pytorch.org/docs/stable/notes/autograd.html#setting-requires-grad
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Layers = "**",
        *,
        buffers: bool = True,
        eval_mode: bool = False,
    ) -> None:
        super().__init__()
        check_module(module, "frozen(model, 'embeddings')")
        self._chosen, self._modes = Chosen(module, layers), (buffers, eval_mode)

    @contextmanager
    def around_step(self) -> Iterator[list[str]]:
        """Return a new context, which a step enters around each micro-batch."""
        selection, holder = self._chosen.now(), object()
        modules = _held(selection, *self._modes)
        try:
            # Ctrl-C may come after any call: what was found is noted before it is changed.
            for *_, parameter in selection.slots:
                _found.setdefault(id(parameter), _Found(parameter)).holders.add(holder)
                parameter.requires_grad, parameter.grad = False, None
            for module in modules:
                _pin(module, holder)
            yield [slot.name for slot in selection.slots]
        finally:
            try:
                _release(selection, modules, holder)
            except BaseException:
                _release(selection, modules, holder)  # the rest, after Ctrl-C
                raise


def _held(selection: Selection, buffers: bool, eval_mode: bool) -> list[nn.Module]:
    """The modules to keep in evaluation mode."""
    owners, others = selection.buffer_owners, selection.modules if eval_mode else []
    return owners + others if buffers else [m for m in others if m not in owners]


def _release(selection: Selection, modules: list[nn.Module], holder: object) -> None:
    for name, owner, parameter in selection.slots:
        if found := _found.get(id(parameter)):
            found.holders.discard(holder)
            if not found.holders:
                # load_state_dict(assign=True) in the block puts in another parameter.
                found.restore(parameter, getattr(owner, name.rpartition(".")[2], None))
                del _found[id(parameter)]
    # In reverse, because a compiled module has the mode of the module inside it.
    for module in reversed(modules):
        _unpin(module, holder)


class _Found:
    """Flag and gradient of a parameter before the first of the blocks that hold it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.requires_grad, self.grad = parameter.requires_grad, parameter.grad
        self.holders: set[object] = set()

    def restore(self, parameter: nn.Parameter, now: Any) -> None:
        """Give the flag back to a parameter, and to the one that is in its place now."""
        try:
            parameter.requires_grad, parameter.grad = self.requires_grad, self.grad
        except RuntimeError:  # after a cast or a move in the block, the gradient does not fit
            parameter.grad = None
        if isinstance(now, nn.Parameter):
            other = _found.get(id(now), now)
            other.requires_grad = other.requires_grad or self.requires_grad


# By id of the parameter; not an attribute of it, which copies and files would have too.
_found: dict[int, Any] = {}


def freeze(
    module: nn.Module, layers: Layers = "**", *, buffers: bool = True, eval_mode: bool = False
) -> list[str]:
    """Freezes layers until ``unfreeze``, with the arguments of ``frozen``.

    Equivalent to this; inside a ``frozen`` block it applies when the block ends::

        for parameter in selected:
            parameter.requires_grad, parameter.grad = False, None
        for module in owners_of_selected_buffers:
            module.eval()  # and model.train() does not undo it

    Returns:
        The names of the frozen parameters. A tied parameter appears under all its names.

    Raises:
        TypeError, ValueError: as ``frozen`` does.

    Example:
        >>> import torch
        >>> from trainkit import freeze, frozen_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> freeze(model, "[0]") == frozen_parameters(model)
        True
        >>> frozen_parameters(model)
        ['0.weight', '0.bias']
    """
    selection = _selected("freeze", module, layers)
    for *_, parameter in selection.slots:
        if found := _found.get(id(parameter)):
            found.requires_grad, found.grad = False, None
        parameter.requires_grad, parameter.grad = False, None
    for owner in _held(selection, buffers, eval_mode):
        _pin(owner, "freeze")
    return [slot.name for slot in selection.slots]


def _selected(function: str, module: nn.Module, layers: Layers) -> Selection:
    """Select layers, and warn of a pattern such as "*.bias" that misses most of this name."""
    check_module(module, f"{function}(model, 'embeddings')")
    for layer in (words := normalise(layers)):
        if isinstance(layer, str) and layer.startswith("*.") and layer[2:].isidentifier():
            few, count = (len(select(module, (word,)).slots) for word in (layer, f"*{layer}"))
            if count > 4 * few:
                found = f"{layer!r} selects {few} of {count} parameters, one level down"
                warnings.warn(f"{found}: `'*{layer}'` selects all", stacklevel=3)
    return select(module, words)


def unfreeze(module: nn.Module, layers: Layers = "**") -> list[str]:
    """Makes layers trainable: the inverse of ``freeze``, with the same ``layers``.

    Equivalent to this; inside a ``frozen`` block it applies when the block ends::

        for parameter in selected:
            parameter.requires_grad = True
        for module in modules_that_freeze_keeps_in_evaluation_mode:
            module.train(mode_last_asked_for)

    Returns:
        The names of the trainable parameters. A tied parameter appears under all its names.

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
    selection = _selected("unfreeze", module, layers)
    # Integers, as quantised weights are, have no gradient.
    slots = [s for s in selection.slots if s.parameter.dtype.to_real().is_floating_point]
    for *_, parameter in slots:
        (_found.get(id(parameter)) or parameter).requires_grad = True
    for owner in (*selection.modules, *selection.buffer_owners, *selection.above):
        _unpin(owner, "freeze")
    with suppress(ImportError):  # a lifted cell may be without it
        from trainkit.evidence import note_unfrozen

        note_unfrozen([slot.parameter for slot in slots])
    return [slot.name for slot in slots]


def frozen_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that do not require a gradient; a tied one has all its names.

    Equivalent to::

        named = module.named_parameters(remove_duplicate=False)
        [name for name, parameter in named if not parameter.requires_grad]

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
    check_module(module, "frozen_parameters(model)")
    named = module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if not parameter.requires_grad]


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient, each once: what an optimizer is given.

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
    check_module(module, "trainable_parameters(model)")
    return [p for p in module.parameters() if p.requires_grad]


# What a pin replaces. `train` comes last, since `_unpin` looks for the pin there after Ctrl-C.
_METHODS = "reset_running_stats", "train"


class _Pin:
    """Replaces ``module.train``: notes the mode that is asked for, and keeps evaluation mode.

    It is on the instance, where torch.compile notices it. A compiled model ignores later hooks.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.asked = module, getattr(module, "training", True)
        # Methods that the user replaced on the instance.
        self.found = {n: vars(module)[n] for n in _METHODS if n in vars(module)}
        self.holders: set[object] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        train = self.found.get("train") or functools.partial(type(self.module).train, self.module)
        try:
            self.module.training = self.asked
            train(*args, **kwargs)
            self.asked = self.module.training
        finally:
            self.module.training = False
        return self.module

    def __reduce__(self) -> tuple[Any, ...]:
        from pydoc import locate  # not at the top, because it loads sysconfig

        here = _Copied(getattr, _Copied(locate, f"{__name__}._pin_copy"), "__call__", getattr)
        return here, (self.module, "train", [self.asked, self.found])


def _pin_copy(module: nn.Module, name: str, state: list[Any]) -> _Pin:
    """Hold the copy of a module until ``unfreeze``."""
    pin = _pin(module, "freeze")
    pin.asked, pin.found = state
    return pin


class _Copied(functools.partial[Any]):
    """Calls ``_pin_copy`` for deepcopy, and is pickled as a call of the function it holds.

    A file has to load without trainkit too. There ``locate`` returns None, which has no
    ``__call__``. So the default, ``getattr``, is called in place of ``_pin_copy``, and finds the
    plain ``train`` of the module.
    """

    __call__ = staticmethod(_pin_copy)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.func, self.args


def reset_running_stats(module: nn.Module) -> None:
    """Replaces the method, so that frozen statistics stay. Pickle looks for it by this name."""


def _pin(module: nn.Module, holder: object) -> _Pin:
    if not isinstance(pin := vars(module).get("train"), _Pin):
        pin = _Pin(module)
    pin.holders.add(holder)
    vars(module)["train"] = pin
    # A lazy module resets its statistics when it makes them.
    if hasattr(type(module), "reset_running_stats") and not hasattr(module, "cls_to_become"):
        vars(module)["reset_running_stats"] = types.MethodType(reset_running_stats, module)
    module.training = False
    return pin


def _unpin(module: nn.Module, holder: object) -> None:
    if isinstance(pin := vars(module).get("train"), _Pin):
        pin.holders.discard(holder)
        if not pin.holders:
            module.training = pin.asked
            for name in _METHODS:
                if name in pin.found:
                    vars(module)[name] = pin.found[name]
                else:
                    vars(module).pop(name, None)
