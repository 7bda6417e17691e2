"""Batches of images, normalized, shuffled by epoch or in order."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from hybridlab.base.errors import UserError
from hybridlab.data.image_data import ImageData, Images, Labels

ImageBatch = tuple[Float[Tensor, "batch 1 28 28"], Int64[Tensor, " batch"]]


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
        self._images, self._labels = _on_device(data.train_images, data.train_labels, device)
        self.batch_size, self.batches_per_epoch = batch_size, count // batch_size

    def __call__(self, step: int) -> ImageBatch:
        """The batch of this step: normalized images and their labels."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, self._shuffled(epoch)
        chosen = self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return _normalized(self._images[chosen], self._data), self._labels[chosen]

    def _shuffled(self, epoch: int) -> Int64[Tensor, " images"]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._images))
        return torch.from_numpy(order).to(self._images.device)


def images_in_order(data: ImageData, *, batch_size: int, device: torch.device | str = "cpu") -> list[ImageBatch]:
    """Every test image once, in order, normalized as the training images are; the last batch may be smaller."""
    pixels, classes = _on_device(data.test_images, data.test_labels, device)
    normalized = _normalized(pixels, data)
    return list(zip(torch.split(normalized, batch_size), torch.split(classes, batch_size), strict=True))


def _on_device(
    images: Images, labels: Labels, device: torch.device | str
) -> tuple[UInt8[Tensor, "images 28 28"], Int64[Tensor, " images"]]:
    return torch.tensor(images, device=device), torch.tensor(labels, device=device)


def _normalized(
    pixels: UInt8[Tensor, "images height width"], data: ImageData
) -> Float[Tensor, "images 1 height width"]:
    scaled = (pixels.to(torch.float32) / 255 - data.pixel_mean) / data.pixel_std
    return rearrange(scaled, "images height width -> images 1 height width")
