"""What an image source gives: labeled gray images and what is known about them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Gray images of 28 x 28 pixels and their labels, with their provenance.

    source: the string that named the data, such as `digits`
    description: what the data is, in words, for tables
    train_images, test_images: uint8 [n, 28, 28]
    train_labels, test_labels: int64 [n], 0 to 9
    sha256: of the arrays, in the order above: images before labels, training before test
    """

    source: str
    description: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the pixels and labels."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @cached_property
    def pixel_mean(self) -> float:
        """The mean of the training pixels, on the scale 0 to 1."""
        return float(self.train_images.mean(dtype=np.float64) / 255)

    @cached_property
    def pixel_std(self) -> float:
        """The standard deviation of the training pixels, on the scale 0 to 1."""
        return float(self.train_images.std(dtype=np.float64) / 255)

    def record(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON."""
        return {
            "source": self.source,
            "description": self.description,
            "sha256": self.sha256,
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
        }
