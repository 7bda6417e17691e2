"""About how long a step takes, from a GPU's data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.base.errors import UserError, nearest
from hybridlab.planner.plan import Plan


@dataclass(frozen=True)
class GpuSpec:
    """Figures of a GPU's data sheet, per second; dense rates, with float32 accumulation.

    float32_flops: outside tensor cores; bfloat16_flops: in them
    memory_bytes: in all; bandwidth_bytes: of its memory; bus_bytes: of its link to the host, one way
    """

    name: str
    memory_bytes: int
    float32_flops: float
    bfloat16_flops: float
    bandwidth_bytes: float
    bus_bytes: float


PCIE_4, PCIE_5 = 31.5e9, 63.0e9

GPUS = {
    "rtx3090": GpuSpec("GeForce RTX 3090", 24_000_000_000, 35.6e12, 71.0e12, 936e9, PCIE_4),
    "rtx4080": GpuSpec("GeForce RTX 4080", 16_000_000_000, 48.7e12, 97.5e12, 716.8e9, PCIE_4),
    "rtx4090": GpuSpec("GeForce RTX 4090", 24_000_000_000, 82.6e12, 165.2e12, 1008e9, PCIE_4),
    "rtx5080": GpuSpec("GeForce RTX 5080", 16_000_000_000, 56.3e12, 112.6e12, 960e9, PCIE_5),
    "rtx5090": GpuSpec("GeForce RTX 5090", 32_000_000_000, 104.8e12, 209.5e12, 1792e9, PCIE_5),
    "a100": GpuSpec("A100 SXM 80GB", 80_000_000_000, 19.5e12, 312e12, 2039e9, PCIE_4),
    "h100": GpuSpec("H100 SXM 80GB", 80_000_000_000, 66.9e12, 989.4e12, 3352e9, PCIE_5),
}
"""Source: NVIDIA's architecture white papers: GA102, Ada, RTX Blackwell, A100 and H100; the bus, PCI-SIG (16 lanes)."""

HOST_BANDWIDTH_BYTES = 89.6e9
"""Of two channels of DDR5-5600."""


def step_time_ms(plan: Plan, gpu: GpuSpec) -> float:
    """Estimate the time of a gradient step; it ranks settings, and is no measurement.

        t = sum over formats of flops / rate  +  moved / bandwidth  +  sent / bus  +  host traffic / host bandwidth

    plan: flops and bytes, as counted in the graph; gpu: rates and bandwidths, at their data sheet's full height

    Real kernels reach less than these rates, and caches spare some of the traffic; nothing is taken to overlap or to
    be fused, and float32 products are not in TF32.
    """
    costs = plan.costs
    half = costs.flops.get("bfloat16", 0) / gpu.bfloat16_flops
    full = costs.flops.get("float32", 0) / gpu.float32_flops
    traffic = costs.moved_bytes / gpu.bandwidth_bytes
    return 1e3 * (half + full + traffic + costs.bus_bytes / gpu.bus_bytes + costs.host_bytes / HOST_BANDWIDTH_BYTES)


def find_gpu(text: str) -> tuple[int, GpuSpec]:
    """Bytes of memory, and the rates to estimate with, of "16GB" or of a name in `GPUS`.

    A size alone takes its rates from the known GPU whose memory is nearest, of two equal ones from the newer.

    Raises UserError for anything else.
    """
    name = text.lower().replace(" ", "")
    if name in GPUS:
        return GPUS[name].memory_bytes, GPUS[name]
    size = name.removesuffix("gb")
    if size == name or not size.replace(".", "", 1).isdigit() or not float(size):
        raise UserError(f"GPU {text!r} is unknown: give its memory, such as 16GB, or its name: {nearest(name, GPUS)}")
    memory_bytes = round(float(size) * 1e9)
    return memory_bytes, min(reversed(GPUS.values()), key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))
