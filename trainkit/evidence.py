"""Signs that a loop does not train as its author thinks. A step warns of each once."""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import operator
import sys
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from trainkit.core.generators import run_to_end
from trainkit.core.plan import Plan, check, parameters_of
from trainkit.core.warning import warn

unfrozen: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by id
evidence: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of each step that was called


def note_unfrozen(parameters: list[Any]) -> None:
    """Have every step check, when a window closes, that some optimizer holds these."""
    unfrozen.update({id(p): p for p in parameters})
    for found in evidence.values():
        found.awaits, found.gradients = True, _gradients()


def _gradients() -> dict[int, Any]:
    """Return what tells whether unfrozen parameters get a gradient from now on."""
    found = [(i, p.grad) for i, p in unfrozen.items()]
    return {i: (id(grad), grad._version) for i, grad in found if grad is not None}


class Evidence:
    """What was seen of one step and its updates. Its hooks on optimizers change nothing."""

    only_looks = True
    lost: ClassVar[list[int]] = []  # micro-batches in the open windows of steps that are gone
    has_hinted: ClassVar[bool] = False
    running: ClassVar[set[Any]] = set()  # whose update code runs now

    def __init__(self, step: Any) -> None:
        self.awaits = True  # whether ``tell`` is called although nothing was below a yield
        self.gradients = _gradients()
        self.windows = self.idle_calls = 0
        # Trained parameters, their versions and sums, before the code below a yield.
        self.before: tuple[list[Any], list[int], list[Any]] | None = None
        # Whether versions or hooks tell of updates; None before the first.
        self.updates_show: bool | None = None
        self.is_bare = False  # whether there is no line below the yield
        self.stepped: list[Any] = []
        evidence[step] = self
        hint_at_exit()
        if len(Evidence.lost) > 1:
            hint()
        for optimizer in () if step._yields else filter(_calls_hooks, step._plan.optimizers):
            optimizer._optimizer_step_pre_hooks[id(Evidence)] = Evidence._note_idle

    @classmethod
    def _note_idle(cls, optimizer: Any, args: Any, closure: Any) -> None:
        """Count a call of ``optimizer.step()`` that finds no gradient, and is not the step's."""
        if args[1:] or closure or _has_gradient(optimizer):
            return
        owners = [step for step in evidence if optimizer in step._plan.optimizers]
        for step in owners if len(owners) == 1 else ():  # another may need this call
            is_own = step._running is not None and step._running.result.complete
            evidence[step].idle_calls += not is_own

    @staticmethod
    def check_loss(loss: Tensor) -> None:
        """Raise ValueError for ``scaler.scale(loss)``: a step that updates does not unscale it."""
        node: Any = loss.grad_fn
        factor = node._saved_other if node is not None and node.name() == "MulBackward0" else None
        if factor is not None and not factor.dim() and not factor.requires_grad:
            is_scaled = any(
                getattr(scaler, "_scale", None) is factor for scaler in _alive(torch.amp.GradScaler)
            )
            fault = "the loss was scaled by a GradScaler, and the step does not unscale gradients"
            check(not is_scaled, ValueError, f"{fault}: `return loss`, and give the step `amp()`")

    @classmethod
    def _note_stepped(cls, optimizer: Any, *_: Any) -> None:
        for found in tuple(cls.running):
            found.stepped += [optimizer] * _has_gradient(optimizer)

    def run(self, plan: Plan, generator: Any) -> None:
        """Run the update code below the yield, and note what shows whether a parameter moved."""
        _note_every_update()
        frame, sums, parameters = generator.gi_frame, [], plan.parameters()
        parameters = [p for p in parameters if p.requires_grad]
        if self.updates_show is None:
            lines = {line for _, end, line in frame.f_code.co_lines() if end > frame.f_lasti}
            self.is_bare, sums = lines <= {None, frame.f_lineno}, _checksums(parameters)
        self.before, self.stepped = (parameters, [*map(_version, parameters)], sums), []
        try:
            Evidence.running.add(self)
            run_to_end(generator)  # the last call here: Ctrl-C must find no point before the count
        except BaseException:
            self.before = None
            Evidence.running.discard(self)
            raise

    def tell(self, step: Any, result: Any) -> None:
        """Warn of what a closed window shows, once each. Correct ``result.updated``."""
        Evidence.running.discard(self)
        plan, found, self.windows = step._plan, {}, self.windows + 1
        if any(map(plan.optimizers.__contains__, self.stepped)):  # as in nearly every window
            self.updates_show = True
        elif self.before is not None:
            if not self._has_moved(*self.before):
                result._skipped = True
                if self.updates_show is None and (self.is_bare or self.windows > 7):
                    found["still"] = _STILL
            if other := _stepped_instead(plan, self.stepped):
                found["instead"] = _INSTEAD.format(*map(_kind, (other, plan.optimizers[0])))
        self.before, self.stepped = None, []
        if self.awaits and (idle := _idle(plan, self.gradients)):
            found["idle"] = _IDLE.format(len(idle), tuple(idle[0].shape))
        if self.idle_calls > 1:
            found["beside"] = _BESIDE
        self.awaits = self.windows < 3
        for optimizer in () if self.awaits or step._yields else plan.optimizers:
            getattr(optimizer, "_optimizer_step_pre_hooks", {}).pop(id(Evidence), None)
        for key in found.keys() - step._warned:
            step._warned.add(key)
            warn(found[key])

    def _has_moved(self, parameters: list[Any], versions: list[int], sums: list[Any]) -> bool:
        trained = {*map(id, parameters)}  # fused kernels leave versions as they are
        is_stepped = any(_ids_in(optimizer) & trained for optimizer in self.stepped)
        if is_stepped or [*map(_version, parameters)] != versions:
            self.updates_show = True
            return True
        if self.updates_show is None and _values(_checksums(parameters)) != _values(sums):
            self.updates_show = False  # ``p.data``, or a kernel of which torch knows nothing
        return self.updates_show is False


_STILL = (
    "nothing below `yield loss` moves a parameter: call `optimizer.step()` there, or `return loss`"
)
_INSTEAD = (
    "below the yield {} stepped in place of the {} of the step, which scales and clips only what "
    "its own optimizer holds: make the step anew too, `train_step(optimizer)`"
)
_IDLE = (
    "{} parameter(s) that unfreeze made trainable get gradients, the first of shape {}, and no "
    "optimizer of the step holds them: `optimizer.add_param_group(...)`, or make the step anew"
)
_BESIDE = (
    "`optimizer.step()` found no gradients, beside a step that steps the optimizer itself: remove "
    "it, or put it below `yield loss`"
)


def _stepped_instead(plan: Plan, stepped: list[Any]) -> Any:
    """Return an optimizer outside the plan that stepped parameters of the plan in place of its own.

    An optimizer without hooks shows nothing. An optimizer inside one of the plan counts as its own.
    """
    own, trained = plan.optimizers, {*map(id, plan.parameters())}
    if not stepped or not own or not all(map(_calls_hooks, own)):
        return None
    known = {id(x) for o in own for x in (o, *o.param_groups, *vars(o).values())}
    if any(id(x) in known for other in stepped for x in (other, *other.param_groups)):
        return None
    return next((other for other in stepped if _ids_in(other) & trained), None)


def _idle(plan: Plan, before: dict[int, Any]) -> list[Tensor]:
    """Return parameters that ``unfreeze`` made trainable, with new gradients that nothing reads.

    Parameters of another step do not count, nor parameters of an optimizer that shares nothing
    with this plan: the discriminator of a GAN gets gradients in the step of the generator.
    """
    own = {*map(id, plan.parameters())}
    new = [i for i, gradient in _gradients().items() if gradient != before.get(i)]
    idle = [p for p in map(unfrozen.get, new) if p is not None and p.requires_grad]
    idle = [p for p in idle if id(p) not in own]
    if not idle:
        return []
    held = [_ids_in(optimizer) for optimizer in _alive(torch.optim.Optimizer)]
    held = [ids for ids in held if not ids & own]
    held += [{*map(id, step._plan.parameters())} for step in evidence if step._plan is not plan]
    return [p for p in idle if not any(id(p) in ids for ids in held)]


def hint(is_exit: bool = False) -> None:
    """Warn once in a process of steps that ended with an open window, except in tests and after
    errors."""
    for step in list(evidence) if is_exit else ():
        step.__del__()
    lost, is_quiet = sum(Evidence.lost), hasattr(sys, "last_type") or "pytest" in sys.modules
    Evidence.lost.clear()
    if lost and not is_quiet and not Evidence.has_hinted:
        Evidence.has_hinted = True
        ended = f"{lost} micro-batch(es) in open windows were never applied"
        loops = "loop over `step.over(loader)`, or call `step.close()`"
        warn(f"{ended}: {loops}, and make the step before the loop")


@functools.cache
def _note_every_update() -> None:
    """Register the hook for good, since another thread may iterate over all hooks."""
    register_optimizer_step_post_hook(Evidence._note_stepped)


@functools.cache
def hint_at_exit() -> None:
    """Call ``hint`` when the process ends."""
    atexit.register(hint, is_exit=True)


def _calls_hooks(optimizer: Any) -> bool:
    has_hooks = hasattr(optimizer, "_optimizer_step_pre_hooks")
    return has_hooks and hasattr(optimizer.step, "hooked")


def _has_gradient(optimizer: Any) -> bool:
    return any(p.grad is not None for p in parameters_of(optimizer))


def _ids_in(optimizer: Any) -> set[int]:
    return {*map(id, parameters_of(optimizer))}


def _alive(kind: type) -> list[Any]:
    found = gc.get_objects()  # many: looked at in C
    return [*itertools.compress(found, map(issubclass, map(type, found), itertools.repeat(kind)))]


_version, _kind = operator.attrgetter("_version"), operator.attrgetter("__class__.__name__")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksums(parameters: list[Any]) -> list[Tensor]:
    """Return the sum over the bits of each parameter, which shows updates of any size."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    local = [torch.view_as_real(p) if p.is_complex() else p for p in local]
    return [p.detach().view(_BITS[p.element_size()]).sum() for p in local]


def _values(numbers: list[Tensor]) -> list[Any]:
    return [number.item() for number in numbers]
