"""Streaming statistics through files: those of pytorch-fid, and writes that fail."""

import io

import numpy as np
import pytest
import torch
from test_gaussian_statistics import assert_right, normal, of

from ivfast import GaussianStatistics


def test_state_dict_through_a_file():
    stats = of(normal(40, 3))
    for before in (stats, GaussianStatistics(3)):
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after = GaussianStatistics(3)
        after.load_state_dict(torch.load(file, weights_only=True))
        assert (before.count, after.mean.tolist()) == (after.count, before.mean.tolist())
        assert torch.equal(before.scatter, after.scatter)
    state = stats.state_dict()
    stats.update(normal(5, 3))
    assert int(state["count"]) == 40
    assert not torch.equal(state["mean"], stats.mean)  # copies


class TestFiles:
    def test_pytorch_fid_reads_them(self, tmp_path):
        fid_score = pytest.importorskip("pytorch_fid.fid_score")
        stats = of(normal(40, 5))
        stats.save(tmp_path / "stats.npz")
        mu, sigma = fid_score.compute_statistics_of_path(str(tmp_path / "stats.npz"), None, 1, 5, "cpu")
        assert mu.dtype == sigma.dtype == np.float64
        np.testing.assert_array_equal(mu, stats.mean.numpy())
        np.testing.assert_array_equal(sigma, stats.covariance.numpy())
        assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]

    @pytest.mark.parametrize("d", [1, 5])
    def test_those_of_pytorch_fid(self, tmp_path, d):
        x = normal(40, d).numpy()
        path = tmp_path / "theirs.npz"
        np.savez_compressed(path, mu=np.mean(x, axis=0), sigma=np.cov(x, rowvar=False))  # as its save_fid_stats
        stats = GaussianStatistics.load(path)
        assert stats.count is None
        np.testing.assert_array_equal(stats.mean, x.mean(0))
        np.testing.assert_allclose(stats.covariance, np.cov(x, rowvar=False).reshape(d, d), rtol=1e-15)
        stats.save(tmp_path / "again.npz")
        assert torch.equal(GaussianStatistics.load(tmp_path / "again.npz").covariance, stats.covariance)

    def test_what_is_read_back_goes_on(self, tmp_path):
        x = normal(60, 4)
        of(x[:40]).save(tmp_path / "stats.npz")
        assert_right(GaussianStatistics.load(tmp_path / "stats.npz").update(x[40:]), x, torch.float64)

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "stats.npz"
        of(normal(40, 4)).save(path)
        before = path.read_bytes()
        monkeypatch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="No space left"):
            of(normal(40, 4)).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]

    def test_refuse_what_cannot_be_written(self, tmp_path):
        stats = of(normal(40, 4))
        with pytest.raises(FileNotFoundError):
            stats.save(tmp_path / "none" / "stats.npz")
        with pytest.raises(ValueError, match=r"path must end in \.npz"):
            stats.save(tmp_path / "stats.pt")
        with pytest.raises(ValueError, match="covariance needs at least 2 samples, got 0"):
            GaussianStatistics(4).save(tmp_path / "stats.npz")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arrays", "said"),
        [
            ({"mu": np.zeros(3)}, r"must hold mu and sigma, got \['mu'\]"),
            ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"must be \[d\] and \[d, d\], got \[3, 1\], \[3, 3\]"),
            ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"must be \[d\] and \[d, d\], got \[3\], \[4, 4\]"),
            ({"mu": np.zeros(3), "sigma": np.eye(3), "count": 1}, "count must be at least 2, got 1"),
            ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "could not convert"),
        ],
    )
    def test_refuse_other_arrays(self, tmp_path, arrays, said):
        np.savez(tmp_path / "other.npz", **arrays)
        with pytest.raises(ValueError, match=said):
            GaussianStatistics.load(tmp_path / "other.npz")

    @pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken"])
    def test_refuse_other_files(self, tmp_path, content):
        (tmp_path / "other.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not an \.npz file"):
            GaussianStatistics.load(tmp_path / "other.npz")
        with pytest.raises(FileNotFoundError):
            GaussianStatistics.load(tmp_path / "none.npz")


def full_disk(file, **arrays):
    file.write(b"PK")
    raise OSError(28, "No space left on device")
