import math

from oracles import BATCHES, loss_of, make_model

from trainkit import accumulate, train_step


def test_window_loss_is_the_weighted_mean_so_far(model, optimizer):
    step = train_step(optimizer, accumulate(3))(
        lambda batch: (loss_of(model, batch), len(batch[0]))
    )
    results = [step(batch) for batch in BATCHES]
    losses = [loss_of(make_model(), batch).item() for batch in BATCHES]
    assert results[0].window_loss.item() == losses[0]
    assert math.isclose(results[1].window_loss.item(), (4 * losses[0] + 4 * losses[1]) / 8)
    assert math.isclose(
        results[2].window_loss.item(), (4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10
    )
