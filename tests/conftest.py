"""Without a GPU, Triton kernels run interpreted: the variable must stand before triton is first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _fresh_seed(request):
    """Inputs differ from run to run; a failing test prints the seed it drew, and IVFAST_SEED repeats it."""
    seed = int(os.environ.get("IVFAST_SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"IVFAST_SEED={seed}")
