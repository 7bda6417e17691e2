"""Image sources: the file format, the download's checks, and what batches promise."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import tracemalloc
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlab.base.errors import UserError
from hybridlab.data import ImageBatches, ImageData, images, images_in_order, load_images

REAL_MNIST = Path(__file__).parents[2] / "shared/data/mnist"
SHAPES = {
    "train-images-idx3-ubyte": (7, 28, 28),
    "train-labels-idx1-ubyte": (7,),
    "t10k-images-idx3-ubyte": (3, 28, 28),
    "t10k-labels-idx1-ubyte": (3,),
}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 40_000, 1000, 100)


@pytest.fixture
def tiny() -> dict[str, np.ndarray]:
    """MNIST's four arrays, small; pixels 0 to 255, labels 0 to 6."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(256 if len(shape) == 3 else 7, size=shape, dtype=np.uint8) for name, shape in SHAPES.items()
    }


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    for name, array in tiny.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


# --- mnist:PATH ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_MNIST.exists(), reason="the real MNIST is not beside the repository")
def test_the_real_mnist_is_read_whole():
    data = load_images(f"mnist:{REAL_MNIST}")
    assert (len(data.train_images), len(data.test_images)) == (60_000, 10_000)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(data.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (data.pixel_mean, data.pixel_std) == pytest.approx((0.1307, 0.3081), abs=1e-4)


@pytest.mark.skipif(not REAL_MNIST.exists(), reason="the real MNIST is not beside the repository")
def test_the_checksums_are_those_of_the_real_files():
    for name, sha256 in images.SHA256.items():
        assert hashlib.sha256(gzip.decompress((REAL_MNIST / f"{name}.gz").read_bytes())).hexdigest() == sha256


@pytest.mark.parametrize("style", ["plain", "gzip", "dotted"])
def test_idx_files_give_back_their_arrays(folder, tiny, style):
    for name in tiny if style != "plain" else ():
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if style == "gzip":
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name.replace("-idx", ".idx")).write_bytes(content)
    data = load_images(f"mnist:{folder}")
    assert np.array_equal(data.train_images, tiny["train-images-idx3-ubyte"])
    assert np.array_equal(data.test_labels, tiny["t10k-labels-idx1-ubyte"])
    assert data.train_labels.dtype == np.int64
    assert json.loads(json.dumps(data.record()))["train_images"] == 7


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"<html>", "not an IDX file"),
        ("train-images-idx3-ubyte", bytes([0, 0, 8, 3, 0]), "ends inside its header"),
        ("train-images-idx3-ubyte", idx(np.zeros((7, 28, 28), np.uint8))[:-1], "do not make the shape"),
        ("train-images-idx3-ubyte", idx(np.zeros((7, 8, 8), np.uint8)), r"MNIST's are \(n, 28, 28\)"),
        ("train-labels-idx1-ubyte", idx(np.zeros(6, np.uint8)), "for 7 images"),
        ("train-labels-idx1-ubyte", idx(np.full(7, 10, np.uint8)), "the label 10"),
        ("t10k-labels-idx1-ubyte", gzip.compress(idx(np.zeros(3, np.uint8)), mtime=0)[:-9], "gzip file is damaged"),
        ("train-images-idx3-ubyte", HUGE, "its header names 4,000,000,000 numbers: that is not MNIST"),
        ("train-images-idx3-ubyte", gzip.compress(HUGE + bytes(10**6)), "its header names 4,000,000,000 numbers"),
        ("train-images-idx3-ubyte", gzip.compress(idx(np.zeros((7, 28, 28), np.uint8)) + bytes(10**7)), "do not make"),
        ("train-images-idx3-ubyte", bytes([0, 0, 8, 255]) + bytes(255 * 4), "255 dimensions"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        load_images(f"mnist:{folder}")


def test_a_compressed_file_is_unpacked_no_further_than_its_header_says(folder):
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(gzip.compress(idx(np.zeros((7, 28, 28), np.uint8)) + bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(UserError, match="do not make the shape"):
        load_images(f"mnist:{folder}")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_missing_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte: no such file"):
        load_images(f"mnist:{folder}")


# --- mnist, downloaded --------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tiny, monkeypatch) -> dict[str, bytes]:
    """A network with one mirror that serves the tiny files; what it serves can be changed."""
    served = {f"{name}.gz": gzip.compress(idx(array)) for name, array in tiny.items()}
    sha256 = {name: hashlib.sha256(idx(array)).hexdigest() for name, array in tiny.items()}
    monkeypatch.setattr(images, "SHA256", sha256)

    def urlopen(url: str, timeout: float) -> BytesIO:
        name = url.rpartition("/")[2]
        if not url.startswith(images.MIRRORS[-1]) or name not in served:
            raise urllib.error.URLError("no such host")
        return BytesIO(served[name])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return served


def test_a_download_is_checked_kept_and_used_again_without_a_network(mirror, tmp_path):
    first = load_images("mnist", cache=tmp_path)
    mirror.clear()
    assert load_images("mnist", cache=tmp_path).sha256 == first.sha256
    assert len(first.train_images) == 7


def test_a_broken_download_is_fetched_again_with_a_message(mirror, tmp_path):
    first = load_images("mnist", cache=tmp_path)
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="broken: downloading it again"):
        assert load_images("mnist", cache=tmp_path).sha256 == first.sha256


def test_wrong_content_or_no_network_names_the_ways_out(mirror, tmp_path):
    mirror["train-labels-idx1-ubyte.gz"] = gzip.compress(b"something else")
    with pytest.raises(UserError, match=r"train-labels.*'mnist:PATH'.*'digits'"):
        load_images("mnist", cache=tmp_path)
    assert not list(tmp_path.glob("mnist/train-labels*"))
    mirror.clear()
    with pytest.raises(UserError, match="no network"):
        load_images("mnist", cache=tmp_path / "other")


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_are_real_stratified_and_named_as_what_they_are(digits):
    assert "not MNIST" in digits.description
    assert (len(digits.train_images), len(digits.test_images)) == (1437, 360)
    assert digits.train_images.shape[1:] == (28, 28)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() == 255
    assert np.bincount(digits.test_labels).min() >= 34
    assert load_images("digits").record() == digits.record()


def test_scaled_digits_keep_their_shape(digits):
    """A classifier of nearest class means works on them: they are digits still, and labels fit images."""
    means = np.stack([digits.train_images[digits.train_labels == digit].mean(axis=0) for digit in range(10)])
    distances = ((digits.test_images[:, None].astype(float) - means) ** 2).sum(axis=(2, 3))
    assert (distances.argmin(axis=1) == digits.test_labels).mean() > 0.85


# --- names and batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("minst", "did you mean 'mnist'"),
        ("digit", "did you mean 'digits'"),
        ("cifar", "choose one of digits, mnist, mnist:PATH"),
        ("mnist:", "mnist:PATH"),
        ("digits:/x", "did you mean 'digits'"),
    ],
)
def test_a_wrong_source_names_the_right_one(source, message):
    with pytest.raises(UserError, match=message):
        load_images(source)


def numbered(count: int) -> ImageData:
    """Images whose every pixel is their label, so that an image can be recognized."""
    labels = np.arange(count)
    images = np.broadcast_to(labels[:, None, None].astype(np.uint8), (count, 28, 28))
    return ImageData("numbered", "each pixel is the label", images, labels, images[:1], labels[:1])


def test_an_epoch_shows_no_image_twice_and_the_next_is_shuffled_anew():
    batches = ImageBatches(numbered(10), batch_size=3, seed=0)
    epochs = [torch.cat([batches(3 * epoch + n)[1] for n in range(3)]).tolist() for epoch in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = (ImageBatches(numbered(10), batch_size=3, seed=4) for _ in range(2))
    for step in range(7):
        one(step)
    assert torch.equal(one(7)[1], other(7)[1])
    assert torch.equal(one(1)[0], other(1)[0])
    assert not torch.equal(one(7)[1], ImageBatches(numbered(10), batch_size=3, seed=5)(7)[1])


def test_images_stay_with_their_labels_and_are_normalized(digits):
    images, labels = ImageBatches(numbered(10), batch_size=4, seed=0)(1)
    assert images.shape == (4, 1, 28, 28)
    assert labels.dtype == torch.int64
    mean, std = 4.5, np.std(range(10))
    assert images[:, 0, 0, 0].tolist() == pytest.approx([(label - mean) / std for label in labels.tolist()])
    everything, _ = ImageBatches(digits, batch_size=1437, seed=0)(0)
    assert (everything.mean().item(), everything.std().item()) == pytest.approx((0, 1), abs=1e-3)


def test_in_order_covers_every_test_image_with_the_training_statistics(digits):
    batches = images_in_order(digits, batch_size=100)
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.cat([labels for _, labels in batches]).tolist() == digits.test_labels.tolist()
    expected = (digits.test_images[0, 14, 14] / 255 - digits.pixel_mean) / digits.pixel_std
    assert batches[0][0][0, 0, 14, 14].item() == pytest.approx(expected, abs=1e-5)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="batch_size=11: choose 1 to 10"):
        ImageBatches(numbered(10), batch_size=11, seed=0)
