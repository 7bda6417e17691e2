"""Labeled gray images, and their batches: normalized, shuffled by epoch or in order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from hybridlab.base.errors import UserError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
ImageBatch = tuple[Float[Tensor, "batch 1 28 28"], Int64[Tensor, " batch"]]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Gray images of 28 x 28 pixels and their labels, with their provenance.

    source: the string that named the data, such as `digits`
    description: what the data is, in words, for tables
    train_images, test_images: uint8 [n, 28, 28]
    train_labels, test_labels: int64 [n], 0 to 9
    """

    source: str
    description: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the arrays in the order of their fields."""
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


class ImageBatches:
    """Training batches, shuffled anew each epoch without replacement; batch n depends on (seed, n) alone.

        x = (pixel / 255 - mean) / std

    data: its training images are kept on `device` as bytes; mean and std are those of their pixels

    An epoch is `n // batch_size` batches; the images left over differ from epoch to epoch.

    Raises UserError when a batch is larger than the data set.
    """

    def __init__(self, data: ImageData, *, batch_size: int, seed: int, device: torch.device | str = "cpu") -> None:
        count = len(data.train_images)
        if not 1 <= batch_size <= count:
            raise UserError(f"batch_size={batch_size}: choose 1 to {count}, the number of images.")
        self._data, self._seed, self._order_epoch = data, seed, -1
        self._images = torch.tensor(data.train_images, device=device)
        self._labels = torch.tensor(data.train_labels, device=device)
        self.batch_size, self.batches_per_epoch = batch_size, count // batch_size

    def __call__(self, step: int) -> ImageBatch:
        """The batch of this step: normalized images and their labels."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        if epoch != self._order_epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._images))
            self._order_epoch, self._order = epoch, torch.from_numpy(order).to(self._images.device)
        chosen = self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return _normalized(self._images[chosen], self._data), self._labels[chosen]


def images_in_order(data: ImageData, *, batch_size: int, device: torch.device | str = "cpu") -> list[ImageBatch]:
    """Every test image once, in order, normalized as the training images are; the last batch may be smaller."""
    images = _normalized(torch.tensor(data.test_images, device=device), data)
    labels = torch.tensor(data.test_labels, device=device)
    return list(zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True))


def _normalized(
    pixels: UInt8[Tensor, "images height width"], data: ImageData
) -> Float[Tensor, "images 1 height width"]:
    scaled = (pixels.to(torch.float32) / 255 - data.pixel_mean) / data.pixel_std
    return rearrange(scaled, "images height width -> images 1 height width")
