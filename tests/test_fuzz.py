"""Random arguments for every op, in every mode and dtype, against float64 formulas written apart from the references.

`pytest -m fuzz` tries 100,000 sets (IVFAST_FUZZ: another number), an ordinary run a small share of them. A failure
names its sets: `fuzz.examine(op, seed)` repeats one.
"""

import os

import fuzz
import pytest
import torch

SETS, PART, SHARE = int(os.environ.get("IVFAST_FUZZ", 100_000)), 500, 50
PARTS = -(-SETS // (PART * len(fuzz.DRAWS)))


def examine(op: str, count: int, first: int) -> None:
    wrong = []
    for seed in range(first, first + count):
        try:
            error = fuzz.examine(op, seed)
        except Exception as exception:
            raise AssertionError(fuzz.described(op, seed)) from exception
        if not error <= 1:
            wrong.append(f"{error:.3g} times what is allowed: {fuzz.described(op, seed)}")
    assert not wrong, f"{len(wrong)} of {count} sets\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("op", fuzz.DRAWS)
def test_a_share(op):
    examine(op, SHARE, 10_000)  # the same sets in every run; the full fuzz looks for new faults


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("op", fuzz.DRAWS)
def test_all(op, part):
    examine(op, PART, int(torch.randint(2**31, ())))
