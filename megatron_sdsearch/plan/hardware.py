"""What GPUs can do by their vendor, and which share of it is assumed to be reached. One table each, nothing elsewhere.

Peaks are the vendor's dense bf16 figures. Shares are assumptions with their reasons: no run of ours stands behind them,
and none was fitted to the paper's hours (docs/planning.md compares with those).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sdsearch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of GPU in a node of up to eight.

    Attributes:
        name: as people call it.
        tflops: dense bf16, peak.
        memory_bytes: of one GPU as CUDA reports it, rounded down (torch's out-of-memory messages: 79.1 to 79.3 GiB of
            an "80 GB" card, 139.7 GiB of a "141 GB" one).
        hbm_gbs: GB/s of its memory, peak.
        nvlink_gbs: GB/s that one GPU sends within the node, one direction: half of the advertised sum of both.
        network_gbs: GB/s that one GPU sends to other nodes, one direction.
        source: of these figures.
    """

    name: str
    tflops: float
    memory_bytes: int
    hbm_gbs: float
    nvlink_gbs: float
    network_gbs: float
    source: str


_GIB = 2**30
_H100 = (
    "NVIDIA H100 datasheet (SXM: 989 TFLOPS dense bf16, 80 GB, 3.35 TB/s, NVLink 900 GB/s); DGX H100: 400 Gb/s a GPU"
)
_H800 = "as H100 but for NVLink: 400 GB/s; 400 Gb/s InfiniBand a GPU (50 GB/s: DeepSeek-V3, arXiv 2412.19437, 3.2.2)"
_H200 = (
    "NVIDIA H200 datasheet (SXM: 989 TFLOPS dense bf16, 141 GB, 4.8 TB/s, NVLink 900 GB/s); DGX H200: 400 Gb/s a GPU"
)
_A100 = "NVIDIA A100 80GB datasheet (SXM: 312 TFLOPS dense bf16, 2039 GB/s, NVLink 600 GB/s); DGX A100: 200 Gb/s a GPU"
HARDWARE = {
    gpu.name: gpu
    for gpu in (
        Hardware(
            name="h100",
            tflops=989,
            memory_bytes=79 * _GIB,
            hbm_gbs=3350,
            nvlink_gbs=450,
            network_gbs=50,
            source=_H100,
        ),
        Hardware(
            name="h800",
            tflops=989,
            memory_bytes=79 * _GIB,
            hbm_gbs=3350,
            nvlink_gbs=200,
            network_gbs=50,
            source=_H800,
        ),
        Hardware(
            name="h200",
            tflops=989,
            memory_bytes=139 * _GIB,
            hbm_gbs=4800,
            nvlink_gbs=450,
            network_gbs=50,
            source=_H200,
        ),
        Hardware(
            name="a100",
            tflops=312,
            memory_bytes=79 * _GIB,
            hbm_gbs=2039,
            nvlink_gbs=300,
            network_gbs=25,
            source=_A100,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the peaks, and times that no roofline knows.

    Attributes:
        training: of peak FLOPS in the matrix products of training. Megatron-LM reports 41 % to 48 % end to end on H100
            for 2B to 462B parameters; short packed sequences and a model of 3B stay at its lower end.
        prefill: of peak FLOPS when prompts and observations are read.
        memory: of peak bandwidth while decoding.
        links: of NVLink and network.
        decode_step_s: what one decoding step of a server costs beside reading memory: launches, scheduling, sampling.
        all_reduce_s: a small all-reduce between the GPUs of one server.
        embedded_kernel_s: one kernel launch of the embedded engine, which uses no CUDA graphs.
        tail: the step ends with its longest trajectory, which is so many times as long as the mean.
        disk_gbs: of the file system that servers read weights from.
        http_gbs: of the rank that sends weights in requests, to all servers together.
    """

    training: float = 0.40
    prefill: float = 0.50
    memory: float = 0.60
    links: float = 0.70
    decode_step_s: float = 3e-3
    all_reduce_s: float = 10e-6
    embedded_kernel_s: float = 8e-6
    tail: float = 1.5
    disk_gbs: float = 2.0
    http_gbs: float = 1.0


def hardware_of(name: str) -> Hardware:
    """By name.

    Raises:
        ConfigError: it is not in the table.
    """
    if name not in HARDWARE:
        raise ConfigError("--hardware", f"{name!r} is not known", f"use one of {', '.join(HARDWARE)}, or cpu")
    return HARDWARE[name]
