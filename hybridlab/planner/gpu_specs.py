"""About how long a step takes, from a GPU's data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.settings import LARGEST
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

    def outruns(self, other: GpuSpec) -> bool:
        """Whether it computes, and reads its memory, at higher rates throughout."""
        rates = ("float32_flops", "bfloat16_flops", "bandwidth_bytes")
        return all(getattr(self, rate) > getattr(other, rate) for rate in rates)


PCIE_4, PCIE_5 = 31.5e9, 63.0e9

GPUS = {
    "rtx3090": GpuSpec("GeForce RTX 3090", 24_000_000_000, 35.6e12, 71.0e12, 936e9, PCIE_4),
    "rtx4080": GpuSpec("GeForce RTX 4080", 16_000_000_000, 48.7e12, 97.5e12, 716.8e9, PCIE_4),
    "rtx4090": GpuSpec("GeForce RTX 4090", 24_000_000_000, 82.6e12, 165.2e12, 1008e9, PCIE_4),
    "rtx5080": GpuSpec("GeForce RTX 5080", 16_000_000_000, 56.3e12, 112.6e12, 960e9, PCIE_5),
    "rtx5090": GpuSpec("GeForce RTX 5090", 32_000_000_000, 104.8e12, 209.5e12, 1792e9, PCIE_5),
    "a100": GpuSpec("A100 SXM 80GB", 80_000_000_000, 19.5e12, 312e12, 2039e9, PCIE_4),
    "h100": GpuSpec("H100 SXM 80GB", 80_000_000_000, 66.9e12, 989.4e12, 3352e9, PCIE_5),
    "h200": GpuSpec("H200 SXM", 141_000_000_000, 66.9e12, 989.4e12, 4800e9, PCIE_5),
}
"""Source: NVIDIA's white papers: GA102, Ada, RTX Blackwell, A100, H100 and H200; the bus, PCI-SIG (16 lanes)."""

OF_RATES = 0.7
"""Share of a data sheet's rates that kernels reach, rounded from the arms of `OF_MEASURED`."""

LAUNCH_SECONDS = 50e-6
"""Of the host per kernel, Python and autograd included, rounded from the same arms."""

HOST_UPDATE_BYTES = 16e9
"""Per second of an AdamW on the host."""

HOST_FACTOR = 2
"""How that depends on the host: that of an H100 reached so many times as much, that of an H200 less by the factor."""

OF_MEASURED = (0.5, 1.35)
"""Estimated over measured time: the range of all arms of three GPT-2 sizes on an H100 and an H200, rounded outwards to
0.05, without those whose host moves the weights, and without TF32. A test recomputes it from the committed results."""


def step_time_ms(plan: Plan, gpu: GpuSpec) -> float:
    """Estimate the time of a gradient step; it ranks settings, and is no measurement.

        computation = (sum over formats of flops / rate  +  moved / bandwidth) / OF_RATES
        t           = max(computation, kernels × launch)  +  sent / bus  +  `host_update_ms`

    plan: flops, bytes and kernels, as counted in the graph; gpu: rates and bandwidths, as its data sheet has them

    Caches spare some of the traffic. Nothing is taken to be fused, the bus is not used beside the computation, and
    float32 products are not in TF32.
    """
    costs = plan.costs
    half = costs.flops.get("bfloat16", 0) / gpu.bfloat16_flops
    full = costs.flops.get("float32", 0) / gpu.float32_flops
    computation = (half + full + costs.moved_bytes / gpu.bandwidth_bytes) / OF_RATES
    on_gpu = max(computation, costs.kernels * LAUNCH_SECONDS) + costs.bus_bytes / gpu.bus_bytes
    return 1e3 * on_gpu + host_update_ms(plan)


def host_update_ms(plan: Plan) -> float:
    """Estimate the part of a gradient step in which the host moves the weights; 0 where the GPU does."""
    return 1e3 * plan.costs.host_bytes / HOST_UPDATE_BYTES


def find_gpu(text: str) -> tuple[int, GpuSpec | None]:
    """Bytes of memory of "16GB" or of a name in `GPUS`, and the data sheet, which a size alone does not tell.

    Raises UserError for anything else.
    """
    name = text.lower().replace(" ", "")
    if name in GPUS:
        return GPUS[name].memory_bytes, GPUS[name]
    size = name.removesuffix("gb")
    if size == name or not size.replace(".", "", 1).isdecimal() or not 0 < float(size) < LARGEST:
        raise UserError(f"GPU {text!r} is unknown: give its memory, such as 16GB, or its name: {nearest(name, GPUS)}")
    return round(float(size) * 1e9), None


def spec_of(device_name: str) -> GpuSpec | None:
    """The data sheet of a GPU by the name that its driver gives, as "NVIDIA H100 80GB HBM3"."""
    name = device_name.lower().replace(" ", "")
    return next((spec for key, spec in GPUS.items() if key in name), None)


def nearest_gpu(memory_bytes: int) -> GpuSpec:
    """The known GPU whose memory is nearest, of two equal ones the newer: options can be ranked by its rates."""
    return min(reversed(GPUS.values()), key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))
