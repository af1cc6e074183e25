"""Streaming statistics in Triton, interpreted if there is no GPU."""

import pytest
import torch
from test_gaussian_statistics import assert_right, equal, normal, of

from ivfast.ops import gaussian_statistics as module

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py


@pytest.mark.usefixtures("poisoned")
class TestTriton:
    """Interpreted if there is no GPU."""

    @pytest.fixture(autouse=True)
    def _one_pass(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(module, "_one_pass", lambda x: True)

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 5), (31, 64), (65, 65), (300, 130), (1000, 3)])
    def test_against_numpy(self, n, d, dtype):
        x = normal(n, d, dtype).to(device)
        assert_right(of(x), x)

    @pytest.mark.parametrize("dimensions", [16, 64])
    def test_chunks_of_several_tiles(self, monkeypatch, dimensions):
        from ivfast.kernels import gaussian_statistics
        from ivfast.kernels.card import card

        monkeypatch.setattr(gaussian_statistics, "card", lambda device: card(device)._replace(processors=1))
        monkeypatch.setattr(gaussian_statistics, "BLOCK", dimensions)
        x = normal(500, 20, torch.float32).to(device)
        rows, means, _ = gaussian_statistics.forward(x)
        assert (len(means), rows % gaussian_statistics.ROWS) == (-(-500 // rows), 0)
        assert rows > gaussian_statistics.ROWS
        assert_right(of(x).update(x), torch.cat([x, x]))

    def test_a_mean_of_ten_thousand_deviations(self):
        x = (normal(300, 6) + 1e4).float().to(device)
        assert_right(of(x), x)

    @pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e37])
    def test_scales_whose_squares_are_out_of_the_range_of_float32(self, scale):
        x = (normal(300, 4) * torch.tensor([scale, 1, scale, 1], dtype=torch.float64)).float().to(device)
        x[:, 3] = 0.1
        stats = of(x)
        assert not stats.covariance[3].any()
        assert_right(of(x[:, :3]), x[:, :3])

    def test_no_samples_and_strides_and_another_dtype(self):
        from ivfast.kernels import gaussian_statistics

        x = normal(100, 6, torch.float32).to(device)
        assert equal(of(x[::2, ::2]), of(x[::2, ::2].contiguous()))
        assert gaussian_statistics.forward(x[:0])[1].shape == (0, 6)
        with pytest.raises(TypeError, match="GaussianStatistics in Triton takes float32, bfloat16 or float16"):
            gaussian_statistics.forward(x.double())
