"""The Triton kernels of MMD and the AS-Distance, interpreted where there is no GPU."""

import pytest
import torch

import ivfast
from ivfast import testing

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there: tests/conftest.py
pytestmark = pytest.mark.usefixtures("poisoned")


def check(case, dtype=torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


def normal(*shapes, shifts=(0.0, 0.0)):
    def draw(generator):
        samples = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return tuple(x + shift for x, shift in zip(samples, shifts, strict=True))

    return draw


def mmd_case(n, m, d, *, batch=(), shifts=(0.0, 0.0), slack=1.0, **form):
    """Each kernel is 1 at distance 0."""

    def function(x, y):
        return ivfast.mmd(x, y, **form)

    draw = normal((*batch, n, d), (*batch, m, d), shifts=shifts)
    return testing.Case("mmd", f"{(*batch, n, m, d)} {form}", function, draw, unit=0.1, slack=slack)


def size(low, high):
    return int(torch.randint(low, high + 1, ()))


class TestMmd:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kernel", ["imq", "rbf"])
    @pytest.mark.parametrize(("n", "m", "d"), [(2, 3, 1), (17, 2, 13), (3, 65, 16)])
    def test_edges(self, n, m, d, kernel, dtype):
        check(
            mmd_case(n, m, d, batch=(size(1, 2),), kernel=kernel, bandwidth=2.0 * d, unbiased=bool(size(0, 1))), dtype
        )


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter pays by the tile."""
    from ivfast.kernels import as_distance

    monkeypatch.setattr(as_distance, "TILE", as_distance.Tile(128, 128))


def as_case(n, m, d, *, batch=(), logvar=(-3.0, 1.0), shift=0.0, apart=0.0, log=True, slack=1.0, unit=0.0, **form):
    def draw(generator):
        def one(rows, shift):
            mu = torch.randn(*batch, rows, d, generator=generator, dtype=torch.float64) + shift
            low, high = logvar
            return mu, torch.rand(mu.shape, generator=generator, dtype=torch.float64) * (high - low) + low

        return *one(n, shift), *one(m, shift + apart)

    def function(*q):
        return ivfast.as_distance(*q, log=log, **form)

    return testing.Case("as_distance", f"{(*batch, n, m, d)} {form}", function, draw, slack=slack, unit=unit)


FORMS = [(kernel, measure) for kernel in ("product", "additive") for measure in ("lebesgue", "prior")]


@pytest.mark.usefixtures("large_tiles")
class TestAsDistance:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("kernel", "measure"), FORMS)
    @pytest.mark.parametrize(("n", "m", "d"), [(2, 3, 1), (17, 2, 5), (3, 65, 13)])
    def test_edges(self, n, m, d, kernel, measure, dtype):
        form = {"kernel": kernel, "measure": measure, "unbiased": bool(size(0, 1))}
        check(as_case(n, m, d, batch=(size(1, 2),), **form), dtype)
