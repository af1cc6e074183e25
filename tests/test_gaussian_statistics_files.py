"""Streaming statistics through files: those of pytorch-fid, and writes that fail."""

import io
import zipfile

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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": torch.tensor(2.7)}, "must be one integer, got 2.7"),
        ({"count": torch.tensor([5, 5])}, "must be one integer"),
        ({"scatter": torch.eye(3) * 1j}, "must be floating, got torch.complex64"),
    ],
)
def test_a_state_that_is_none_is_refused(changes, said):
    state = of(normal(40, 3)).state_dict()
    with pytest.raises(ValueError, match=said):
        GaussianStatistics(3).load_state_dict({**state, **changes})


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
            ({"mu": np.zeros(3), "sigma": np.eye(3), "count": 1}, "count must be at least 2 .*, got 1"),
            ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "mu must hold real numbers, got <U1"),
            ({"mu": np.zeros(3), "sigma": np.eye(3, dtype=bool)}, "sigma must hold real numbers, got bool"),
            ({"mu": np.zeros(3) * 1j, "sigma": np.eye(3)}, "mu must hold real numbers, got complex128"),
            ({"mu": np.zeros(3), "sigma": np.eye(3) * 1j}, "sigma must hold real numbers, got complex128"),
            ({"mu": np.array([0, np.inf, 0]), "sigma": np.eye(3)}, "mu must be finite"),
            ({"mu": np.zeros(3), "sigma": np.eye(3) * np.nan}, "sigma must be finite"),
            ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "sigma must be a covariance, got the variance -1"),
            ({"mu": np.zeros(3), "sigma": 1.9 * np.eye(3) - 0.9}, "has a negative eigenvalue"),  # 1.9 − 2.7
            ({"mu": np.zeros(2), "sigma": np.array([[0.0, 1.0], [1.0, 1.0]])}, "has a negative eigenvalue"),
            ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.4, 1.0]])}, "sigma must be symmetric"),
            ({"mu": np.zeros(3), "sigma": np.eye(3), "count": 2.7}, r"count must be one integer, got float64 \[\]"),
            ({"mu": np.zeros(3), "sigma": np.eye(3), "count": np.inf}, "count must be one integer, got float64"),
            ({"mu": np.zeros(3), "sigma": np.eye(3), "count": [5, 5]}, r"count must be one integer, got int64 \[2\]"),
            ({"mu": np.zeros(3), "sigma": np.eye(3), "count": -5}, "count must be at least 2 .*, got -5"),
            ({"mu": np.zeros(3), "sigma": np.eye(3), "count": 1 << 62}, "count must be at least 2 and at most 2.53"),
            ({"mu": np.zeros(3), "sigma": 1e305 * np.eye(3), "count": 10**6}, "must have a finite sum over 1,000,000"),
        ],
    )
    def test_refuse_other_arrays(self, tmp_path, arrays, said):
        np.savez(tmp_path / "other.npz", **arrays)
        with pytest.raises(ValueError, match=said) as caught:
            GaussianStatistics.load(tmp_path / "other.npz")
        assert str(tmp_path / "other.npz") in str(caught.value)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_a_flipped_bit_is_noticed_or_changes_nothing(self, tmp_path, save):
        x, path = normal(12, 6).numpy(), tmp_path / "stats.npz"
        save(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False), count=np.int64(12))
        good, whole, refused = GaussianStatistics.load(path), path.read_bytes(), 0
        passed = 0
        for bit in torch.randint(8 * len(whole), (200,)).tolist():
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            try:
                stats = GaussianStatistics.load(path)
            except ValueError as error:
                refused += str(path) in str(error)
                continue
            # a date, or another byte that nobody reads
            assert stats.count == 12
            assert torch.equal(stats.mean, good.mean)
            assert torch.equal(stats.scatter, good.scatter)
            passed += 1
        assert refused + passed == 200
        assert refused > 100

    @pytest.mark.parametrize("lie", ["header", "directory"])
    def test_a_claim_of_terabytes_is_refused_before_anything_is_allocated(self, tmp_path, lie):
        path, d = tmp_path / "stats.npz", 10**6
        claim, file = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array_header_1_0(
            claim, {"descr": "<f8", "fortran_order": False, "shape": (d, d) if lie == "header" else (3, 3)}
        )
        np.save(file, np.zeros(d if lie == "header" else 3))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("mu.npy", file.getvalue())
            archive.writestr("sigma.npy", claim.getvalue() + bytes(72))
            if lie == "directory":
                archive.getinfo("sigma.npy").file_size = 8 * d * d
        with pytest.raises(ValueError, match=r"stats\.npz is not an \.npz file of arrays: sigma\.npy claims 8,000,000"):
            GaussianStatistics.load(path)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.longdouble, ">f8", np.int64])
    def test_honest_rounding_and_other_layouts_are_accepted(self, tmp_path, dtype):
        x = 20 * normal(30, 40).numpy()  # below full rank: rounding makes eigenvalues negative
        x[:, 0] = 3  # a feature that never varies
        mu, sigma = (a.astype(dtype) for a in (x.mean(0), np.cov(x, rowvar=False)))
        np.savez(tmp_path / "stats.npz", mu=mu, sigma=np.asfortranarray(sigma), arr_0=np.zeros(3), mu_s=mu)
        stats = GaussianStatistics.load(tmp_path / "stats.npz")
        np.testing.assert_array_equal(stats.mean, mu.astype(np.float64))
        np.testing.assert_array_equal(stats.covariance, sigma.astype(np.float64))

    def test_what_is_not_finite_is_not_written(self, tmp_path):
        stats = of(normal(40, 4)).update(torch.full((1, 4), torch.inf))
        with pytest.raises(ValueError, match="statistics must be finite"):
            stats.save(tmp_path / "stats.npz")
        assert list(tmp_path.iterdir()) == []

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
