"""Pairwise kernels in Triton with products rounded as on a GPU (rounded_dots.py), interpreted.

Errors are relative to the largest value. In 3xTF32 they stay below the tolerances of float32. In TF32 the numbers of X,
V, G and K are off by at most 2^-11 of themselves, 2^-12 if errors are spread evenly: X by R √h times that if rows are up
to R √h from their centre. Distances and sums of differences are those of the rounded rows, so four such operands (two of
K, V and the gradient) are off by 4 · 2^-12 (1 + R) where rows about √h apart count.
"""

import formulas
import pytest
import torch
from helpers import size
from test_far_apart_cpu import drawn, outliers, tight

import ivfast
from ivfast import testing

rounded_dots = pytest.importorskip("rounded_dots", exc_type=ImportError)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted"),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # overflows, in the interpreter's NumPy
]
N, D = 40, 6
H = 2.0 * D
TF32 = 2.0**-12


def plain(x, far):
    return x


def shifted(x, far):
    return x + 1e3


def clusters(x, far):
    """Two clusters, of which the farther is at q = 22 h: products serve up to 32 h (far.NEAR)."""
    third = len(x) // 3
    return torch.cat((x[:third] + (2 * 22 * H / D) ** 0.5, x[third:]))


def nearly_equal(x, far):
    half = len(x) // 2
    return torch.cat((x[:half], x[:half] + 1e-3 * x[half:]))


# R = √(2q/h) of the rows that are multiplied, 8 for the farthest of them
PLACES = {plain: 2.0, shifted: 2.0, clusters: 8.0, nearly_equal: 2.0, outliers: 2.0, tight: 2.0}
OPS = {
    "median": lambda its, x, y, s, h: its.median_bandwidth(x, convention="paper"),
    "direction": lambda its, x, y, s, h: its.svgd_direction(x, s, bandwidth=h),
    "imq": lambda its, x, y, s, h: its.mmd(x, y, scales=(1.0,), bandwidth=H),
    "rbf": lambda its, x, y, s, h: its.mmd(x, y, kernel="rbf", scales=(1.0,), bandwidth=H),
    "bridge": lambda its, x, y, s, h: its.svgd_bridge(
        x, 2, draws=torch.stack((s, s)).detach(), iterations=1, scale=2.0
    )[1],
}
# what each setting of PyTorch asks of the kernels
ASKED = {
    ("median", "highest"): {"tf32x3"},
    ("median", "high"): {"tf32x3"},
    ("bridge", "high"): {"tf32", "tf32x3"},
}


@pytest.fixture
def products():
    with rounded_dots.rounded() as counts:
        yield counts


def errors(op, place, dtype, setting):
    """The errors of an op's value and gradients with respect to its inputs."""
    x, y = drawn(place, 1e5, dtype, N, D), drawn(place, 1e5, dtype, N, D)
    inputs = x, y, torch.randn(N, D).to(dtype), torch.tensor(H)
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    b = OPS[op](formulas, *exact) if op != "bridge" else _bridge(*exact)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with ivfast.use("triton"):
            a = OPS[op](ivfast, *ours)
            weights = torch.randn(b.shape).to(a.dtype)
            found = torch.autograd.grad(a, ours, weights, allow_unused=True, materialize_grads=True)
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = torch.autograd.grad(b, exact, weights.double(), allow_unused=True, materialize_grads=True)
    # sums that may cancel, a difference of means and ∂h, are held against the size of their terms
    terms = float((b.detach() * weights).norm()) / 8
    units = [1.0 if op in ("imq", "rbf") else 0.0, *(0.0 if g.dim() else terms for g in wanted)]
    return [testing.error(p, q, u) for p, q, u in zip((a, *found), (b, *wanted), units, strict=True)]


def _bridge(x, y, s, h):
    return formulas.svgd_bridge(x, torch.stack((s, s)).detach(), 2, iterations=1, scale=2.0)[1]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_float32(products, setting, op):
    """On inputs that are drawn: each takes two seconds."""
    place = list(PLACES)[size(0, len(PLACES) - 1)]
    bound = testing.TOLERANCES[torch.float32]
    if setting == "high" and op != "median":  # which is always in 3xTF32
        bound += 4 * TF32 * (1 + PLACES[place])
    found = errors(op, place, torch.float32, setting)
    assert max(found) <= bound, (place, found)
    assert set(products) - {"cut"} == ASKED.get((op, setting), {"tf32x3" if setting == "highest" else "tf32"})
    assert products["cut"] == 0


@pytest.mark.parametrize("op", ["median", "direction", "imq"])
def test_half_precision(products, op):
    found = errors(op, clusters, torch.bfloat16, "highest")
    assert max(found) <= testing.TOLERANCES[torch.bfloat16] + 4 * TF32 * (1 + PLACES[clusters]), found
    assert products
