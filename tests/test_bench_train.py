"""The eager scripts that training is timed against compute what ivfast trains: every loss and weight, step by step."""

import pytest

from ivfast.bench import train
from ivfast.data import load


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def digits():
    return load("digits").train


@pytest.mark.parametrize("joint", [False, True], ids=["eager", "joint"])
@pytest.mark.parametrize("system", train.SCRIPTS)
def test_a_script_is_the_system(system, joint, digits):
    of_losses, of_weights = train.check(train.settings_of(system, "digits"), digits, joint)
    print(of_losses, of_weights)
    assert of_losses <= train.LOSS_TOLERANCE
    assert of_weights <= train.WEIGHT_TOLERANCE
