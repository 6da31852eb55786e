"""What type checkers make of the public names; `make lint` checks it, nothing runs it."""

from collections.abc import Iterator

import torch
from typing_extensions import assert_type

import trainkit
from trainkit import Step, StepResult, accumulate, amp, frozen, train_step

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters())


@train_step(optimizer, accumulate(2), amp(), frozen(model, []), after=lambda: None)
def returning(x: torch.Tensor, *, repeat: int = 1) -> tuple[torch.Tensor, int]:
    return torch.as_tensor(model(x)).sum(), repeat


assert_type(returning(torch.ones(2), repeat=3), StepResult)
result = returning.last(torch.ones(2))
assert_type(result, StepResult)
assert_type(float(result.loss.item() + result.window_loss.item()), float)
returning(3)  # type: ignore[arg-type]


@accumulate(4)
@amp(optimizer, max_norm=1.0)
def yielding(x: torch.Tensor) -> Iterator[torch.Tensor]:
    raise NotImplementedError


yielding("x")  # type: ignore[arg-type]

by_hand = accumulate(2)(train_step(optimizer))
for batch in by_hand.over([1, 2], returning, yielding):
    assert_type(batch, int)
    with by_hand as result:
        by_hand.backward(torch.ones(()))
    assert_type(result, StepResult)


def takes_any_step(step: Step[...]) -> int:
    return step.updates


takes_any_step(returning) + takes_any_step(by_hand)
train_step(optimizer, scheduler=None)  # type: ignore[call-arg]
accumulate(steps=4)  # type: ignore[call-arg]
amp(enabled=False)  # type: ignore[call-arg]
with frozen(model, ["weight", model, lambda name, parameter: True]) as names:
    assert_type(names, list[str])
with amp():
    pass
assert_type(trainkit.__version__, str)
