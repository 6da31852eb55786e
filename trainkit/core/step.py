"""The step: runs a plan, micro-batch by micro-batch, and owns all state.

Read ``Step.__call__`` first, then ``MicroBatch``. A micro-batch runs in this order, whatever the
order of the parts::

    surroundings entered > autocast on > the function > autocast off > backward > [update] > left
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import unserializable_hook

from trainkit.core.fused import forget
from trainkit.core.generators import run_to_end, run_to_yield
from trainkit.core.loop import OUTSIDE, Batches, Delivery, length_of, mark_last, over
from trainkit.core.losses import detached, read_loss
from trainkit.core.plan import (
    Plan,
    Surrounding,
    check,
    check_count,
    check_length,
    check_plan,
    check_stepping,
)
from trainkit.core.result import StepResult
from trainkit.core.update import Answer, Updater, requires_grad
from trainkit.core.warning import warn
from trainkit.core.window import Size, Versions, Weight, Window, as_weight, is_changed, versions

P = ParamSpec("P")
T = TypeVar("T")


class Step(Generic[P]):
    """A training step: call it with a micro-batch, or use it as a context around one.

    ``train_step`` makes one, and so does a part that decorates a function. The docstring of
    ``train_step`` shows the equivalent loop.
    """

    def __init__(self, plan: Plan, function: Callable[P, Any] | None = None) -> None:
        if function is not None:  # without its __dict__, which could overwrite attributes here
            functools.update_wrapper(self, function, updated=())
        self._plan, self._function = plan, function
        # Made at the first call, when the parameters are on their device.
        self._updater: Updater = None  # type: ignore[assignment]
        self._autocast: torch.autocast | None = None
        self._cast_weights: list[Tensor] = []
        # From window to window.
        self._window: Window | None = None
        self._reference: Weight | None = None
        self._closed = 0
        self._skips: int | Tensor = 0
        self._verdict: Answer | None = None  # the verdict that ``after`` waits for
        # From micro-batch to micro-batch.
        self._running: MicroBatch | None = None
        self._size: Size = 1
        self._delivery = OUTSIDE
        self._ended_early = False
        call = getattr(function, "__call__", None)  # noqa: B004 - of an object that yields
        self._yields = any(map(inspect.isgeneratorfunction, (function, call)))
        self._after_may_be_late = True
        self._warned: set[str] = set()  # warnings that are given once
        self._deliver: Callable[[Iterable[Any]], Iterator[Delivery]] = mark_last
        self._watchers: list[Any] = []
        self._evidence: Any = None  # of loops that do not train; made with the updater

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        running = self._begin()
        try:
            if self._autocast is None:
                output = running.forward(*args, **kwargs)
            else:
                with self._autocast:
                    output = running.forward(*args, **kwargs)
            loss, weight = read_loss(output)
            running.backward(loss, weight)
            result = running.result
            result.loss = loss.detach()
            result.output = result.loss if output is loss else detached(output)
            running.finish()
            running.leave()
        except BaseException:  # not finally: Ctrl-C may interrupt leave(), which then runs again
            running.leave()
            raise
        return result

    def __enter__(self) -> StepResult:
        running = self._begin()
        try:
            running.watch(self._window)
            if self._autocast is not None:
                self._autocast.__enter__()  # type: ignore[no-untyped-call]
                running.entered += [self._autocast]
        except BaseException:
            running.leave()
            raise
        return running.result

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        running = self._running
        assert running is not None
        try:
            if kind is None:
                if self._autocast is not None:  # forward is over
                    running.leave_last()
                if running.lent is not None and running.result.loss is not None:
                    running.finish()
                elif running.lent is None and is_changed(running.left, are_lent=False):
                    from trainkit.advice import NO_LOSS

                    raise RuntimeError(NO_LOSS)
            running.leave()
        except BaseException:
            running.leave()
            raise

    def backward(
        self,
        loss: Any,
        weight: Weight | None = None,
        *,
        create_graph: bool = False,
        retain_graph: bool | None = None,
        inputs: Any = None,
    ) -> None:
        """Run backward of the loss in a ``with step:`` block, or of a further loss.

        Equivalent to ``(loss * share).backward()`` with autocast off, where the share comes from
        the weights of the window and the loss scale. A further loss has the share of the first, and
        the micro-batch counts once. Until it ends, ``.grad`` holds the scaled sums of the window.

        Args:
            loss: 0-d, floating, with a graph, or anything else that a step function may return.
            weight: the number of rows or tokens that the loss is the mean of: an int or a 0-d
                integer tensor.
            create_graph, retain_graph, inputs: passed to ``Tensor.backward``.

        Raises:
            TypeError, ValueError: for another loss or weight, before anything is changed.
            RuntimeError: outside a micro-batch, and where a ``zero_grad()`` or ``loss.backward()``
                changed gradients inside it.
        """
        running = self._running
        if running is None or running.result.complete:
            where = "in `with step:` or in the step function; below a yield, `loss.backward()`"
            raise RuntimeError(f"step.backward(loss) is called inside a micro-batch: {where}")
        loss, weight = read_loss(loss if weight is None else (loss, weight))
        options = {"create_graph": create_graph, "retain_graph": retain_graph, "inputs": inputs}
        is_plain = not create_graph and retain_graph is None and inputs is None
        running.backward(loss, weight, None if is_plain else options)
        running.watch(running.lent)
        if running.result.loss is None:
            running.result.loss = loss.detach()

    def last(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        """Call the step, and close the window with this micro-batch, in a loop without ``over``."""
        found, self._ended_early = self._delivery, False
        self._delivery = found._replace(is_last=True)  # the rest tells which ranks have a batch
        self._warned.add("end")
        try:
            return self(*args, **kwargs)
        finally:
            self._delivery = found

    def over(
        self,
        loader: Iterable[T],
        *others: Step[Any],
        updates: int | None = None,
        progress: Any = False,
    ) -> Iterator[T]:
        """Iterate over a loader, and let its last batch close the open windows of the steps.

        Equivalent to ``for batch in loader`` where the last batch goes to ``step.last``. A loader
        without a length is read one batch ahead. On several ranks every rank gets as many batches
        as the longest loader has: a rank that has run out repeats its last batch, which counts
        nothing.

        Args:
            loader: any iterable.
            others: further steps whose windows end with the loader.
            updates: iterate over the loader again and again, until this step has closed this many
                windows. The end of the loader then closes none.
            progress: True shows a bar of tqdm; a mapping of arguments is passed to tqdm.

        Raises:
            TypeError: for another loader, step, ``updates`` or ``progress``.
            ValueError: if the loader ends before ``updates``, or a rank has no batch at all.
        """
        is_iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
        fits = is_iterable and all(isinstance(other, Step) for other in others)
        got = ", ".join(type(given).__name__ for given in (loader, *others))
        fault = f"over takes a loader and then steps, got {got}: `step.over(loader, other_step)`"
        check(fits, TypeError, fault)
        if updates is not None:
            fault = f"updates counts windows, an int of at least 1, got {updates!r}"
            check_count(updates, f"{fault}: `step.over(loader, updates=1000)`")
        length = length_of(loader) if updates is None else 0
        batches = Batches(over(loader, (self, *others), updates), length)
        if progress is False:
            return batches
        from trainkit.watch.progress import with_progress

        return with_progress(batches, (self, *others), progress)

    def close(self) -> StepResult:
        """Make the update of the open window now, divided by what is in it.

        Equivalent to giving the latest micro-batch to ``step.last``. Without an open window it does
        nothing, and ``result.complete`` is False.

        Raises:
            RuntimeError: inside a micro-batch, and for a step that yields. Only a call reaches the
                code below the yield: ``step.last(batch)``.
        """
        self._warned.add("end")
        is_between = self._running is None
        check(is_between, RuntimeError, "step.close() inside a micro-batch: call it after `step()`")
        running = self._begin()
        try:
            window, result = self._window, running.result
            if window is not None and window.reduce(self._plan.parameters()):
                last = "`step.last(batch)`, or return the loss in place of `yield loss`"
                check(not self._yields, RuntimeError, f"a step that yields has no close(): {last}")
                check_stepping(self._plan)
                running.lent, result._window, result._count = window, window, len(window.losses)
                running.close(window)
                running.lent = None
            running.leave()
        except BaseException:
            running.leave()
            raise
        return running.result

    def discard(self) -> None:
        """Drop the open window, if there is one. Nothing is applied or counted."""
        running, window, self._window = self._running, self._window, None
        if running is not None and running.lent is not None:
            window, running.lent = running.lent, None
            vars(running.result).pop("loss", None)  # a block may begin again
        if window is not None:
            window.drop()
        forget(self._plan.optimizers)

    def settle(self) -> None:
        """Run ``after`` for the last update if it has not run yet, waiting for the verdict.

        The next update, the end of ``over``, and reading ``updates`` call this.
        """
        if self._verdict is not None:
            skipped = bool(self._verdict.read())  # Ctrl-C may end this wait: until then it is owed
            self._verdict = None
            if not skipped:
                for call in self._plan.after:
                    call()

    @property
    def updates(self) -> int:
        """Updates applied so far. Reading it may wait for the device."""
        return self._closed - self.skipped

    @property
    def skipped(self) -> int:
        """Updates skipped so far: gradients not finite, or no weight above 0. May wait."""
        self.settle()
        return int(self._skips)

    @property
    def loss_scale(self) -> float | None:
        """The loss scale now; None without one. Reading it may wait."""
        if self._updater is None:
            self._prepare()
        scale = self._updater.scale
        return None if scale is None else scale.item()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the counters, the loss scale, and the open window with its gradients.

        RuntimeError inside a micro-batch, from its backward on.
        """
        from trainkit.saving.state import state_of

        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from where ``state_dict`` was called. An open window is dropped first.

        ValueError for a state that does not fit, before anything is changed; RuntimeError as above.
        """
        from trainkit.saving.state import load_into

        load_into(self, state)

    def __repr__(self) -> str:
        from trainkit.advice import described

        return described(self)

    def __reduce__(self) -> Any:
        sent = "a step is not copied or pickled, since its model and optimizer are in use"
        raise TypeError(f"{sent}: make it there, `train_step(...)(f)`, or send `step.state_dict()`")

    @property
    def _torchdynamo_orig_callable(self) -> Any:
        """No attribute, but torch.compile looks for it, and tools that read all attributes do."""
        lost = "torch.compile makes a plain function of a step, without `over`"
        warn(f"{lost}: put `@torch.compile` below `@train_step`")
        raise AttributeError("_torchdynamo_orig_callable")

    def __del__(self) -> None:
        window = getattr(self, "_window", None)  # not there if __init__ raised
        if window is not None and window.losses and self._evidence and "end" not in self._warned:
            self._evidence.lost.append(len(window.losses))  # at exit, modules may be gone

    def __get__(self, instance: object, owner: type | None = None) -> Step[P]:
        shared = "a decorated method would share its state between all instances"
        remedy = "`self.step = train_step(...)(self.loss)` in __init__"
        check(instance is None, TypeError, f"{shared}: {remedy}")
        return self

    def _begin(self) -> MicroBatch:
        if self._running is not None:
            further = "give a further loss of its micro-batch to `step.backward(loss)`"
            raise RuntimeError(f"this step is already running: {further}")
        if self._updater is None:
            self._prepare()
        if self._verdict is not None and self._verdict.known():
            self.settle()
        if self._window is None:
            self._window = self._new_window()
        running = self._micro_batch()
        running.enter()
        return running

    def _prepare(self) -> None:
        """Pick the precision, and refuse a plan that cannot work, at the first call."""
        plan, deliver, dtype = self._plan, self._deliver, torch.float32
        device = check_plan(plan)
        if plan.precision is not None:
            kind, dtype = plan.precision.resolve(device)
            self._autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else None
        with torch.inference_mode(False):  # an evaluation may come first
            updater = Updater(plan, is_scaled=dtype == torch.float16)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from trainkit.ranks.join import join

            plan, deliver = join(self, updater)
        self._after_may_be_late = all(
            isinstance(getattr(call, "__self__", None), LRScheduler) for call in plan.after
        )
        with contextlib.suppress(ImportError):  # a lifted cell may be without it
            from trainkit.evidence import Evidence

            self._evidence = Evidence(self)
        self._plan, self._deliver, self._updater = plan, deliver, updater

    def _new_window(self) -> Window:
        length: float = 1
        for n in self._plan.lengths:
            length *= check_length(n(self.updates)) if callable(n) else n
        kind, is_sum = self._plan.window or Window, self._plan.is_sum
        window: Window = kind(length, self._reference, is_sum)
        return window

    def _closes(self) -> bool:
        """Return whether the micro-batch under way is the last of its window."""
        window = self._window or self._new_window()
        return self._delivery.is_last or window.size + self._size >= window.length

    def _micro_batch(self) -> MicroBatch:
        return MicroBatch(self)

    def _add_part(self, part: Surrounding) -> Step[P]:
        plan = self._plan + Plan(surroundings=(part,))
        kind = plan.step if self._function is not None else None
        return (kind or type(self))(plan, self._function)


class MicroBatch:
    """One micro-batch in a step: forward, backward, and perhaps the update."""

    weight: Weight | None = None
    share: Weight = 1.0
    lent: Window | None = None  # whose sums are in ``.grad``, from the first backward on
    left: Versions = ()  # the gradients as a block found them, or as ``step.backward`` left them
    generator: types.GeneratorType[Any, None, Any] | None = None

    def __init__(self, step: Step[Any]) -> None:
        self.step, self.result = step, StepResult()
        self.entered: list[AbstractContextManager[Any]] = []

    def enter(self) -> None:
        """Enter the contexts that parts put around a micro-batch."""
        step = self.step
        try:
            for part in step._plan.surroundings:
                context = part.around_step()
                context.__enter__()
                self.entered += [context]  # no call, which a signal could follow
            if step._autocast is not None:
                _keep_casts_fresh(step)
            step._running = self
        except BaseException:
            self.leave()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step function down to its loss."""
        plan, function = self.step._plan, self.step._function
        output = function(*args, **kwargs)  # type: ignore[misc]
        if isinstance(output, types.GeneratorType):
            self.generator, self.step._yields = output, True
            if plan.after:
                raise ValueError("a step that yields takes no `after`: call it below the yield")
            return run_to_yield(output)
        if not self.step._closed:
            check_stepping(plan)
        return output

    def backward(self, loss: Tensor, weight: Any, options: dict[str, Any] | None = None) -> None:
        """Add the gradient of a loss, times its share, to the sums of the window."""
        step, parameters = self.step, self.step._plan.parameters()
        if self.left:
            self.check_untouched()
        window = step._window
        if window is None:  # a block discarded it
            window = step._window = step._new_window()
        if weight is not None:
            weight = as_weight(weight, loss.device)
        # Tensors are not compared, since that may wait.
        differs = self.weight is None or (isinstance(weight, float) and weight != self.weight)
        if self.lent is None:
            if step._updater.scale is not None and not window.losses:
                _refuse_float16(parameters)
            self.weight, self.share = weight, window.share(weight, step._size)
            self.lent = window
        elif weight is not None and differs:
            fault = f"the losses of a micro-batch share one weight, got {self.weight} and {weight}"
            raise TypeError(f"{fault}: `step.backward(first, weight)`")
        try:
            is_first = not step._closed and not window.losses
            if is_first and step._evidence is not None and self.generator is None:
                step._evidence.check_loss(loss)
            window.lend(parameters)
            _run_backward(loss, step._updater.seed(loss, self.share), options)
        except BaseException as error:
            step.discard()  # at once: a block may catch this and continue
            if isinstance(error, RuntimeError):
                from trainkit.advice import explain

                explain(error)
            raise

    def finish(self) -> None:
        """Count the micro-batch, and make the update if it closes the window."""
        result, window, closes = self.result, self.lent, self.step._closes()
        assert window is not None and result.loss is not None
        if self.left:
            self.check_untouched()
        window.add(result.loss, self.weight, self.step._size)
        result._window, result._count = window, len(window.losses)
        if closes:
            if window.size < window.length:
                if self.step._ended_early:
                    from trainkit.advice import SHORT_WINDOWS

                    warn(SHORT_WINDOWS)
                self.step._ended_early = True
            self.close(window)
        else:
            if self.generator is not None:
                self.generator.close()  # a ``frozen`` block around the yield holds sums
            window.take()
        self.lent = None

    def close(self, window: Window) -> None:
        """Turn the gradients of a complete window into an update."""
        step, result, parameters = self.step, self.result, self.step._plan.parameters()
        if step._verdict is not None:
            step.settle()
        for watcher in step._watchers:
            watcher.before_update(step)
        result.complete = True
        gradients = window.close(parameters)
        if not step._closed or not gradients:
            from trainkit.advice import warn_of_missing

            warn_of_missing(len(gradients), parameters)
        code, evidence = None, step._evidence
        if self.generator is not None:
            run = run_to_end if evidence is None else functools.partial(evidence.run, step._plan)
            code = functools.partial(run, self.generator)
        verdict, apply = step._updater.decide(window, gradients, code)
        owed = Answer(verdict.skipped) if step._plan.after else None
        reference, skips = window.next_reference(), step._skips + verdict.skipped
        if apply is not None:
            apply()
        # One statement, so that Ctrl-C cannot separate the update from its count.
        step._window, step._reference, step._closed, step._skips, step._verdict = (
            None, reference, step._closed + 1, skips, owed,
        )  # fmt: skip
        forget(step._plan.optimizers)
        result._skipped = verdict.skipped if gradients or code else True
        result.grad_norm, result._settle = verdict.norm, step.settle if owed else None
        with contextlib.ExitStack() as watching:  # each watcher is called, whatever raises
            if evidence is not None and (code or evidence.awaits):
                watching.callback(evidence.tell, step, result)
            for watcher in reversed(step._watchers):
                watching.callback(watcher.after_update, step, window, verdict)
            if verdict.found_inf is not None and (count := step._updater.learn(verdict.found_inf)):
                from trainkit.advice import too_many_skips

                step._updater.reset_skips()
                raise too_many_skips(step, count)
            if self.generator is not None:
                self.generator.close()
            window.drop()
            if owed is not None and (owed.known() or not step._after_may_be_late):
                step.settle()

    def leave(self) -> None:
        """Leave the contexts around the micro-batch. An interrupted call may be repeated.

        Before ``finish``, only some of its gradients may be in the sums: the window is dropped.
        """
        try:
            if self.lent is not None:
                self.step.discard()
            if self.generator is not None:
                self.generator.close()
        finally:
            self.step._running = None
            while self.entered:
                self.leave_last()

    def leave_last(self) -> None:
        """Leave what was entered last."""
        self.entered[-1].__exit__(None, None, None)
        del self.entered[-1]

    def watch(self, window: Window | None) -> None:
        """Remember the gradients, which only ``step.backward`` may change inside a block."""
        if window is not None and window.can_watch:
            found = ((p, p.grad) for p in self.step._plan.parameters())
            self.left = versions(found) if self.lent is None else window.note()

    def check_untouched(self) -> None:
        """Raise RuntimeError if something else changed gradients inside the micro-batch."""
        left, self.left = self.left, ()
        if is_changed(left, are_lent=self.lent is not None):
            from trainkit.advice import DISTURBED

            if self.lent is not None:
                self.step.discard()
            raise RuntimeError(DISTURBED)


_run_on_cpu = torch.autograd.Variable._execution_engine.run_backward
_clear_casts: Any = unserializable_hook(lambda gradient: torch.clear_autocast_cache())  # type: ignore[no-untyped-call]


def _run_backward(loss: Tensor, seed: Tensor, options: dict[str, Any] | None) -> None:
    """Run ``loss.backward(gradient=seed, **options)`` with autocast off."""
    if torch._C._is_any_autocast_enabled():  # by a block or a caller; `loss.device` takes 5 us
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward(gradient=seed, **options or {})  # type: ignore[no-untyped-call]
        torch.clear_autocast_cache()  # or every later forward would use the old weights
    elif type(loss) is Tensor and not options:  # without 15 us of checks in Tensor.backward
        run = _run_on_cpu if loss.is_cpu else _engine_run_backward
        run((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        loss.backward(gradient=seed, **options or {})  # type: ignore[no-untyped-call]


def _keep_casts_fresh(step: Step[Any]) -> None:
    """Have autocast forget its copies of the weights in every backward.

    A step function may move weights along a gradient between two of its forwards, for example in
    SAM (Foret et al. 2021, https://arxiv.org/abs/2010.01412). The second forward would use the
    copies of the old weights. Only the last trained weight of each optimizer carries the hook,
    because a hook on every weight would cost as much as backward through a small layer.
    """
    if step._cast_weights and all(map(requires_grad, step._cast_weights)):
        return
    optimized = [[p for p in ps if not is_lazy(p)] for ps in step._plan.optimized()]
    weights = [[p for p in ps if p.requires_grad and p.dim() > 1] for ps in optimized]
    step._cast_weights = [trained[-1] for trained in weights if trained]
    for weight in step._cast_weights:
        if _clear_casts not in (weight._backward_hooks or {}).values():
            weight.register_hook(_clear_casts)  # type: ignore[no-untyped-call]


def _refuse_float16(parameters: list[torch.nn.Parameter]) -> None:
    for p in parameters:
        if p.dtype == torch.float16 and p.requires_grad:
            fault = f"a loss scale needs float32 parameters, got float16 of shape {tuple(p.shape)}"
            raise ValueError(f"{fault}: load the model with `dtype=torch.float32`")
