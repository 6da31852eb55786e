"""The memory that something takes on a CPU, against what it is known to take."""

import os

import pytest
import torch

from trainkit.tools.doctor.allocation import allocated_by

MIB = 2**20


def block(mebibytes):
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_it_is_the_most_that_is_there_at_once():
    def one_after_the_other():
        for _ in range(5):
            block(3)

    assert allocated_by(one_after_the_other) == 3 * MIB
    assert allocated_by(lambda: [block(3) for _ in range(5)]) == 15 * MIB
    assert allocated_by(lambda: None) == 0


def test_what_was_there_before_does_not_count():
    kept = [block(7)]
    assert allocated_by(lambda: kept.append(block(2))) == 2 * MIB
    kept.clear()
    assert (
        allocated_by(lambda: kept.append(block(1))) == MIB
    )  # nor what an earlier profile has left behind
    assert allocated_by(lambda: kept.append(block(1))) == MIB


def test_it_writes_nothing_and_stderr_is_there_again(capfd):
    allocated_by(lambda: block(1))
    assert capfd.readouterr() == ("", "")
    os.write(2, b"here")
    assert capfd.readouterr().err == "here"


def test_an_error_comes_through():
    with pytest.raises(ZeroDivisionError):
        allocated_by(lambda: 1 / 0)
    assert allocated_by(lambda: block(1)) == MIB
