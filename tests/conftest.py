"""Deterministic everywhere; `HYPOTHESIS_PROFILE=deep` looks further."""

import gc
import os

import older_torch  # noqa: F401
import pytest
import torch
from hypothesis import HealthCheck, settings
from oracles import make_model

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
# For processes that tests start. On busy cores two threads wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

usual = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", max_examples=100, derandomize=True, **usual)
settings.register_profile("deep", max_examples=2000, **usual)
settings.register_profile("brief", max_examples=15, derandomize=True, **usual)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module", autouse=True)
def what_was_imported_is_not_looked_at_again():
    """The package calls gc.collect() where memory runs out: 0.2 s with torch and transformers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)
