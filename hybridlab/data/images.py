"""From the name of an image source to its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from hybridlab.base.errors import UserError, nearest
from hybridlab.data.image_batches import ImageData
from hybridlab.data.mnist import download_mnist, load_mnist_folder

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
