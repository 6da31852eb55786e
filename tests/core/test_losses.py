import math
from typing import NamedTuple

import pytest
import torch
from oracles import BATCHES, loss_of, snapshot, unchanged

from trainkit import accumulate, train_step
from trainkit.core.losses import read_loss


def test_a_transformers_output_and_a_mapping_are_losses(model, optimizer):
    from transformers.modeling_outputs import SequenceClassifierOutput

    for wrap in (
        lambda loss: SequenceClassifierOutput(loss=loss),
        lambda loss: {"loss": loss},
        lambda loss: (loss, 3),
    ):
        step = train_step(optimizer)(lambda batch, wrap=wrap: wrap(loss_of(model, batch)))
        expected = loss_of(model, BATCHES[0]).detach()
        assert torch.equal(step(BATCHES[0]).loss, expected)
    step = train_step(optimizer)(
        lambda batch: (SequenceClassifierOutput(loss=loss_of(model, batch)), 3)
    )
    assert step(BATCHES[0]).updated


@pytest.mark.parametrize(
    ("output", "error", "words"),
    [
        (lambda loss: None, TypeError, "not None"),
        (lambda loss: loss.item(), TypeError, "a step function hands over the loss"),
        (lambda loss: loss.expand(2), ValueError, r"has shape \(2,\)"),
        (lambda loss: loss.detach(), ValueError, "no graph"),
        (lambda loss: loss.long(), TypeError, "floating-point"),
        (lambda loss: (loss, 0.5), TypeError, "if this is a metric"),
        (lambda loss: (loss, torch.tensor(0.5)), TypeError, "if this is a metric"),
        (lambda loss: (loss, True), TypeError, "if this is a metric"),
        (lambda loss: (loss, torch.tensor(True)), TypeError, "if this is a metric"),
        (lambda loss: (loss, torch.tensor([3])), TypeError, r"shape \(1,\).*mask.sum\(\)"),
        (lambda loss: (loss, -1), ValueError, "must be finite and >= 0"),
        (lambda loss: {"loss": loss, "weight": math.nan}, ValueError, "must be finite and >= 0"),
        (lambda loss: {"loss": loss, "weight": "3"}, TypeError, "weight"),
        (lambda loss: {"losses": loss}, TypeError, "a step function hands over the loss"),
        (lambda loss: (loss, 1, 2), TypeError, "a tuple of 3"),
        (lambda loss: (loss, 3), TypeError, "with every loss of a window"),
    ],
)
@pytest.mark.parametrize("face", ["return", "yield"])
def test_what_is_no_loss_is_refused(model, optimizer, output, error, words, face):
    wrap = [lambda loss: loss]

    def returning(batch):
        return wrap[0](loss_of(model, batch))

    def yielding(batch):
        yield returning(batch)

    step = accumulate(3)(train_step(optimizer)(returning if face == "return" else yielding))
    step(BATCHES[0])
    before, saved = snapshot(model, optimizer), step.state_dict()
    wrap[0] = output
    with pytest.raises(error, match=words):
        step(BATCHES[1])
    assert unchanged(before, model, optimizer)
    assert len(step.state_dict()["window"]["losses"]) == len(saved["window"]["losses"]) == 1


def test_an_object_with_a_loss_may_have_a_weight():
    class Output(NamedTuple):
        loss: torch.Tensor
        weight: float | None = None

    loss = torch.ones((), requires_grad=True)
    assert read_loss(Output(loss, 2.5)) == (loss, 2.5)
    assert read_loss(Output(loss)) == read_loss({"loss": loss, "weight": None}) == (loss, None)
    with pytest.raises(TypeError, match="is the weight"):
        read_loss(Output(loss, "much"))
