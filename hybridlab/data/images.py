"""From the name of an image source to its images; MNIST is read from its files, or downloaded."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import math
import struct
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.nn.functional import interpolate

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.files import writing_to
from hybridlab.data.cache import ELSEWHERE, cache_folder
from hybridlab.data.image_batches import ImageData, Images, Labels

SOURCES = ("digits", "mnist", "mnist:PATH")


def load_images(source: str, *, cache: Path | None = None) -> ImageData:
    """Load the images that `source` names.

    source: `digits` (no download), `mnist:PATH` (a folder of the four IDX files) or `mnist` (downloaded
        once, with checksums)
    cache: the folder for downloads; None is `HYBRIDLAB_CACHE`, else the user's cache folder

    Raises UserError for an unknown source and for files that are missing or damaged.
    """
    kind, _, argument = source.partition(":")
    if source == "digits":
        return _digits()
    if source == "mnist":
        return load_mnist_folder(download_mnist(cache), source)
    if kind == "mnist" and argument:
        return load_mnist_folder(Path(argument).expanduser(), source)
    raise UserError(f"unknown image source {source!r}: {nearest(source, SOURCES)}")


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small, labels = load_digits(return_X_y=True)  # [1797, 64], 0 to 16
    images = torch.from_numpy(small).view(-1, 1, 8, 8) * (255 / 16)
    scaled = interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    pixels = scaled.squeeze(1).round().to(torch.uint8).numpy()
    train_images, test_images, train_labels, test_labels = train_test_split(
        pixels, labels.astype(np.int64), test_size=0.2, stratify=labels, random_state=0
    )
    return ImageData(
        source="digits",
        description="scikit-learn's 1,797 handwritten digits (8 x 8, scaled to 28 x 28): not MNIST",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


# Of the decompressed content: mirrors compress the same content to different files.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
LARGEST_FILE_BYTES = 20_000_000
LARGEST_CONTENT_BYTES = 100_000_000  # MNIST's largest file has 47 MB
TIMEOUT_S = 20
IDX_OF_BYTES = bytes([0, 0, 8])  # how a file of unsigned bytes begins


def load_mnist_folder(folder: Path, source: str) -> ImageData:
    """Read the four IDX files of MNIST in `folder`, with or without `.gz`.

    Raises UserError for a missing or damaged file, and for images and labels that do not belong together.
    """
    train_images, train_labels = _labeled(folder, "train")
    test_images, test_labels = _labeled(folder, "t10k")
    return ImageData(
        source=source,
        description=f"MNIST: {len(train_images):,} + {len(test_images):,} handwritten digits",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


def download_mnist(cache: Path | None) -> Path:
    """The cache folder that holds MNIST's four files, downloaded where missing and checked every time."""
    folder = cache_folder(cache) / "mnist"
    with writing_to(folder, otherwise=ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            for name, sha256 in SHA256.items():
                _ensure(folder / f"{name}.gz", sha256)
    return folder


def read_idx(path: Path) -> Images:
    """Read an IDX file of unsigned bytes, compressed or not.

    The file holds two zero bytes, the type of its numbers (0x08), how many dimensions, each dimension as a
    big-endian 32-bit integer, and the numbers. Raises UserError when it does not, and, before they are unpacked, when
    there are more of them than MNIST has.
    """
    with _unpacked(path) as file:
        mark = file.read(4)
        if len(mark) < 4 or not mark.startswith(IDX_OF_BYTES):
            raise UserError(f"{path}: not an IDX file of unsigned bytes (it starts with {mark.hex()}).")
        if not 1 <= mark[3] <= 4:
            raise UserError(f"{path}: {mark[3]} dimensions; MNIST's files have 1 or 3.")
        sizes = file.read(4 * mark[3])
        if len(sizes) < 4 * mark[3]:
            raise UserError(f"{path}: the file ends inside its header: fetch it again.")
        shape = struct.unpack(f">{mark[3]}I", sizes)
        if math.prod(shape) > LARGEST_CONTENT_BYTES:
            raise UserError(f"{path}: its header names {math.prod(shape):,} numbers: that is not MNIST.")
        numbers = np.frombuffer(file.read(math.prod(shape) + 1), np.uint8)
    if numbers.size != math.prod(shape):
        raise UserError(f"{path}: its bytes do not make the shape {shape}: fetch it again.")
    return numbers.reshape(shape)


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file, unpacked as it is read where it is gzip."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if packed else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged: fetch it again.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _ensure(path: Path, sha256: str) -> None:
    if path.exists():
        if _is_right(path.read_bytes(), sha256):
            return
        warnings.warn(f"{path} is broken: downloading it again", stacklevel=5)
    answers = (_fetched(mirror + path.name) for mirror in MIRRORS)
    content = next((answer for answer in answers if _is_right(answer, sha256)), None)
    if content is None:
        raise UserError(
            f"MNIST cannot be downloaded ({path.name}: no mirror answered with the right file): name a folder "
            "that has it with 'mnist:PATH', or use 'digits', which needs no network."
        )
    path.write_bytes(content)  # if that is cut short, the next start finds out and asks again


def _fetched(url: str) -> bytes:
    """What the mirror answers; nothing where it does not."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return response.read(LARGEST_FILE_BYTES)
    except (OSError, http.client.HTTPException):  # no network, no such name, no such file, too slow, cut off
        return b""


def _is_right(content: bytes, sha256: str) -> bool:
    """Whether the content of a gzip file has this checksum."""
    try:
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST_CONTENT_BYTES)
    except (OSError, EOFError, zlib.error):
        return False
    return hashlib.sha256(unpacked).hexdigest() == sha256


def _labeled(folder: Path, part: str) -> tuple[Images, Labels]:
    images_path, labels_path = _file(folder, f"{part}-images", 3), _file(folder, f"{part}-labels", 1)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or not len(images):
        raise UserError(f"{images_path}: images of shape {images.shape}; MNIST's are (n, 28, 28).")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{labels_path}: labels of shape {labels.shape} for {len(images):,} images.")
    if labels.max() > 9:
        raise UserError(f"{labels_path}: the label {labels.max()}; MNIST's are 0 to 9.")
    return images, labels.astype(np.int64)


def _file(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{mark}idx{dimensions}-ubyte{suffix}" for suffix in ("", ".gz") for mark in "-."]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder / names[0]}: no such file, with or without .gz; MNIST is four IDX files.")
    return found
