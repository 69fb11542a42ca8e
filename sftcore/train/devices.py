"""Devices: what a plan is for, GPUs of some kind or what this machine has.

In: a GPU's name, or its memory and rate. Out: a frozen `Device` that predictions take.
Invariant: who predicts asks the `Device`, never this machine, so a login node plans for GPUs it doesn't have.
Trade-off: a tenth of the memory counts as taken (0.5 GB of CUDA context, NCCL's buffers, pieces that nothing
fits into, and what a prediction misses), so that a plan that fits by a hair is said not to fit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sftcore.errors import Problem, UserInputError

GPUS = {  # what the driver's name holds -> dense bfloat16 FLOP/s, bytes; from the vendors' data sheets
    "B200": (2.25e15, 180e9),
    "H200": (9.89e14, 141e9),
    "H100 PCIe": (7.56e14, 80e9),
    "H100": (9.89e14, 80e9),
    "A100": (3.12e14, 80e9),
    "L40S": (3.62e14, 48e9),
    "A10": (1.25e14, 24e9),
    "4090": (1.65e14, 24e9),
}
USABLE_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What each rank computes on.

    Args:
        name: for people.
        is_gpu: each rank has one of its own; False: ranks share a machine's CPUs and memory.
        memory_bytes: of a GPU, or of the machine.
        peak_flops: dense bfloat16 FLOP/s; None: not known.
    """

    name: str
    is_gpu: bool
    memory_bytes: int
    peak_flops: float | None = None

    def usable_bytes(self, world: int) -> int:
        """What a rank of `world` may fill.

        >>> Device(name="h100", is_gpu=True, memory_bytes=80).usable_bytes(world=8)
        72
        >>> Device(name="CPUs", is_gpu=False, memory_bytes=80).usable_bytes(world=8)
        9
        """
        return int(USABLE_SHARE * self.memory_bytes / (1 if self.is_gpu else world))


def device_here() -> Device:
    """This machine's first GPU, or its CPUs."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        peak = peak_flops_of(found.name)
        return Device(name=found.name, is_gpu=True, memory_bytes=found.total_memory, peak_flops=peak)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(name="CPUs of this machine", is_gpu=False, memory_bytes=installed)


def peak_flops_of(driver_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by the name that its driver gives; None if we don't know it.

    >>> peak_flops_of("NVIDIA A100-SXM4-80GB") / 1e12
    312.0
    """
    return next((flops for key, (flops, _) in GPUS.items() if key in driver_name), None)


def choose_device(
    gpu: str | None = None, *, memory_gigabytes: float | None = None, teraflops: float | None = None
) -> Device:
    """The device that a plan is asked for; if none is named, the one at hand.

    Args:
        gpu: a name such as a100 or h100-pcie.
        memory_gigabytes: of each GPU, if not what the data sheet says.
        teraflops: dense bfloat16, per second; likewise.

    Raises:
        UserInputError: an unknown name, or a rate without memory.
    """
    if gpu is None and memory_gigabytes is None:
        if teraflops is not None:
            remedy = "name the GPU (--gpu h100), or say its memory too (--gpu-memory 80)"
            raise UserInputError(Problem(what="how much memory?", where="--gpu-tflops", remedy=remedy))
        return device_here()
    sheets = {key.lower().replace(" ", "-"): sheet for key, sheet in GPUS.items()}
    if gpu is not None and gpu.lower() not in sheets:
        raise UserInputError(
            Problem(
                what="no data sheet of this GPU",
                where="--gpu",
                got=gpu,
                allowed=", ".join(sheets),
                remedy="describe it: --gpu-memory 80 --gpu-tflops 312",
            )
        )
    peak, memory = sheets[gpu.lower()] if gpu is not None else (None, 0.0)
    return Device(
        name="GPU" if gpu is None else gpu.lower(),
        is_gpu=True,
        memory_bytes=int(memory if memory_gigabytes is None else memory_gigabytes * 1e9),
        peak_flops=peak if teraflops is None else teraflops * 1e12,
    )
