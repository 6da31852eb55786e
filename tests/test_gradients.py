import torch
from oracles import gradients_of, make_model, same_bits

from trainkit import frozen
from trainkit.gradients import Gradients
from trainkit.plan import Plan


def test_loaded_gradients_are_not_taken_for_what_frozen_put_back_in_an_earlier_window():
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = Gradients(Plan(modules=(model,)))
    with frozen(model, "[0]"):
        gradients.drop()
    state = {i: torch.full_like(p, 2.0) for i, p in enumerate(model.parameters())}
    gradients.load_state_dict(state)
    gradients.drop_returned()
    assert same_bits(gradients_of(model), list(state.values()))
