import math

import numpy as np
import pytest
import torch
from distributed import run_ranks
from dit_oracle import stored

from megavtp.errors import UserError
from megavtp.evaluation.distances import feature_sets
from megavtp.evaluation.distances.feature_sets import (
    FeatureMoments,
    FeatureStatistics,
    few_samples_warning,
    frechet_distance,
    statistics_of,
)
from megavtp.evaluation.distances.npz_file import read_statistics, write_statistics
from megavtp.parallel.mesh import build_mesh

# rows of either set, dimensions: more rows than dimensions, and a singular covariance on one side and on both
SIZES = {"regular": (900, 700, 48), "one singular": (600, 40, 64), "both singular": (60, 50, 96)}


def features(case: str) -> tuple[np.ndarray, np.ndarray]:
    """float32, with a spectrum over five decades and a mean far from zero, as features of networks have."""
    n, m, dims = SIZES[case]
    draw = np.random.default_rng(3)
    turn = np.linalg.qr(draw.standard_normal((dims, dims)))[0]
    spread = np.exp(-np.arange(dims) / dims * 11)
    x = (draw.standard_normal((n, dims)) * spread) @ turn + 3
    y = (draw.standard_normal((m, dims)) * spread[::-1] * 0.5 + 0.2) @ turn + 3
    return x.astype(np.float32), y.astype(np.float32)


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """From the rows themselves: tr (C1 C2)^(1/2) is the nuclear norm of X Y^T of the centred, scaled rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross


def textbook(x: np.ndarray, y: np.ndarray) -> float:
    """By the eigenvalues of the product of numpy's covariances; good to the root of the rounding error."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * roots


def streamed(rows: np.ndarray, batch_size: int) -> FeatureMoments:
    moments = FeatureMoments(rows.shape[1])
    for start in range(0, len(rows), batch_size):
        moments.update(torch.from_numpy(rows[start : start + batch_size]))
    return moments


def on_rank(rank: int) -> dict[str, list[float]]:
    mesh = build_mesh(1, 1)
    return {
        case: [
            frechet_distance(*(streamed(z[rank :: mesh.dp], size).statistics(mesh) for z in features(case)))
            for size in (1, 7, 64)
        ]
        for case in SIZES
    }


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("batch_size", [1, 7, 64, 100_000])
def test_equals_the_reference_for_every_batch_size(case, batch_size):
    x, y = features(case)
    got = frechet_distance(streamed(x, batch_size).statistics(), streamed(y, batch_size).statistics())
    assert got == pytest.approx(reference(x, y), rel=1e-9)
    assert got == pytest.approx(textbook(x, y), rel=1e-6)
    whole = (statistics_of(torch.from_numpy(z)) for z in (x, y))
    assert got == frechet_distance(*whole)  # to the last bit


@pytest.mark.parametrize("world", [2, 4])
def test_equals_the_reference_for_every_process_count(world):
    for found in run_ranks(world, on_rank):
        for case, distances in found.items():
            assert distances == pytest.approx([reference(*features(case))] * 3, rel=1e-9)


@pytest.mark.parametrize("case", SIZES)
def test_a_set_is_at_no_distance_from_itself(case):
    x, _ = features(case)
    one, other = statistics_of(torch.from_numpy(x)), streamed(x[::-1].copy(), 13).statistics()
    assert 0 <= frechet_distance(one, one) < 1e-12 * float(one.covariance.trace())
    assert 0 <= frechet_distance(one, other) < 1e-12 * float(one.covariance.trace())


@pytest.mark.parametrize("case", ["full_rank", "same", "singular"])
def test_distances_of_lightningdits_script(case):
    """Made with scipy's matrix root, which is less exact: of a set to itself it says 1e-13, not 0."""
    data = stored("frechet")
    one, other = (statistics_of(data[f"{case}/{side}"]) for side in "ab")
    assert frechet_distance(one, other) == pytest.approx(data[f"{case}/fid"].item(), rel=1e-6, abs=1e-9)


def gaussian(mean, covariance) -> FeatureStatistics:
    return FeatureStatistics(torch.tensor(mean).double(), torch.tensor(covariance).double(), None)


def test_known_gaussians():
    # commuting: |m1 - m2|^2 + sum (s1 - s2)^2
    a, b = gaussian([1.0, 0, 2], np.diag([4.0, 9, 0])), gaussian([0.0, 0, 4], np.diag([1.0, 16, 25]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 1 + 25, rel=1e-12)
    # two dimensions: tr (A B)^(1/2) = sqrt(tr A B + 2 sqrt(det A det B)) by Cayley and Hamilton
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    want = 0.25 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(gaussian([0.0, 0.5], a), gaussian([0.0, 0.0], b)) == pytest.approx(want, rel=1e-12)


def test_squares_are_enough_where_they_are_exact(monkeypatch):
    x, y = (statistics_of(torch.from_numpy(one)) for one in features("regular"))
    short = frechet_distance(x, y)
    monkeypatch.setattr(feature_sets, "_ENOUGH", 0)
    assert frechet_distance(x, y) == pytest.approx(short, rel=1e-11)
    monkeypatch.setattr(feature_sets.torch.linalg, "svdvals", None)
    with pytest.raises(TypeError):
        frechet_distance(x, y)
    monkeypatch.setattr(feature_sets, "_ENOUGH", 1e-10)
    assert frechet_distance(x, y) == short


def test_moments_keep_a_small_spread_beside_a_large_mean():
    rows = np.random.default_rng(0).standard_normal((5000, 4)) + 1e8
    moments = FeatureMoments(4)
    for part in np.split(rows, 50):
        moments.update(torch.from_numpy(part))
    got = moments.statistics()
    # sums of squares of 1e16 would have lost all of it
    np.testing.assert_allclose(got.covariance.numpy(), np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got.mean.numpy(), rows.mean(0), rtol=1e-13)
    assert got.count == 5000


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two(count):
    with pytest.raises(UserError, match=f"^{count} image.* covariance"):
        statistics_of(torch.zeros(count, 3))


def test_too_few_samples_are_told():
    few, enough = statistics_of(torch.randn(5, 5)), statistics_of(torch.randn(6, 5))
    assert few_samples_warning("x", "samples", few) and not few_samples_warning("x", "samples", enough)
    assert not few_samples_warning("x", "samples", gaussian([0.0], [[1.0]]))  # unknown
    text = few_samples_warning("generation/fd_efficientnet", "samples", statistics_of(torch.randn(5, 9)))
    assert "5 samples" in text and "more than 9" in text and "biased" in text


def test_statistics_go_through_a_file(tmp_path):
    statistics = statistics_of(torch.from_numpy(features("regular")[0]))
    path = tmp_path / "new" / "reference.npz"
    write_statistics(path, statistics, "efficientnet")
    got = read_statistics(path, "efficientnet", 48)
    assert torch.equal(got.mean, statistics.mean) and torch.equal(got.covariance, statistics.covariance)
    assert got.count == 900 and [p.name for p in path.parent.iterdir()] == ["reference.npz"]
    with pytest.raises(UserError, match="efficientnet features, these images' are inception's"):
        read_statistics(path, "inception", 48)
    with pytest.raises(UserError, match="name one"):
        write_statistics(tmp_path / "reference.json", statistics, "efficientnet")


def test_adm_file(tmp_path):
    """No word on the network: Inception's. Other arrays are not looked at."""
    np.savez(tmp_path / "adm.npz", mu=np.arange(3.0), sigma=np.eye(3), mu_s=np.zeros(9), arr_0=np.zeros((1, 2, 2, 3)))
    statistics = read_statistics(tmp_path / "adm.npz", "inception", 3)
    assert statistics.mean.tolist() == [0, 1, 2] and statistics.count is None
    write_statistics(tmp_path / "again.npz", statistics, "inception")
    assert read_statistics(tmp_path / "again.npz", "inception", 3).count is None
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    assert read_statistics(tmp_path / "images.npz", "inception", 3) is None


class Hostile:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"do not belong to 3 features"),
    ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
    ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "no symmetric"),
    ({"mu": np.array([Hostile()] * 3, object), "sigma": np.eye(3)}, "plain arrays"),
    ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "plain arrays"),
])  # fmt: skip
def test_wrong_statistics_are_refused(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "x.npz", "inception", 3)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x04K\x01."])
def test_files_that_are_no_archive_are_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="no whole .npz file"):
        read_statistics(tmp_path / "x.npz", "inception", 3)
