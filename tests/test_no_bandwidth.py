"""A bandwidth must be positive and finite: otherwise every result that depends on it is NaN, and no other."""

import itertools

import pytest
import torch
from helpers import size

import ivfast
from ivfast.ops import svgd

IMPLEMENTATIONS = ("cpu", "reference", "triton", "cuda")
WRONG = (0.0, -1.0, float("inf"), float("-inf"), float("nan"))
D = 4
device = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's; interpreted on the CPU: tests/conftest.py
# -inf·0, 2^-inf and NaN's comparisons, in the interpreter's NumPy
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(params=IMPLEMENTATIONS)
def place(request):
    """The implementation is in use; the device of its tensors."""
    if request.param == "cpu":
        pytest.importorskip("ivfast._C")
    if request.param == "cuda":
        request.getfixturevalue("simt")
    with ivfast.use(request.param):
        yield device if request.param == "triton" else "cpu"


def only_first_is_nan(results):
    for k, result in enumerate(results):
        assert result[0].isnan().all(), k
        assert result[1].isfinite().all(), k


def draws(place_name):
    """Wrong bandwidths and dtypes: all of them on the CPU, one where kernels are interpreted or simulated."""
    if place_name in ("cpu", "reference"):
        return list(itertools.product(WRONG, (torch.float32, torch.float64, torch.bfloat16)))
    return [(WRONG[size(0, 4)], (torch.float32, torch.bfloat16, torch.float16)[size(0, 2)])]


@pytest.mark.parametrize("n", [1, 9])
def test_a_tensor(place, n, request):
    for wrong, dtype in draws(request.node.callspec.params["place"]):
        assert_a_tensor(place, n, wrong, dtype)


def assert_a_tensor(place, n, wrong, dtype):
    x, score, y = (torch.randn(2, n, D).to(place, dtype).requires_grad_() for _ in range(3))
    h = torch.tensor([wrong, 1.0], device=place, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    with_score, without = ivfast.svgd_direction(x, score, bandwidth=h), ivfast.svgd_direction(x, bandwidth=h)
    only_first_is_nan((with_score, *torch.autograd.grad(with_score.sum(), (x, score, h))))
    only_first_is_nan((without, *torch.autograd.grad(without.sum(), (x, h))))
    only_first_is_nan(svgd._forward(x.detach(), score.detach(), h.detach()))
    for kernel in ("rbf", "imq"):
        value = ivfast.mmd(x, y, kernel=kernel, bandwidth=h, unbiased=False)
        only_first_is_nan((value, ivfast.mmd(x.detach(), y.detach(), kernel=kernel, bandwidth=h, unbiased=False)))
        only_first_is_nan(torch.autograd.grad(value.sum(), (x, y)))


@pytest.mark.parametrize("n", [2, 70])
def test_of_equal_particles(place, n):
    x = torch.full((2, n, D), 0.3, device=place).requires_grad_()
    h = torch.tensor([WRONG[size(0, 4)], 1.0], device=place).requires_grad_()
    phi, value = ivfast.svgd_direction(x, bandwidth=h), ivfast.mmd(x, x.detach(), kernel="rbf", bandwidth=h)
    only_first_is_nan((phi, *torch.autograd.grad(phi.sum(), (x, h))))
    only_first_is_nan((value, *torch.autograd.grad(value.sum(), x)))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_a_median_that_float32_does_not_hold(place, scale, large, request):
    n = 20 if not large else 300 if request.node.callspec.params["place"] in ("cpu", "reference") else 120
    x = (scale * torch.randn(n, D, device=place)).requires_grad_()
    y, draws = scale * torch.randn(n, D, device=place), torch.randn(5, n, D, device=place)
    results = {
        "direction": ivfast.svgd_direction(x),
        "mmd": ivfast.mmd(x, y, kernel="rbf", bandwidth="median"),
        "bridge": ivfast.svgd_bridge(x, 3, draws=draws, iterations=2)[1],
    }
    for name, result in results.items():
        assert result.isnan().all(), name
        assert torch.autograd.grad(result.sum(), x)[0].isnan().all(), name
