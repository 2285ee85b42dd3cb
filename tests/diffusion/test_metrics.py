import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from mambavision.diffusion.metrics import FeatureSet, frechet_distance, kernel_distance, squared_mmd
from mambavision.engine.photos import DatasetError


def random_covariance(dim, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank or dim, generator=generator, dtype=torch.float64)
    return factor @ factor.T / dim


def normal(mean, covariance, count=100):
    return FeatureSet("e", "s", count, torch.as_tensor(mean, dtype=torch.float64), covariance)


def drawn(count, dim=8, shift=0.0, seed=0, source="s"):
    generator = torch.Generator().manual_seed(seed)
    return FeatureSet.of(torch.randn(count, dim, generator=generator) + shift, extractor="e", source=source)


def test_frechet_distance_of_normals_that_have_a_closed_form():
    mean = torch.arange(5.0)
    a, b = normal(mean, torch.diag(torch.arange(1.0, 6).double() ** 2)), normal(mean * 0, torch.eye(5).double() * 4)
    want = (mean**2).sum() + ((torch.arange(1.0, 6) - 2) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rank", [12, 5], ids=["full rank", "singular"])
def test_frechet_distance_agrees_with_a_matrix_square_root(rank):
    a, b = (normal(torch.full((12,), float(i)), random_covariance(12, rank, i)) for i in (0, 1))
    product = a.covariance.numpy() @ b.covariance.numpy()
    root = np.trace(sqrtm(product + 1e-13 * np.eye(12)).real)
    want = 12 + np.trace(a.covariance.numpy()) + np.trace(b.covariance.numpy()) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_samples_nears_that_of_their_distributions():
    a, b = drawn(20000), drawn(20000, shift=0.5, seed=1)
    assert frechet_distance(a, b) == pytest.approx(8 * 0.25, rel=0.05)
    small = frechet_distance(drawn(50), drawn(50, seed=1))
    assert small > 10 * frechet_distance(a, drawn(20000, seed=1))  # its bias falls with the number of samples


def test_squared_mmd_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 4, 6, generator=generator)
    same = torch.tensor([squared_mmd(u, v) for u, v in zip(x[::2], x[1::2], strict=True)])
    assert abs(same.mean()) < 4 * same.std() / len(same) ** 0.5 and (same < 0).any()


def test_squared_mmd_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=generator).double(), torch.randn(7, 3, generator=generator).double() + 1

    def k(u, v):
        return float((u @ v / 3 + 1) ** 3)

    def within(u):
        return np.mean([k(u[i], u[j]) for i in range(len(u)) for j in range(len(u)) if i != j])

    want = within(x) + within(y) - 2 * np.mean([k(u, v) for u in x for v in y])
    assert squared_mmd(x, y) == pytest.approx(want, rel=1e-12)


def test_kernel_distance_tells_sets_apart_and_is_the_same_again():
    a, same, other = drawn(400), drawn(300, seed=1), drawn(300, shift=0.5, seed=2)
    mean, std = kernel_distance(a, same, subsets=20, subset_size=100)
    apart, _ = kernel_distance(a, other, subsets=20, subset_size=100)
    assert abs(mean) < 0.1 < 1 < apart and std > 0
    assert kernel_distance(a, same, subsets=20, subset_size=100) == (mean, std)


def test_features_of_different_networks_are_not_compared():
    a, b = drawn(10), FeatureSet.of(torch.randn(10, 8), extractor="another", source="t")
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="are by e, those of t by another"):
            distance(a, b)
    with pytest.raises(ValueError, match="at least 2"):
        FeatureSet.of(torch.randn(1, 8), extractor="e", source="s")


def test_a_set_is_saved_and_read(tmp_path):
    a, b = drawn(50), drawn(60, seed=1)
    a.save(tmp_path / "a.npz")
    read = FeatureSet.load(tmp_path / "a.npz")
    assert (read.extractor, read.source, read.count) == ("e", "s", 50)
    assert frechet_distance(read, b) == frechet_distance(a, b)
    assert kernel_distance(read, b)[0] == pytest.approx(kernel_distance(a, b)[0], abs=0.01)
    a.save(tmp_path / "m.npz", with_features=False)
    short = FeatureSet.load(tmp_path / "m.npz")
    assert frechet_distance(short, b) == frechet_distance(a, b)
    with pytest.raises(ValueError, match="needs the features"):
        kernel_distance(short, b)
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


def test_files_that_hold_no_features(tmp_path):
    with pytest.raises(ValueError, match="name such a file"):
        drawn(5).save(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="gone.npz"):
        FeatureSet.load(tmp_path / "gone.npz")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_text("")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:60])
    for name in ("other", "text", "empty", "cut"):
        with pytest.raises(DatasetError, match=f"{name}.npz: no file of features"):
            FeatureSet.load(tmp_path / f"{name}.npz")
