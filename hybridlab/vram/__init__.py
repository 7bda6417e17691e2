"""How much memory a run takes: as the GPU counts it, or as the process does where there is no GPU."""

from hybridlab.vram.meter import MemoryMeter, MemoryReading, exceeds
from hybridlab.vram.sampler import MemorySampler
