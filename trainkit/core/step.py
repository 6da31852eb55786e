"""The step: a function that computes the loss of one micro-batch, and the plan that turns such losses into updates.

The step owns all state, and runs its plan in one order whatever order the parts were given in:

    surroundings entered > autocast on > the function > autocast off > backward > [window complete: the update] > left again
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from trainkit.core.answer import Answer
from trainkit.core.backward import explain, run_backward
from trainkit.core.generators import run_to_end, run_to_yield
from trainkit.core.gradients import Gradients
from trainkit.core.loaders import Delivery, in_step, mark_last
from trainkit.core.losses import read_loss
from trainkit.core.plan import Plan, Surrounding
from trainkit.core.precautions import keep_casts_fresh, refuse_float16, refuse_plan
from trainkit.core.result import StepResult
from trainkit.core.scaler import Scaler, check_count
from trainkit.core.update import forget_scale
from trainkit.core.warning import warn
from trainkit.core.window import Chunk, Weight, Window, widened
from trainkit.ranks.parallel import Wrappers, count_ranks, over_ranks, tell_all
from trainkit.watch.progress import with_progress
from trainkit.watch.readings import Readings

P = ParamSpec("P")
T = TypeVar("T")


class Step(Generic[P]):
    """A step function with its plan and its state: call it with a micro-batch, or use it as a context around one.

    Made by ``train_step`` and by applying parts to functions. Once per window it turns what has added up into an update; see
    ``train_step`` for the loop that this is equivalent to.
    """

    def __init__(self, plan: Plan, function: Callable[P, Any] | None = None) -> None:
        if not isinstance(plan, Plan) or not (function is None or callable(function)):
            raise TypeError(
                f"steps are made by `train_step(optimizer)(function)`, and not of {plan!r} and {function!r}"
            )
        if function is not None:
            # Without its __dict__: attributes of the function could overwrite those of the step.
            functools.update_wrapper(self, function, updated=())
        self._plan = plan
        self._function = function
        # Known from the first call on, when the parameters are where they will be trained.
        self._device_type = ""
        self._ranks = 1
        self._wrappers = Wrappers(())
        self._autocast: torch.autocast | None = None
        self._watched_casts: list[nn.Parameter] = []
        self._scaler: Scaler
        # From window to window.
        self._closed = 0
        self._skips: int | Tensor = 0
        self._reference: Weight | None = None
        self._owed: Answer | None = None
        self._at_last_batch = False
        self._ended_early = False
        self._delivery: Delivery | None = None
        self._resumable: Any = None
        self._watchers: list[Readings] = []
        self._gradients = Gradients(plan)
        self._window: Window | None = None
        # The micro-batch under way.
        self._chunk = Chunk()
        self._result: StepResult | None = None
        self._surroundings: list[AbstractContextManager[Any]] = []
        self._autocast_is_on = False
        self._generator: types.GeneratorType[Any, None, Any] | None = None
        self._began_backward = False
        self._is_closing = False
        self._weight: Weight | None = None
        self._share: float | Tensor = 1.0
        self._over_ranks: Callable[[], list[Tensor]] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        assert self._function is not None
        result = None
        try:
            with self as result:
                output = self._function(*args, **kwargs)
                if isinstance(output, types.GeneratorType):
                    self._generator = output
                    output = run_to_yield(output, self._plan.after)
                elif not self._plan.optimizers:
                    raise ValueError(
                        "a step function that returns its loss leaves the update to trainkit, and no optimizer was given: "
                        "decorate it with `train_step(optimizer, ...)`, or `yield loss` and go on with your own update"
                    )
                loss, weight = read_loss(output)
                if self._autocast_is_on:
                    self._leave_autocast()
                self._run_backward(loss, weight)
                result.loss = loss.detach()
        except BaseException as error:
            if (
                result is not None and result is self._result
            ):  # a signal on the way into __exit__, which has not run then
                self.__exit__(type(error), error, error.__traceback__)
            raise
        return result

    def last(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        """Like a call, and closes the window with this micro-batch; for loops that do not go through ``over``."""
        found, self._at_last_batch, self._ended_early = self._at_last_batch, True, False
        try:
            return self(*args, **kwargs)
        finally:
            self._at_last_batch = found

    def __enter__(self) -> StepResult:
        if self._result is not None:
            raise RuntimeError(
                "this step is under way already and cannot be entered from within; for a further loss of the same "
                "micro-batch call `step.backward(loss)`"
            )
        if not self._device_type:
            self._prepare()
        if self._owed is not None and self._owed.known():
            self.settle()
        if self._window is None:
            self._window = self._new_window()
        result = StepResult()
        try:
            for part in self._plan.surroundings:
                self._enter(part.around_step())
            if self._wrappers.found:
                self._enter(self._wrappers.micro_batch(self._will_close(self._window)))
            if self._autocast is not None:
                if not (
                    self._watched_casts
                    and all(weight.requires_grad for weight in self._watched_casts)
                ):
                    self._watched_casts = keep_casts_fresh(self._plan.parameters_by_optimizer())
                self._autocast.__enter__()  # type: ignore[no-untyped-call]
                self._autocast_is_on = True
            if self._function is None:
                self._gradients.note()
            self._result = result
        except BaseException as error:  # __exit__ is not called then
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return result

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        generator = self._generator
        try:
            try:
                if self._autocast_is_on:
                    self._leave_autocast()
                result = self._result
                if (
                    kind is None
                    and self._began_backward
                    and result is not None
                    and result.loss is not None
                ):
                    self._finish()
                    if generator is not None:
                        generator.close()
                    self._began_backward = False
                elif kind is None and self._gradients.touched():
                    warn(
                        "a micro-batch ended without a loss but left gradients, which the step does not count: call "
                        "`step.backward(loss)` in place of `loss.backward()`"
                    )
            finally:
                failed = (
                    self._began_backward
                )  # and did not finish: some gradients are in, others are not
                if failed:
                    self._window = None
                self._result = self._generator = None
                self._began_backward, self._is_closing, self._over_ranks = False, False, None
                if self._autocast_is_on:
                    self._leave_autocast()
                if failed:
                    self._drop()
                if generator is not None:
                    generator.close()
        finally:
            try:
                while self._surroundings:
                    self._surroundings[-1].__exit__(None, None, None)
                    del self._surroundings[-1]
            except BaseException:
                _leave(self._surroundings)
                raise

    def backward(self, loss: Any, weight: Weight | None = None) -> None:
        """Runs backward of a loss of the micro-batch under way: *the* loss in a by-hand block, a further one anywhere.

        Further losses (an adversarial one, a penalty) enter with the same scale and weight, and the micro-batch counts
        once. Autocast is off meanwhile. What ``.grad`` then holds is scaled, and of the whole window.

        Args:
            loss: 0-d, floating, with a graph; the mean over the micro-batch. Or whatever else a step function may return.
            weight: how many things that mean is over, an int or an integer 0-d tensor; with the first loss only.

        Raises:
            TypeError, ValueError: for anything else, before anything is changed.
            RuntimeError: outside a micro-batch, or where the gradients of the open window are gone.
        """
        if self._result is None:
            raise RuntimeError(
                "step.backward(loss) must be called inside a micro-batch: within `with step:` or the step function"
            )
        if self._is_closing:
            raise RuntimeError(
                "step.backward(loss) below the yield, where gradients are complete, true and clipped already: give a further "
                "loss above the yield, or add to the gradients yourself, `loss.backward()`"
            )
        loss, weight = read_loss(loss if weight is None else (loss, weight))
        detached = (
            loss.detach()
        )  # before: after a backward nothing may fail, or the block could go on without its loss
        self._run_backward(loss, weight)
        if self._result.loss is None:
            self._result.loss = detached

    def over(
        self,
        loader: Iterable[T],
        *other_steps: Step[Any],
        progress: bool | Mapping[str, Any] = False,
    ) -> Iterator[T]:
        """Iterates the loader, and lets its last batch close the open windows of this step and of ``other_steps``.

        Equivalent to ``for batch in loader``, where the last batch goes to ``step.last``. A loader without a length is read
        one batch ahead, one with a length is not.

        On several ranks, all of them get as many batches as the one that has most: who has run out gets its last one again,
        which counts nothing in any window. They agree before every window; a loader without a length is then read ahead by a
        window and one batch.

        Args:
            loader: what a loop can go over.
            other_steps: further steps whose windows end with the loader.
            progress: True shows a bar of tqdm, in a terminal and in a notebook, with the smoothed loss, the gradient norm, the
                learning rate, the loss scale, updates that were skipped, and rows per second, or tokens where the step gives
                weights. A mapping has arguments for tqdm, ``progress={"desc": "epoch 3"}``. Numbers are shown as they arrive
                from the device, and nothing waits for them. On several ranks the first shows one, with its own numbers.

        Raises:
            TypeError: where something is given that is no loader, or no step; or for another ``progress``.
            ImportError: with ``progress``, where tqdm is not installed.
            ValueError: on several ranks, where one of them has no batch at all.

        Warns:
            UserWarning: where a window stays open, because the last batch did not reach its step.

        Example:
            >>> import torch
            >>> from trainkit import accumulate, train_step
            >>> weight = torch.nn.Parameter(torch.zeros(()))
            >>> step = train_step(torch.optim.SGD([weight], lr=1.0), accumulate(2))(lambda x: (weight - x) ** 2)
            >>> [step(x).complete for x in step.over([1.0, 2.0, 3.0])]
            [False, True, True]
        """
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"step.over takes what a loop can go over, got {loader!r}: `step.over(loader)`"
            )
        for step in other_steps:
            if not isinstance(step, Step):
                raise TypeError(
                    f"step.over takes a loader and then steps, got {step!r}: `step_d.over(loader, step_g)`"
                )
        steps = (self, *other_steps)
        batches = _over(loader, steps)
        return batches if progress is False else with_progress(batches, loader, steps, progress)

    def discard(self) -> None:
        """Drops the open window, if there is one: gradients None, nothing applied, nothing counted."""
        is_open = self._began_backward or (self._window is not None and self._window.losses)
        # Before: no window goes on with a part of its gradients.
        self._window, self._over_ranks, self._began_backward = None, None, False
        if is_open:
            self._drop()

    def _drop(self) -> None:
        self._gradients.drop()
        self._wrappers.drop()
        forget_scale(self._plan.optimizers)

    def settle(self) -> None:
        """Runs ``after`` for the last update, if that is still owed; waits for the device's verdict.

        Called automatically before the next update, at the end of ``over``, and where ``updates`` or ``skipped`` is read.
        """
        if self._owed is None:
            return
        skipped = bool(
            self._owed.read()
        )  # the wait, in which an interrupt may come: it is owed until that is over
        self._owed = None
        if not skipped:
            for call in self._plan.after:
                call()

    @property
    def updates(self) -> int:
        """Updates applied so far. Reading it may wait for the device."""
        self.settle()
        return self._closed - int(self._skips)

    @property
    def skipped(self) -> int:
        """Updates skipped so far: gradients not finite, or weights that sum to 0. Reading it may wait for the device."""
        self.settle()
        return int(self._skips)

    def state_dict(self) -> dict[str, Any]:
        """Counters, loss scale, and the open window with its gradients: numbers and tensors, copied.

        Raises:
            RuntimeError: within a micro-batch, from its backward on, when it is counted neither way; call it after the step.
        """
        self._refuse_within("state_dict")
        if not self._device_type:
            self._prepare()
        window = self._window if self._window is not None and self._window.losses else None
        if window is not None and self._wrappers.hold_gradients():
            raise RuntimeError(
                "step.state_dict() in an open window under FSDP2, which keeps its gradients to itself until the window closes: "
                "call it between two windows, where `result.complete`"
            )
        state: dict[str, Any] = {"updates": self.updates, "skipped": self.skipped}
        if self._reference is not None:
            state["reference"] = self._reference
        state |= self._scaler.state_dict()
        if window is not None:
            state["window"] = window.state_dict()
            state["gradients"] = self._gradients.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken, between the same two micro-batches. An open window is dropped first.

        Raises:
            ValueError: for another state, or where its gradients do not fit the parameters; before anything is changed.
            RuntimeError: within a micro-batch, from its backward on.
        """
        self._refuse_within("load_state_dict")
        if not self._device_type:
            self._prepare()
        try:
            skipped, applied, reference = (
                check_count(state["skipped"]),
                check_count(state["updates"]),
                state.get("reference"),
            )
            window = (
                Window.from_state_dict(state["window"], reference) if "window" in state else None
            )
            gradients = {} if window is None else dict(state["gradients"])
            self._scaler.check_state_dict(state)
        except Exception as error:  # whatever is in place of a state may raise whatever it likes
            raise ValueError(
                f"this is not the state of a step ({error!r}): give what `step.state_dict()` returned"
            ) from None
        self._gradients.check_state_dict(gradients)
        self.discard()
        self._owed = None
        self._skips, self._closed, self._reference = skipped, applied + skipped, reference
        factor = self._scaler.load_state_dict(state)
        if window is not None:
            self._gradients.load_state_dict(
                {i: g if factor == 1 else g * factor for i, g in gradients.items()}
            )
            self._window = window  # after: no window is open without its gradients

    def _refuse_within(self, name: str) -> None:
        if self._began_backward or self._chunk.stop:  # of a batch, a part of the chunks may be in
            raise RuntimeError(
                f"step.{name}() within a micro-batch, which is half done: call it between two micro-batches"
            )

    def _add_part(self, part: Surrounding) -> Step[P]:
        return type(self)(self._plan + Plan(surroundings=(part,)), self._function)

    def __get__(self, instance: object, owner: type | None = None) -> Step[P]:
        if instance is None:
            return self
        name = getattr(self._function, "__name__", "step")
        raise TypeError(
            f"the method {name!r} of the class {type(instance).__name__} was decorated, and all instances would share one state: "
            f"leave the method as it is and write `self.step = train_step(...)(self.{name})` in __init__"
        )

    # A micro-batch, from its beginning to the update.

    def _prepare(self) -> None:
        """Picks the precision, and refuses a plan that cannot work."""
        self._ranks, self._wrappers = count_ranks(), Wrappers(self._plan.modules)
        refuse_plan(self._plan, self._ranks, self._wrappers, by_hand=self._function is None)
        self._gradients.buckets_rebuilt = self._wrappers.buckets_rebuilt
        device, precision = self._plan.parameters()[0].device, self._plan.precision
        device_type, dtype = (
            (device.type, torch.float32) if precision is None else precision.resolve(device)
        )
        with torch.inference_mode(
            False
        ):  # what is made for the first of all evaluations is made for training, too
            self._scaler = Scaler(self._plan, dtype, self._ranks)
            if dtype != torch.float32:
                self._autocast = torch.autocast(device_type, dtype)
        self._device_type = device.type

    def _new_window(self) -> Window:
        return Window(self._length(), self._reference, None if self._plan.sum_dtype is None else 1)

    def _length(self) -> int:
        return self._plan.length(lambda: self.updates)

    def _deliveries(
        self,
        loader: Iterable[Any],
        window: Callable[[], int] | None = None,
        tell: Callable[..., Tensor] = tell_all,
    ) -> Iterator[Delivery]:
        """The batches of a loader, and on several ranks as many on each."""
        if count_ranks() == 1:
            return mark_last(loader)
        if not self._device_type:
            self._prepare()
        return in_step(
            loader, window or self._length, functools.partial(tell, self._wrappers.group)
        )

    def _enter(self, context: AbstractContextManager[Any]) -> None:
        context.__enter__()
        self._surroundings.append(context)

    def _leave_autocast(self) -> None:
        assert self._autocast is not None
        self._autocast_is_on = False
        self._autocast.__exit__(None, None, None)

    def _run_backward(self, loss: Tensor, weight: Weight | None) -> None:
        if not self._began_backward:
            self._begin_backward(loss, weight)
        elif weight is not None and (self._weight is None or _differ(weight, self._weight)):
            raise TypeError(
                f"the losses of a micro-batch share one weight, but the first came with {self._weight}, this one with {weight}: "
                "give it with the first, `step.backward(first, weight)`"
            )
        else:  # a frozen block within the micro-batch may have begun and ended since the first
            self._gradients.drop_returned()
        if self._wrappers.found:
            self._wrappers.before_backward()
        seed = self._scaler.seed(loss, self._share)
        try:
            run_backward(loss, seed, self._device_type)
        except BaseException as error:
            if not self._take_back(error):
                self.discard()  # at once: the block may catch this and go on
            explain(error)
            raise

    def _take_back(self, error: BaseException) -> bool:
        """Whether what a failed backward has left could be taken out of the gradients again."""
        return False

    def _begin_backward(self, loss: Tensor, weight: Weight | None) -> None:
        """Takes in the weight of the micro-batch, and looks after the gradients that it will be added to."""
        window = self._window = (
            self._window or self._new_window()
        )  # none where the block discarded it
        delivery = self._delivery
        self._weight = None if weight is None else widened(weight, loss.device)
        if (
            self._ranks > 1
            and self._weight is not None
            and window.first_of_all
            and not window.losses
        ):
            (largest,) = over_ranks("max", [self._weight], loss.device, self._wrappers.group)()
            window.agree_on_reference(largest)
        self._share = window.share(self._weight, self._chunk.fraction)
        if not window.losses:
            if self._scaler.loss_scale is not None:
                refuse_float16(self._plan.parameters())
            self._gradients.begin()
            self._wrappers.drop()
        elif disturbance := self._gradients.disturbance():
            self.discard()
            raise RuntimeError(disturbance.format(len(window.losses)))
        self._began_backward = True
        is_filler = self._chunk.fraction == 0 or (delivery is not None and delivery.is_filler)
        window.add(
            self._weight, self._chunk, 1 if delivery is None else delivery.present, is_filler
        )
        if is_filler:
            self._share = 0.0
        must_sum = window.weighted or (self._at_last_batch and delivery is None)
        if self._ranks > 1 and must_sum and self._will_close(window):
            # Here, and not after backward, which it is hidden behind.
            self._over_ranks = over_ranks(
                "avg", [window.total, window.count], loss.device, self._wrappers.group
            )

    def _will_close(self, window: Window) -> bool:
        """Whether the next micro-batch is the window's last."""
        return self._chunk.is_last and (self._at_last_batch or window.batches + 1 >= window.length)

    def _finish(self) -> None:
        """Counts the micro-batch, and closes the window where this was its last."""
        result, window = self._result, self._window
        assert result is not None and result.loss is not None and window is not None
        window.losses.append(result.loss)
        result._window, result._count = window, len(window.losses)
        window.batches += self._chunk.is_last
        if not self._chunk.is_last or (window.batches < window.length and not self._at_last_batch):
            self._gradients.remember()
            return
        if window.batches < window.length:
            if self._ended_early:
                warn(
                    "several micro-batches came at the last batch of `step.over`, and each of them ends a window: let the loop "
                    "over micro-batches be the one that goes through `step.over`"
                )
            self._ended_early = True
        self.settle()
        self._is_closing = True
        for watcher in self._watchers:
            watcher.before_update()
        if self._over_ranks is not None:
            window.total, window.count = self._over_ranks()
            self._over_ranks = None
        own_update = (
            None if self._generator is None else functools.partial(run_to_end, self._generator)
        )
        outcome, apply = self._scaler.decide(
            window, self._gradients, own_update, is_first=not self._closed
        )
        reference, skips = window.next_reference(), self._skips + outcome.skipped
        owed = Answer(outcome.skipped) if self._plan.after else None
        try:
            if apply is not None:
                apply()
            # At once and in one assignment, which no signal comes between: what was applied is counted, and `after` is owed.
            self._window, self._reference, self._closed, self._skips, self._owed = (
                None,
                reference,
                self._closed + 1,
                skips,
                owed,
            )
        finally:
            forget_scale(self._plan.optimizers)
        try:
            if outcome.found_inf is not None:
                self._scaler.update(outcome.found_inf, lambda: self.updates)
        finally:
            for watcher in self._watchers:
                watcher.after_update(window, outcome.skipped, outcome.norm)
        if self._generator is None or outcome.skipped is True:
            self._gradients.drop()
        else:  # the update code of the function decides what becomes of them
            self._gradients.forget()
        result.complete, result.grad_norm, result._skipped = True, outcome.norm, outcome.skipped
        result._settle = self.settle
        if owed is not None and owed.known():
            self.settle()
        for watcher in self._watchers:  # last: what is done with their numbers may fail
            watcher.ask(watcher.least)


def _leave(contexts: list[AbstractContextManager[Any]]) -> None:
    """Leaves contexts after an exception in it: once more the last, whose first line may not have been reached, and the rest."""
    if contexts:
        try:
            contexts.pop().__exit__(None, None, None)
        finally:
            _leave(contexts)


def _differ(a: Weight, b: Weight) -> bool:
    """Whether two weights are known to differ; tensors are not looked into."""
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a != b


def _over(loader: Iterable[T], steps: tuple[Step[Any], ...]) -> Iterator[T]:
    found = [(step._at_last_batch, step._delivery) for step in steps]
    first = steps[0]
    deliveries = (
        first._deliveries(loader)
        if first._resumable is None
        else first._resumable._deliver(loader, first)
    )
    try:
        for delivery in deliveries:
            for step in steps:
                step._at_last_batch, step._delivery, step._ended_early = (
                    delivery.is_last,
                    delivery,
                    False,
                )
            yield delivery.batch
    finally:
        for step, (at_last_batch, before) in zip(steps, found, strict=True):
            step._at_last_batch, step._delivery = at_last_batch, before
        for watcher in [watcher for step in steps for watcher in step._watchers]:
            watcher.flush()
    for step in steps:
        step.settle()
        if step._window is not None and step._window.losses:
            warn(
                f"the last batch did not reach a step (or the loader ended before its length), and {len(step._window.losses)} "
                "micro-batch(es) wait in its open window: `step.discard()` drops them"
            )
