"""Multi-class Jensen–Shannon loss in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch
from helpers import cases, close, misaligned, same_bits_in_every_schedule, size, undecided

import ivfast
from ivfast import testing
from ivfast.ops.linear_multi_js import multi_js_rows_reference
from ivfast.ops.multi_js import backward_reference, multi_js_loss_reference
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("simt")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


CLASSES = (2, 3, 5, 31, 32, 33, 130, 256, 257)  # a thread to 32, eight threads to 256, a warp above
forward, backward = torch.ops.ivfast.multi_js_loss, torch.ops.ivfast.multi_js_loss_backward


def js_case(shape, *, weighted=False, smoothing=0.0, scale=3.0, slack=1.0) -> Case:
    weights = torch.rand(shape[-1]).bfloat16() + 0.25 if weighted else None

    def loss(x):
        # the same numbers in every dtype
        return ivfast.multi_js_loss(x, weights=None if weights is None else weights.to(x), label_smoothing=smoothing)

    return Case("multi_js_loss", f"{tuple(shape)} {smoothing}", loss, undecided(shape, scale), slack=slack)


class TestMultiJs:
    @dtypes
    @cases("multi_js_loss", "multi_js_divergence", "linear_multi_js_loss")
    def test_cases(self, case, dtype):
        matches(case, dtype)

    @dtypes
    @pytest.mark.parametrize("classes", CLASSES)
    def test_classes(self, classes, dtype):
        most = max(1, 400 // classes)
        for n in (1, size(2, most + 1)):
            matches(js_case((classes * n, classes), weighted=n == 1), dtype)
        batch = [size(1, 3) for _ in range(size(1, 2))]
        matches(js_case((*batch, classes, size(1, max(1, 40 // classes)), classes), smoothing=0.25), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_block_for_each_row(self, dtype):
        # 5,000 rows of 5,000 logits in chunks: the whole of it is multi_js_loss with as many rows
        x = (torch.randn(9, 5000) * 3).to(dtype)
        rows_match(x, None, 0.25, first=2, n=3)
        rows_match(misaligned(x), None, 0.0, first=4990, n=1)

    def test_many_classes(self):
        classes = 4097
        x = torch.randn(classes, classes) * 3
        with ivfast.use("cuda"):
            loss, lse = forward.cuda(x, None, 0.0)
        close(lse, x.double().logsumexp(-1))
        close(loss, (lse.double() - x.diagonal()).mean())

    @pytest.mark.parametrize(("n", "classes"), [(1023, 2), (1300, 2), (700, 5), (300, 31), (150, 33), (2, 300)])
    def test_several_blocks_and_sets(self, n, classes):
        matches(js_case((classes * n, classes), weighted=True))
        matches(js_case((3, classes, n, classes), smoothing=0.5))

    @dtypes
    @pytest.mark.parametrize("classes", range(2, 9))
    def test_many_rows_of_few_classes(self, classes, dtype):
        # whole and partial tiles of a warp, in one block, a few and more; sets on 16-byte boundaries and off them
        for n in (1024 // classes + 1, size(1200, 4000) // classes, size(1200, 4000) // classes // 8 * 8 + 8):
            matches(js_case((classes * n, classes), weighted=True), dtype)
        for n in (1040, 1041):
            matches(js_case((2, classes, n // classes, classes), smoothing=0.25), dtype)
            rows_match((torch.randn(n, classes) * 3).to(dtype), None, 0.1, first=size(0, n), n=n)

    def test_paper_sizes(self):
        for n in (64, 100, 128):
            matches(js_case((5 * n, 5)))
            matches(js_case((2, 5, n, 5)))

    @pytest.mark.parametrize("classes", [5, 33, 300])
    def test_more_sets_than_blocks(self, classes):
        matches(js_case((600, classes, 1, classes) if classes == 5 else (3, classes, 1, classes)))

    @pytest.mark.parametrize("classes", [3, 40, 300])
    @pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
    def test_what_is_infinite_or_no_number(self, classes, smoothing):
        rows = torch.randn(8, classes, 2, classes)
        rows[1, 0, :, 1:] = float("-inf")  # impossible classes
        rows[2, 1, 0, 0] = float("-inf")
        rows[3] = rows[3].sign() * 1e4
        rows[4, 0, 1, 2] = float("nan")
        rows[5, 2, 1, 2] = float("inf")
        rows[6, 1, 1] = float("-inf")
        rows[7, 0, 1] = 1e4
        grad = torch.rand(8)
        with ivfast.use("cuda"):
            loss, lse = forward.cuda(rows, None, smoothing)
        expected, expected_lse = multi_js_loss_reference(rows.double(), None, smoothing)
        agree(loss, expected)
        agree(lse, expected_lse)
        gradient = backward.cuda(grad, rows, None, lse, smoothing)
        agree(gradient, backward_reference(grad.double(), rows.double(), None, lse.double(), smoothing))
        assert loss[4].isnan()
        if smoothing == 1:
            assert loss[2] == float("inf")  # of the mean, where a whole row's target is spread out

    def test_a_uniform_target_does_not_ask_for_the_own_logit(self):
        x = torch.zeros(3, 2, 3)
        x[1, 0, 1] = float("-inf")
        loss = forward.cuda(x, None, 0.0)[0]
        assert loss == float("inf")
        x = torch.full((3, 2, 3), float("-inf"))
        x[..., 0] = 0
        # lse − mean of the logits: infinite, and never 0·(−inf)
        assert forward.cuda(x, None, 1.0)[0] == float("inf")

    def test_expanded_gradient_and_strided_logits(self):
        for classes in (3, 40):
            x = torch.randn(2, classes, 5, 2 * classes)[..., ::2].requires_grad_()
            with ivfast.use("cuda"):
                (ours,) = torch.autograd.grad(ivfast.multi_js_loss(x).sum(), x)
            (theirs,) = torch.autograd.grad(ivfast.multi_js_loss(x.double()).sum(), x)
            assert ours.is_contiguous()
            close(ours, theirs)

    @dtypes
    @pytest.mark.parametrize("classes", [5, 6, 40, 300])
    def test_logits_that_do_not_start_on_a_boundary(self, classes, dtype):
        x, grad = torch.randn(classes, 3, classes).to(dtype), torch.ones(())
        ours, theirs = ((*forward.cuda(y, None, 0.1),) for y in (misaligned(x), x))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)  # lanes share a row differently
        dx = [backward.cuda(grad, y, None, theirs[1], 0.1) for y in (misaligned(x), x)]
        close(*dx)

    def test_no_sets(self):
        x = torch.empty(0, 3, 5, 3, requires_grad=True)
        with ivfast.use("cuda"):
            loss = ivfast.multi_js_loss(x)
            assert loss.shape == (0,)
            assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape

    @pytest.mark.parametrize(("n", "classes"), [(700, 5), (600, 8), (5, 32), (60, 40), (1, 300)])
    def test_every_schedule_gives_the_same_bits(self, simt, n, classes):
        x = torch.randn(2, classes, n, classes)

        def call():
            loss, lse = forward.cuda(x, None, 0.1)
            return loss, lse, backward.cuda(loss, x, None, lse, 0.1)

        same_bits_in_every_schedule(simt, call)

    def test_float64_is_refused(self):
        with ivfast.use("cuda"), pytest.raises(RuntimeError, match="takes float32, bfloat16 or float16, got Double"):
            ivfast.multi_js_loss(torch.randn(6, 3).double())


def agree(ours, theirs):
    """Infinite and NaN in the same places, and close in all others."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(), theirs[~finite].to(ours.dtype).nan_to_num())
    close(ours[finite], theirs[finite])


def rows_match(x, weights, smoothing, *, first, n):
    rows = torch.ops.ivfast.multi_js_rows_.cuda
    exact = x.double()
    exact_weights = None if weights is None else weights.double()
    expected = multi_js_rows_reference(exact, exact_weights, smoothing, first, n, True)
    before = x.clone()
    value = rows(x, weights, smoothing, first, n, False)
    assert torch.equal(x, before)
    loss = rows(x, weights, smoothing, first, n, True)
    assert torch.equal(loss, value)
    # differences of numbers of about 1 per row, and of probabilities in the gradient
    unit = 1 / (x.shape[1] * n)
    close(loss, expected, unit=len(x) * unit)
    close(x, exact, unit=unit)


class TestMultiJsRows:
    @dtypes
    @pytest.mark.parametrize("classes", CLASSES)
    def test_chunks_cut_in_the_middle_of_a_block(self, classes, dtype):
        for weighted in (False, True):
            n = size(2, 40)
            first = size(0, classes * n - 1)
            count = size(1, min(classes * n - first, 70))
            weights = torch.rand(classes) + 0.1 if weighted else None
            x = (torch.randn(count, classes) * 3).to(dtype)
            rows_match(x, weights, 0.3 * weighted, first=first, n=n)
            rows_match(misaligned(torch.randn(count, classes).to(dtype)), weights, 1.0, first=first, n=n)

    def test_several_blocks(self):
        rows_match(torch.randn(5000, 5), None, 0.0, first=3333, n=2001)
        rows_match(torch.randn(700, 40), None, 0.2, first=77, n=41)

    def test_rows_past_32_bits(self):
        # blocks of 3·10⁹ rows: the class is a 64-bit quotient
        n = 3_000_000_000
        for classes in (5, 40):
            rows_match(torch.randn(9, classes), torch.rand(classes) + 0.1, 0.1, first=2 * n - 4, n=n)

    def test_strided_chunks_are_written_in_place(self):
        wide = torch.randn(20, 14)
        before = wide.clone()
        rows_match(wide[:, ::2], None, 0.1, first=5, n=6)
        assert torch.equal(wide[:, 1::2], before[:, 1::2])

    @pytest.mark.parametrize("classes", [5, 40, 300])
    def test_every_schedule_gives_the_same_bits(self, simt, classes):
        x = torch.randn(1500, classes)

        def call():
            chunk = x.clone()
            return torch.ops.ivfast.multi_js_rows_.cuda(chunk, None, 0.1, 11, 400, True), chunk

        same_bits_in_every_schedule(simt, call)
