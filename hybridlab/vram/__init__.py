"""How much memory a run takes: as the card counts it, or as the process does where there is no card."""

from hybridlab.vram.meter import MemoryMeter, MemoryReading, exceeds
from hybridlab.vram.sampler import MemorySampler

__all__ = ["MemoryMeter", "MemoryReading", "MemorySampler", "exceeds"]
