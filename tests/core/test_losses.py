"""What a step function may hand over, and what is refused before anything is changed."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles import BATCHES, loss_of, make_model, snapshot, unchanged

from trainkit import accumulate, train_step
from trainkit.core.losses import read_loss


def test_a_transformers_output_a_mapping_and_a_pair_are_losses():
    from transformers.modeling_outputs import SequenceClassifierOutput

    for wrap in (
        lambda loss: loss,
        lambda loss: SequenceClassifierOutput(loss=loss),
        lambda loss: {"loss": loss},
        lambda loss: {"loss": loss, "weight": 2.5},
        lambda loss: (loss, 3),
        lambda loss: (SequenceClassifierOutput(loss=loss), 3),
    ):
        model = make_model()
        step = train_step(torch.optim.SGD(model.parameters()))
        result = step(lambda batch, m=model, wrap=wrap: wrap(loss_of(m, batch)))(BATCHES[0])
        assert torch.equal(result.loss, loss_of(make_model(), BATCHES[0]).detach())
        assert result.updated and not result.loss.requires_grad


class Output(NamedTuple):
    """A tuple with names: it is read by them, and not as ``loss, weight``."""

    loss: torch.Tensor
    weight: float | None = None


LOSS = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("output", "weight"),
    [
        (Output(LOSS, 2.5), 2.5),
        (Output(LOSS), None),
        ({"loss": LOSS, "weight": None}, None),
        ((LOSS, None), None),
        ((LOSS, np.int64(3)), 3),
        ({"loss": LOSS, "weight": np.float64(0.5)}, 0.5),
        ({"loss": LOSS, "weight": torch.tensor(0.5)}, 0.5),
    ],
)
def test_the_weight_comes_second_or_by_its_name(output, weight):
    found = read_loss(output)
    assert found[0] is LOSS and found[1] == weight


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (lambda loss: None, TypeError),
        (lambda loss: loss.item(), TypeError),
        (lambda loss: loss.expand(2), ValueError),
        (lambda loss: loss.detach(), ValueError),
        (lambda loss: loss.long(), TypeError),
        (lambda loss: loss.to(torch.complex64), TypeError),
        (lambda loss: (3, loss), TypeError),
        (lambda loss: (loss, 0.5), TypeError),
        (lambda loss: (loss, loss), TypeError),
        (lambda loss: (loss, True), TypeError),
        (lambda loss: (loss, torch.tensor(True)), TypeError),
        (lambda loss: (loss, torch.tensor([3])), TypeError),
        (lambda loss: (loss, -1), ValueError),
        (lambda loss: {"loss": loss, "weight": math.nan}, ValueError),
        (lambda loss: {"loss": loss, "weight": math.inf}, ValueError),
        (lambda loss: {"loss": loss, "weight": "3"}, TypeError),
        (lambda loss: {"losses": loss}, TypeError),
        (lambda loss: (loss, 1, 2), TypeError),
        (lambda loss: [loss], TypeError),
        (lambda loss: loss, TypeError),  # the losses before it came with a weight
    ],
)
@pytest.mark.parametrize("face", ["return", "yield"])
def test_what_is_no_loss_is_refused(model, optimizer, output, error, face):
    wrap = [lambda loss: (loss, 2)]

    def returning(batch):
        return wrap[0](loss_of(model, batch))

    def yielding(batch):
        yield returning(batch)

    step = accumulate(3)(train_step(optimizer)(returning if face == "return" else yielding))
    step(BATCHES[0])
    before, saved = snapshot(model, optimizer), step.state_dict()
    wrap[0] = output
    with pytest.raises(error):
        step(BATCHES[1])
    assert unchanged(before, model, optimizer)
    assert step.state_dict()["window"] == saved["window"]
    wrap[0] = lambda loss: (loss, 2)
    assert [step(batch).complete for batch in BATCHES[1:]] == [False, True]
