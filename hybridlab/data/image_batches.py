"""Batches of images, normalized, shuffled by epoch or in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from hybridlab.data.image_data import Images, Labels
from hybridlab.errors import UserError

ImageBatch = tuple[Float[Tensor, "batch 1 28 28"], Int64[Tensor, " batch"]]


class ImageBatches:
    """Training batches, shuffled anew each epoch without replacement; batch n depends on (seed, n) alone.

        x = (pixel / 255 - mean) / std

    - `images`, `labels`: uint8 [n, 28, 28] and int64 [n]; kept on `device` as bytes.
    - `mean`, `std`: of the training pixels on the scale 0 to 1; computed from `images` where not given.

    An epoch is `n // batch_size` batches; the images left over differ from epoch to epoch.
    Raises `UserError` when a batch is larger than the data set.
    """

    def __init__(
        self,
        images: Images,
        labels: Labels,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        mean: float | None = None,
        std: float | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise UserError(f"batch_size={batch_size}: choose 1 to {len(images)}, the number of images.")
        self._images, self._labels = _on_device(images, labels, device)
        self._mean = float(images.mean(dtype=np.float64) / 255) if mean is None else mean
        self._std = float(images.std(dtype=np.float64) / 255) if std is None else std
        self._seed, self._order_epoch = seed, -1
        self.batch_size, self.batches_per_epoch = batch_size, len(images) // batch_size

    def __call__(self, step: int) -> ImageBatch:
        """The batch of this step: normalized images and their labels."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, self._shuffled(epoch)
        chosen = self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return _normalized(self._images[chosen], self._mean, self._std), self._labels[chosen]

    def _shuffled(self, epoch: int) -> Int64[Tensor, " images"]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._images))
        return torch.from_numpy(order).to(self._images.device)


def images_in_order(
    images: Images,
    labels: Labels,
    *,
    batch_size: int,
    mean: float,
    std: float,
    device: torch.device | str = "cpu",
) -> list[ImageBatch]:
    """Every image once, in order, for validation; the last batch may be smaller.

    `mean` and `std` are those of the *training* pixels: `ImageData.pixel_mean` and `pixel_std`.
    """
    pixels, classes = _on_device(images, labels, device)
    normalized = _normalized(pixels, mean, std)
    return list(zip(torch.split(normalized, batch_size), torch.split(classes, batch_size), strict=True))


def _on_device(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], device: torch.device | str
) -> tuple[UInt8[Tensor, "images 28 28"], Int64[Tensor, " images"]]:
    return torch.tensor(images, device=device), torch.tensor(labels, device=device)


def _normalized(
    pixels: UInt8[Tensor, "images height width"], mean: float, std: float
) -> Float[Tensor, "images 1 height width"]:
    scaled = (pixels.to(torch.float32) / 255 - mean) / std
    return rearrange(scaled, "images height width -> images 1 height width")
