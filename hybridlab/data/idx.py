"""MNIST's file format, IDX: a header that says type and shape, then the numbers."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from hybridlab.base.errors import UserError
from hybridlab.data.image_data import Images

UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Images:
    """Read an IDX file of unsigned bytes, compressed or not.

    The file holds two zero bytes, the type of its numbers (0x08), how many dimensions, each dimension as a
    big-endian 32-bit integer, and the numbers. Raises UserError when it does not.
    """
    return parse_idx(decompressed(path.read_bytes(), str(path)), str(path))


def decompressed(content: bytes, name: str) -> bytes:
    """The content of a file, unpacked where it is gzip; `name` is for the error message."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: the gzip file is damaged: fetch it again.") from error


def parse_idx(content: bytes, name: str) -> Images:
    """The array in the bytes of an IDX file; `name` is for the error message."""
    if len(content) < 4 or content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise UserError(f"{name}: not an IDX file of unsigned bytes (it starts with {content[:4].hex()}).")
    dimensions = content[3]
    header_bytes = 4 + 4 * dimensions
    if len(content) < header_bytes:
        raise UserError(f"{name}: the file ends inside its header: fetch it again.")
    shape = struct.unpack(f">{dimensions}I", content[4:header_bytes])
    numbers = np.frombuffer(content, np.uint8, offset=header_bytes)
    if numbers.size != np.prod(shape, dtype=np.int64):
        raise UserError(f"{name}: {numbers.size:,} bytes do not make the shape {shape}: fetch it again.")
    return numbers.reshape(shape)
