"""The step: runs a plan, micro-batch by micro-batch, and owns all state. Read it from ``__call__`` on.

Whatever order the parts were given in, a micro-batch runs in this one::

    surroundings entered > autocast on > the function > autocast off > backward > [update] > left
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from trainkit.core.fused import forget
from trainkit.core.generators import run_to_end, run_to_yield
from trainkit.core.loop import LAST, NONE, Delivery, mark_last, over
from trainkit.core.losses import read_loss
from trainkit.core.plan import Plan, Surrounding, check, check_length
from trainkit.core.precision import keep_casts_fresh
from trainkit.core.update import Answer, Updater
from trainkit.core.window import Size, Versions, Weight, Window, as_weight, is_changed

_run_on_cpu = torch.autograd.Variable._execution_engine.run_backward  # type: ignore[attr-defined]
P = ParamSpec("P")
T = TypeVar("T")


class StepResult:
    """The result of one call of a step.

    Attributes:
        loss: of this micro-batch: 0-d, detached, unscaled. None in a block without a loss.
        complete: whether this call closed a window.
        grad_norm: the norm of the window's true gradients before clipping: 0-d float32 or float64
            on the device. None where no norm was computed.
    """

    # On the class: a result is made for every micro-batch, and most of them keep most of these.
    loss: Tensor | None = None
    complete = False
    grad_norm: Tensor | None = None
    _skipped: bool | Tensor = False
    _settle: Callable[[], None] | None = None
    _window: Window | None = None
    _count = 0

    @property
    def window_loss(self) -> Tensor | None:
        """The weighted mean of the window's losses up to this call: 0-d, computed when read."""
        return None if self._window is None else self._window.mean_loss(self._count)

    @property
    def updated(self) -> bool:
        """Whether this call applied an update. Reading it may wait for the device, and runs
        ``after`` first; no other attribute waits."""
        if self._settle is not None:
            self._settle()
        return self.complete and not self._skipped

    def __repr__(self) -> str:
        shown = f"loss={self.loss}, complete={self.complete}, updated={self.updated}"
        return f"StepResult({shown}, grad_norm={self.grad_norm})"


class Step(Generic[P]):
    """A training step: call it with a micro-batch, or use it as a context around one.

    Made by ``train_step``, and by applying parts to functions; ``train_step`` shows the loop that it
    is equivalent to.
    """

    _updater: Updater = None  # type: ignore[assignment]  # made at the first call

    def __init__(self, plan: Plan, function: Callable[P, Any] | None = None) -> None:
        if function is not None:  # without its __dict__, which could overwrite attributes here
            functools.update_wrapper(self, function, updated=())
        self._plan, self._function = plan, function
        self._autocast: torch.autocast | None = None
        self._cast_weights: list[Tensor] = []
        self._watchers: list[Any] = []
        self._deliver: Callable[[Iterable[Any]], Iterator[Delivery]] = mark_last
        self._delivery = NONE
        self._ended_early = False
        # From window to window.
        self._window: Window | None = None
        self._reference: Weight | None = None
        self._closed = 0
        self._skips: int | Tensor = 0
        self._owed: Answer | None = None  # the verdict that ``after`` waits for
        # The micro-batch under way.
        self._result: StepResult | None = None
        self._size: Size = 1
        self._weight: Weight | None = None
        self._lent: Window | None = None  # the window whose sums are in ``.grad``
        self._share: Weight = 1.0
        self._left: Versions = []  # the gradients as a block found them, or a backward left them
        self._generator: types.GeneratorType[Any, None, Any] | None = None
        self._entered: list[AbstractContextManager[Any]] = []
        self._autocast_is_on = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        result = self._begin()
        try:
            if self._autocast is None:
                output = self._run(*args, **kwargs)
            else:
                with self._autocast:
                    output = self._run(*args, **kwargs)
            loss, weight = read_loss(output)
            self._backward(loss, weight)
            result.loss = loss.detach()
            self._finish(result)
            self._end()
        except BaseException:
            self._abort()
            raise
        return result

    def _begin(self) -> StepResult:
        """Enter what surrounds a micro-batch."""
        if self._result is not None:
            raise RuntimeError(
                "this step is under way already: give a further loss of the same micro-batch to "
                "`step.backward(loss)`"
            )
        if self._updater is None:
            self._prepare()
        if self._owed is not None and self._owed.known():
            self.settle()
        if self._window is None:
            self._window = self._new_window()
        result = StepResult()
        try:
            for part in self._plan.surroundings:
                context = part.around_step()
                context.__enter__()
                self._entered += [context]  # no call, which a signal could follow
            if self._autocast is not None:
                self._watch_casts()
            self._result = result
        except BaseException:
            self._end()
            raise
        return result

    def _run(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run the step function down to its loss."""
        output = self._function(*args, **kwargs)  # type: ignore[misc]
        if isinstance(output, types.GeneratorType):
            self._generator = output
            check(
                not self._plan.after,
                ValueError,
                "`after` was given to a step function that yields its loss and has its own update "
                "code: put the call below the yield",
            )
            return run_to_yield(output)
        if not self._plan.optimizers:
            raise ValueError(f"no optimizer was given: {_NO_OPTIMIZER}")
        return output

    def _backward(self, loss: Tensor, weight: Any) -> None:
        """Add the gradient of a loss, times its share, to the sums of the window."""
        if self._left:
            self._check_untouched()
        window = self._window
        if window is None:  # a block discarded it
            window = self._window = self._new_window()
        if weight is not None:
            weight = as_weight(weight, loss.device)
        parameters = self._plan.parameters()
        if self._lent is None:
            if self._updater.scale is not None and not window.losses:
                _refuse_float16(parameters)
            self._weight, self._share = weight, window.share(weight, self._size)
            self._lent = window
        elif weight is not None and not _same(weight, self._weight):
            raise TypeError(
                f"the losses of a micro-batch share one weight, the first came with {self._weight} "
                f"and this one with {weight}: `step.backward(first, weight)`"
            )
        try:
            window.lend(parameters)
            seed = self._updater.seed(loss, self._share)
            kind = loss.device.type
            if torch.is_autocast_enabled(kind):  # in a block, or around the whole loop
                with torch.autocast(kind, enabled=False):
                    loss.backward(gradient=seed)  # type: ignore[no-untyped-call]
                torch.clear_autocast_cache()  # or every later forward would use the old weights
            elif type(loss) is Tensor:
                # Tensor.backward, without 15 us of checks that the seed is known to pass.
                run = _run_on_cpu if loss.is_cpu else _engine_run_backward
                run(
                    (loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            else:
                loss.backward(gradient=seed)  # type: ignore[no-untyped-call]
        except BaseException as error:
            self.discard()  # at once: a block may catch this and continue
            if isinstance(error, RuntimeError):
                from trainkit.core.advice import explain

                explain(error)
            raise

    def _closes(self) -> bool:
        """Return whether the micro-batch under way is the last of its window."""
        window = self._window
        assert window is not None
        return self._delivery.is_last or window.size + self._size >= window.length

    def _finish(self, result: StepResult) -> None:
        """Count the micro-batch, and make the update if it closes the window."""
        window, closes = self._window, self._closes()
        assert window is not None and result.loss is not None
        if self._left:
            self._check_untouched()
        window.add(result.loss, self._weight, self._size)
        result._window, result._count = window, len(window.losses)
        if closes:
            self._close(window, result)
        else:
            window.take()
        if self._generator is not None:
            self._generator.close()
        self._lent = None

    def _close(self, window: Window, result: StepResult) -> None:
        """Turn the gradients of a complete window into an update."""
        if window.size < window.length:
            if self._ended_early:
                from trainkit.core.advice import warn_of_short_windows

                warn_of_short_windows()
            self._ended_early = True
        self.settle()
        for watcher in self._watchers:
            watcher.before_update(self)
        result.complete = True
        gradients = window.close(self._plan.parameters())
        if not self._closed or not gradients:
            from trainkit.core.advice import warn_of_missing

            warn_of_missing(gradients, self._plan.parameters())
        generator = self._generator
        own = None if generator is None else functools.partial(run_to_end, generator)
        verdict, apply = self._updater.decide(window, gradients, own)
        owed = Answer(verdict.skipped) if self._plan.after else None
        reference, skips = window.next_reference(), self._skips + verdict.skipped
        try:
            if apply is not None:
                apply()
            # One statement, so that Ctrl-C cannot separate the update from its count.
            self._window, self._reference, self._closed, self._skips, self._owed = (
                None, reference, self._closed + 1, skips, owed,
            )  # fmt: skip
        finally:
            forget(self._plan.optimizers)
        result._skipped, result.grad_norm = verdict.skipped, verdict.norm
        result._settle = self.settle
        try:
            if verdict.found_inf is not None and (count := self._updater.learn(verdict.found_inf)):
                from trainkit.core.advice import too_many_skips

                raise too_many_skips(self, count)
        finally:
            for watcher in self._watchers:
                watcher.after_update(self, window, verdict)
        if generator is None or verdict.skipped is True:
            window.drop()
        if owed is not None and owed.known():
            self.settle()

    def _end(self) -> None:
        """Leave what surrounds the micro-batch. May be called again if it was interrupted."""
        try:
            if self._autocast_is_on:
                self._leave_autocast()
            if self._generator is not None:
                self._generator.close()
        finally:
            self._result = self._generator = self._lent = None
            self._left = []
            while self._entered:
                self._entered[-1].__exit__(None, None, None)
                del self._entered[-1]

    def _abort(self) -> None:
        """Leave the micro-batch after an exception.

        From its backward on, some of its gradients may be in and others not: the window is dropped.
        """
        try:
            if self._lent is not None:
                self.discard()
        finally:
            self._end()

    def __enter__(self) -> StepResult:
        result = self._begin()
        try:
            self._left = self._window.versions(self._plan.parameters())
            if self._autocast is not None:
                self._autocast_is_on = True
                self._autocast.__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            self._abort()
            raise
        return result

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        if kind is not None:
            self._abort()
            return
        try:
            result = self._result
            assert result is not None
            if self._autocast_is_on:
                self._leave_autocast()
            if self._lent is not None and result.loss is None:
                self.discard()  # the block caught an exception of step.backward
            elif self._lent is not None:
                self._finish(result)
            elif is_changed(self._left, are_lent=False):
                from trainkit.core.advice import warn_of_no_loss

                warn_of_no_loss()
            self._end()
        except BaseException:
            self._abort()
            raise

    def backward(self, loss: Any, weight: Weight | None = None) -> None:
        """Run backward of a loss: of *the* loss in a block, of a further loss anywhere.

        Equivalent to ``(loss * share).backward()`` with autocast off, where the share comes from the
        weights of the window and the loss scale. A further loss has the share of the first one, and
        the micro-batch counts once. Until it ends, ``.grad`` holds the scaled sums of the window.

        Args:
            loss: the mean over the micro-batch: 0-d, floating, with a graph. Or whatever else a step
                function may return.
            weight: the number of things that mean is over, an int or a 0-d integer tensor.

        Raises:
            TypeError, ValueError: for another loss or weight, before anything is changed.
            RuntimeError: outside a micro-batch, and where something other than ``step.backward``
                changed gradients since the last one: a ``zero_grad()``, or a ``loss.backward()``.
        """
        if self._result is None or self._result.complete:
            raise RuntimeError(
                "step.backward(loss) must be called inside a micro-batch, in `with step:` or in the "
                "step function; below the yield gradients are complete: `loss.backward()` adds to them"
            )
        loss, weight = read_loss(loss if weight is None else (loss, weight))
        detached = loss.detach()
        self._backward(loss, weight)
        if self._lent is not None:
            self._left = self._lent.versions(self._lent.parameters)
        if self._result.loss is None:
            self._result.loss = detached

    def last(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        """Call the step, and close the window with this micro-batch: for loops without ``over``."""
        found, self._delivery, self._ended_early = self._delivery, LAST, False
        try:
            return self(*args, **kwargs)
        finally:
            self._delivery = found

    def over(
        self, loader: Iterable[T], *others: Step[Any], progress: bool | Mapping[str, Any] = False
    ) -> Iterator[T]:
        """Iterate over a loader, and let its last batch close the open windows of the steps.

        Equivalent to ``for batch in loader`` where the last batch goes to ``step.last``. A loader
        without a length is read one batch ahead. On several ranks all get as many batches as the
        rank with most: one that has run out gets its last batch again, and it counts nothing.

        Args:
            loader: what a loop can iterate over.
            others: further steps whose windows end with the loader.
            progress: True shows a bar of tqdm; a mapping has arguments for tqdm.

        Raises:
            TypeError: for another loader, step or ``progress``.
            ValueError: on several ranks, if one of them has no batch.

        Example:
            >>> import torch
            >>> from trainkit import accumulate, train_step
            >>> weight = torch.nn.Parameter(torch.zeros(()))
            >>> parts = torch.optim.SGD([weight], lr=1.0), accumulate(2)
            >>> step = train_step(*parts)(lambda x: (weight - x) ** 2)
            >>> [step(x).complete for x in step.over([1.0, 2.0, 3.0])]
            [False, True, True]
        """
        is_iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
        came = f"got {type(loader).__name__}: `step.over(loader)`"
        check(is_iterable, TypeError, f"step.over takes a loader or another iterable, {came}")
        for step in others:
            came = f"got {type(step).__name__}: `step_d.over(loader, step_g)`"
            check(
                isinstance(step, Step), TypeError, f"step.over takes steps after a loader, {came}"
            )
        batches = over(loader, (self, *others))
        if progress is False:
            return batches
        from trainkit.watch.progress import with_progress

        return with_progress(batches, loader, (self, *others), progress)

    def discard(self) -> None:
        """Drop the open window, if there is one: nothing applied, nothing counted."""
        window, lent, self._window, self._lent = self._window, self._lent, None, None
        for dropped in (window, lent):
            if dropped is not None:
                dropped.drop()
        forget(self._plan.optimizers)

    def settle(self) -> None:
        """Run ``after`` for the last update if that is still owed, waiting for the verdict.

        Called before the next update, at the end of ``over``, and where ``updates`` is read.
        """
        if self._owed is None:
            return
        skipped = bool(self._owed.read())  # Ctrl-C may end this wait: until then it is owed
        self._owed = None
        for call in () if skipped else self._plan.after:
            call()

    @property
    def updates(self) -> int:
        """Updates applied so far. Reading it may wait for the device."""
        self.settle()
        return self._closed - int(self._skips)

    @property
    def skipped(self) -> int:
        """Updates skipped so far: gradients not finite, or no weight above 0. May wait."""
        self.settle()
        return int(self._skips)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the counters, the loss scale, and the open window with its gradients.

        Raises:
            RuntimeError: inside a micro-batch, from its backward on.
        """
        from trainkit.saving.state import state_of

        self._check_between("state_dict")
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from where ``state_dict`` was called. An open window is dropped first.

        Raises:
            ValueError: for another state, or one that does not fit, before anything is changed.
            RuntimeError: inside a micro-batch, from its backward on.
        """
        from trainkit.saving.state import load_into

        self._check_between("load_state_dict")
        load_into(self, state)

    def _check_between(self, name: str) -> None:
        if self._lent is not None:
            raise RuntimeError(
                f"step.{name}() was called inside a micro-batch, which is half done: call it between "
                "two micro-batches"
            )
        if self._updater is None:
            self._prepare()

    def _check_untouched(self) -> None:
        """Raise RuntimeError if gradients changed since a block or a backward left them."""
        left, are_lent, self._left = self._left, self._lent is not None, []
        if is_changed(left, are_lent):
            from trainkit.core.advice import disturbance

            error = disturbance(left, are_lent)
            if are_lent:
                self.discard()
            raise error

    def _leave_autocast(self) -> None:
        assert self._autocast is not None
        self._autocast_is_on = False
        self._autocast.__exit__(None, None, None)

    def _watch_casts(self) -> None:
        for weight in self._cast_weights:
            if not weight.requires_grad:
                break
        else:
            if self._cast_weights:
                return
        self._cast_weights = keep_casts_fresh(self._plan.optimized())

    def _prepare(self) -> None:
        """Pick the precision, and refuse a plan that cannot work. Runs at the first call."""
        plan, deliver, dtype = self._plan, self._deliver, torch.float32
        device = plan.check_trainable().device
        if plan.precision is not None:
            kind, dtype = plan.precision.resolve(device)
            self._autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else None
        with torch.inference_mode(False):  # an evaluation may come first
            updater = Updater(plan, is_scaled=dtype == torch.float16)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from trainkit.ranks.join import join

            plan, deliver = join(self, updater)
        self._plan, self._deliver, self._updater = plan, deliver, updater

    def _new_window(self) -> Window:
        lengths = self._plan.lengths
        counts = [n if isinstance(n, int) else check_length(n(self.updates)) for n in lengths]
        window: Window = (self._plan.window or Window)(math.prod(counts), self._reference)
        return window

    def _add_part(self, part: Surrounding) -> Step[P]:
        return type(self)(self._plan + Plan(surroundings=(part,)), self._function)

    def __get__(self, instance: object, owner: type | None = None) -> Step[P]:
        if instance is None:
            return self
        name = getattr(self._function, "__name__", "step")
        raise TypeError(
            f"the method {name!r} of {type(instance).__name__} was decorated, and all instances "
            f"would share one state: `self.step = train_step(...)(self.{name})` in __init__"
        )


_NO_OPTIMIZER = "`train_step(optimizer, ...)`, or `yield loss` and update below the yield"


def _same(a: Weight, b: Weight | None) -> bool:
    """Return whether two weights may be equal; tensors are not read, which could wait."""
    return b is not None and (isinstance(a, Tensor) or isinstance(b, Tensor) or a == b)


def _refuse_float16(parameters: list[torch.nn.Parameter]) -> None:
    shapes = [tuple(p.shape) for p in parameters if p.dtype == torch.float16 and p.requires_grad]
    if shapes:
        raise ValueError(
            f"{len(shapes)} of {len(parameters)} parameters are float16 (the first has shape "
            f"{shapes[0]}), and a loss scale needs float32 parameters: load the model with "
            "`dtype=torch.float32`, or call `model.float()` before making the optimizer"
        )
