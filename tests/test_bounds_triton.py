"""No Triton kernel reads or writes outside the tensors that it is given (bounds.py). `IVFAST_BOUNDS=1` checks this in
every other test of an interpreted kernel as well."""

import re
from pathlib import Path

import pytest
import torch
from helpers import size, smallest_cases
from test_far_apart_cpu import outliers
from test_median_cuda import median_case
from test_mmd_triton import mmd_case
from test_svgd_bridge_triton import bridge_case
from test_svgd_cuda import direction_case

import ivfast
from ivfast import testing
from ivfast.ops import gaussian_statistics
from ivfast.ops.fld import fld_gram
from ivfast.ops.inverse_root import inverse_root

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
selection = pytest.importorskip("ivfast.kernels.selection")
multi_js = pytest.importorskip("ivfast.kernels.multi_js")
reconstruction = pytest.importorskip("ivfast.kernels.reconstruction")
median_kernels = pytest.importorskip("ivfast.kernels.median")
KERNELS = Path(selection.__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted"),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # overflows, in the interpreter's NumPy
]


@triton.jit
def _copy_kernel(p_x, p_y, first, start, end):
    i = first + tl.arange(0, 4)
    tl.store(p_y + i, tl.load(p_x + i, mask=i < end, other=0.0), mask=(i >= start) & (i < 4))


@triton.jit
def _unmasked_kernel(p_x, p_y, first):
    tl.store(p_y + tl.arange(0, 4), tl.load(p_x + first + tl.arange(0, 4)))


@triton.jit
def _add_kernel(p_x, first):
    tl.atomic_add(p_x + first + tl.arange(0, 4), 1.0)


class TestTheCheck:
    """A check that finds nothing would pass every kernel."""

    def test_lanes_that_are_masked_may_be_anywhere(self, bounds):
        x, y = torch.arange(4.0), torch.zeros(4)
        _copy_kernel[1,](x, y, 1, 0, 4)
        assert y.tolist() == [0, 1, 2, 3]
        _copy_kernel[1,](x, y, 100, 0, 4)
        assert bounds.count == 4

    @pytest.mark.parametrize(
        ("launch", "message"),
        [
            (lambda x, y: _copy_kernel[1,](x, y, 1, 0, 5), "load at byte 16 of p_x"),
            (lambda x, y: _copy_kernel[1,](x, y, -1, -1, 0), "load at byte -4 of p_x"),
            (lambda x, y: _copy_kernel[1,](x, y[:3], 0, 0, 4), "store at byte 12 of p_y"),
            (lambda x, y: _unmasked_kernel[1,](x, y, 1), "load at byte 16 of p_x"),
            (lambda x, y: _unmasked_kernel[1,](x[:0], y, 0), "load at byte 0 of p_x"),
            (lambda x, y: _add_kernel[1,](x, -3), "atomic at byte -12 of p_x"),
        ],
    )
    def test_one_number_outside(self, bounds, launch, message):
        both = torch.zeros(8)  # the tensors are neighbours: what is outside one is inside the other
        with pytest.raises(triton.runtime.errors.InterpreterError, match=rf"test_bounds_triton\._\w+: {message}"):
            launch(both[:4], both[4:])

    def test_a_tensor_with_gaps(self, bounds):
        x = torch.arange(12.0)[1::3]
        y = torch.zeros(4)
        _unmasked_kernel[1,](x, y, 6)
        assert y.tolist() == [7, 8, 9, 10]
        with pytest.raises(triton.runtime.errors.InterpreterError, match="load at byte 40 of p_x"):
            _unmasked_kernel[1,](x, y, 7)


def run(*cases, dtype=torch.float32):
    for case in cases:
        with ivfast.use("triton"):
            testing.value_and_gradients(case, testing.inputs(case, dtype))


def table(*ops):
    """The smallest cases of some ops."""
    return lambda monkeypatch: run(*(c for c in smallest_cases() if c.op in ops))


def far(case):
    """The same with rows that need differences."""

    def draw(generator):
        x, *rest = case.draw(generator)
        return outliers(x, 1e5), *rest

    return case._replace(draw=draw)


def direction(monkeypatch):
    run(direction_case(65, 17, score=False))
    run(direction_case(7, 3, batch=(2,)), far(direction_case(20, 5)), dtype=torch.bfloat16)


def median(monkeypatch):
    run(median_case(5, 3, batch=(2,)), far(median_case(7, 17)))
    monkeypatch.setattr(selection, "SAMPLES", 64)
    monkeypatch.setattr(selection, "SAMPLED", 0)
    run(median_case(66, 3, "paper"), dtype=torch.float16)
    monkeypatch.setattr(median_kernels, "SMALL", 0)
    run(far(median_case(7, 17)))


def bridge(monkeypatch):
    run(bridge_case(17, 3, 2, iterations=1), bridge_case(33, 5, 2, iterations=1), dtype=torch.bfloat16)


def mmd(monkeypatch):
    run(mmd_case(3, 65, 16), far(mmd_case(7, 5, 17, kernel="rbf", scales=(1.0, 2.0, 3.0), bandwidth=9.0)))
    with ivfast.use("triton"):  # without gradients
        ivfast.mmd(outliers(torch.randn(7, 5), 1e5), torch.randn(5, 5), unbiased=False)


def statistics(monkeypatch):
    monkeypatch.setattr(gaussian_statistics, "_one_pass", lambda x: True)
    for n, d in ((2, 1), (33, 65)):
        ivfast.GaussianStatistics(d).update(torch.randn(n, d))


def latent_distance(monkeypatch):
    with ivfast.use("triton"):
        for n, d in ((5, 3), (3, 40)):
            fld_gram(torch.randn(2, n, d), True)


def roots(monkeypatch):
    with ivfast.use("triton"):
        inverse_root(torch.eye(17).expand(2, 17, 17))


def classes(monkeypatch):
    several = table("multi_js_loss", "linear_multi_js_loss", "multi_js_divergence")
    several(monkeypatch)
    monkeypatch.setattr(multi_js, "TILE", dict.fromkeys(multi_js.TILE, 4))
    monkeypatch.setattr(multi_js, "ONE_PROGRAM", 1)
    several(monkeypatch)


def images(monkeypatch):
    run(*(c for c in smallest_cases() if c.op == "reconstruction_loss"))
    monkeypatch.setattr(reconstruction, "TILE", 4)
    monkeypatch.setattr(reconstruction, "ONE_PROGRAM", 1)
    monkeypatch.setattr(reconstruction, "PARTS", 8)
    run(*(c for c in testing.CASES if c.op == "reconstruction_loss" and c.label in ("l1", "bce")))


def distances(monkeypatch):
    """One form, drawn: each takes several seconds."""
    forms = [c for c in smallest_cases() if c.op in ("as_distance", "log_gaussian_kernel_sums")]
    run(forms[size(0, len(forms) - 1)])


CALLS = {
    "svgd svgd_far particles": direction,
    "median median_pairs selection": median,
    "svgd_bridge": bridge,
    "mmd mmd_far": mmd,
    "gaussian_statistics": statistics,
    "fld": latent_distance,
    "inverse_root": roots,
    "as_distance as_distance_backward": distances,
    "bridge": table("blockwise_bridge", "radial_bridge", "block_substitute"),
    "exp_elbo": table("exp_elbo_loss"),
    "gaussian": table("gaussian_kl", "reparameterize"),
    "importance": table("importance_weighted_loss"),
    "multi_js": classes,
    "reconstruction": images,
}


def launched(module: str) -> set[str]:
    """A module's kernels; as_distance.log_kernel is called by others."""
    names = re.findall(r"^def (\w+_kernel)\(", (KERNELS / f"{module}.py").read_text(), re.M)
    return {f"{module}.{name}" for name in names} - {"as_distance.log_kernel"}


@pytest.mark.parametrize("modules", CALLS)
def test_every_kernel_stays_within_its_tensors(bounds, monkeypatch, modules):
    CALLS[modules](monkeypatch)
    assert set().union(*map(launched, modules.split())) <= bounds.kernels


def test_no_module_is_left_out():
    assert {path.stem for path in KERNELS.glob("*.py") if launched(path.stem)} == set(" ".join(CALLS).split())
