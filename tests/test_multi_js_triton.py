"""Multi-class Jensen–Shannon loss in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import size, undecided

import ivfast
from ivfast import testing
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)
triton_device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py


def assert_matches(case: Case, dtype: torch.dtype, implementation: str, device: str = "cpu"):
    testing.check(case, testing.inputs(case, dtype, device=device), implementation)


def js_case(shape, *, weighted=False, scale=3.0, slack=1.0, dtype=torch.float32) -> Case:
    weights = torch.rand(shape[-1]) + 0.1 if weighted else None

    def loss(x):
        on_device = None if weights is None else weights.to(x)  # rounded like the input, also for the reference
        return ivfast.multi_js_loss(x, weights=on_device)

    if weights is not None:
        weights = weights.to(dtype)
    return Case("multi_js_loss", f"{tuple(shape)}", loss, undecided(shape, scale), slack=slack)


@pytest.mark.usefixtures("poisoned")
class TestMultiJs:
    """Interpreted if there is no GPU."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("case", [c for c in testing.CASES if c.op == "multi_js_loss"], ids=str)
    def test_cases(self, case, dtype):
        assert_matches(case, dtype, "triton", triton_device)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("classes", [2, 3, 5, 17, 32, 33])
    def test_random_sizes(self, classes, dtype, weighted):
        batch = [size(1, 3) for _ in range(size(0, 2))]
        shape = (*batch, classes, size(1, 37), classes)
        assert_matches(js_case(shape, weighted=weighted, dtype=dtype), dtype, "triton", triton_device)

    @pytest.mark.parametrize("classes", [100, 600])
    def test_many_classes(self, classes):
        assert_matches(js_case((classes, 1, classes)), torch.float32, "triton", triton_device)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scale", [3.0, 300.0])
    def test_a_row_of_several_tiles(self, monkeypatch, dtype, scale):
        from ivfast.kernels import multi_js

        # 65,536 classes would be 4·10⁹ logits: a small tile takes the same path
        monkeypatch.setattr(multi_js, "TILE", dict.fromkeys(multi_js.TILE, 16))
        monkeypatch.setattr(multi_js, "PARTS", 4)
        classes = size(33, 50)
        assert multi_js._Shape(1, 2, 2 * classes, classes, torch.float32).programs == 4
        # a log-sum-exp of 900 is rounded by up to 3e-5, which is a relative error of exp(x − lse)
        case = js_case((classes, 2, classes), scale=scale, slack=3 if scale > 100 else 1)
        assert_matches(case, dtype, "triton", triton_device)

    def test_paper_sizes_take_one_launch_forward(self):
        from ivfast.kernels.multi_js import _Shape

        for n in (64, 100, 128):
            assert _Shape(1, n, 5 * n, 5, torch.float32).programs == 1

    def test_infinite_logits_give_what_the_reference_gives(self):
        x = torch.randn(3, 40, 3, device=triton_device)
        x[0, :, 1] = float("-inf")
        x[1, 7] = torch.tensor([0.0, 1.0, float("inf")])
        expected = ivfast.multi_js_loss(x.double())
        with ivfast.use("triton"):
            assert float(ivfast.multi_js_loss(x)) == float(expected) == float("inf")
        x[1, 7] = 0.0
        with ivfast.use("triton"):
            assert testing.error(ivfast.multi_js_loss(x), ivfast.multi_js_loss(x.double())) < 1e-6

    def test_expanded_gradient_and_strided_logits(self):
        x = torch.randn(2, 3, 5, 6, device=triton_device)[..., ::2].requires_grad_()
        assert not x.is_contiguous()
        with ivfast.use("triton"):
            (ours,) = torch.autograd.grad(ivfast.multi_js_loss(x).sum(), x)
        (theirs,) = torch.autograd.grad(ivfast.multi_js_loss(x.double()).sum(), x)
        assert testing.error(ours.cpu(), theirs.cpu()) <= testing.TOLERANCES[torch.float32]

    def test_no_sets(self):
        x = torch.empty(0, 3, 5, 3, device=triton_device, requires_grad=True)
        with ivfast.use("triton"):
            loss = ivfast.multi_js_loss(x)
            assert loss.shape == (0,)
            assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape
