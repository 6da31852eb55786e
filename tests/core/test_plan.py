import pytest
import torch
from oracles import make_model

from trainkit import accumulate
from trainkit.core.plan import native_dtype


@pytest.mark.parametrize(
    ("returned", "error"), [(0, ValueError), (2.0, TypeError), (None, TypeError), (True, TypeError)]
)
def test_a_bad_length_from_a_callable_is_refused_at_the_call(returned, error):
    def schedule(updates):
        return returned

    model = make_model()

    @accumulate(schedule, model)
    def step():
        yield model[0].weight.sum()

    with pytest.raises(error, match=f"schedule returned {returned}"):
        step()


def test_amp_picks_what_the_device_computes_natively(monkeypatch):
    assert native_dtype("cpu") == torch.bfloat16 and native_dtype("mps") == torch.float16
    for native in (True, False):
        # A T4 answers True when emulation counts.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        assert native_dtype("cuda") == (torch.bfloat16 if native else torch.float16)
