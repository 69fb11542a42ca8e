"""Ranks: who this process is, and the few collectives that planning and saving need.

In: the environment that a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Out:
rank, world size, sums and maxima over ranks.
Invariant: without a launcher a process is rank 0 of 1, through the same code as any other world size.
Trade-off: a single process also makes a process group (0.1 s), so that there is no second code path to
trust.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

LOST_RANK = ("Connection closed by", "Connection reset by", "Connection refused", "Timed out waiting")
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # model loading may differ by minutes between ranks


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine; chooses the GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def claim_device() -> None:
    """Make this rank's GPU torch's current one; collectives of Python objects go through that one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())


def fill_environment() -> None:
    """Give a process without a launcher the variables that a launcher would set for rank 0 of 1."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def sums_and_maxima(sums: list[float], maxima: list[float]) -> tuple[list[float], list[float]]:
    """Sum the first values over ranks and take the maximum of the second; float64."""
    if world_size() == 1:
        return list(sums), list(maxima)  # no round trip to the device
    total = torch.tensor(sums, dtype=torch.float64, device=device())
    largest = torch.tensor(maxima, dtype=torch.float64, device=device())
    if sums:
        torch_dist.all_reduce(total)
    if maxima:
        torch_dist.all_reduce(largest, op=torch_dist.ReduceOp.MAX)
    return total.tolist(), largest.tolist()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over ranks, in place; all ranks call it."""
    if world_size() > 1:
        torch_dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank; all ranks call it."""
    _, (largest,) = sums_and_maxima([], [float(flag)])
    return bool(largest)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def peak_memory_bytes() -> int:
    """This rank's peak: GPU bytes allocated by torch, or the process's resident memory on a CPU.

    The latter from /proc: `getrusage` counts in what the parent held when it started this process.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        torch_dist.barrier()


def is_about_a_lost_rank(error: RuntimeError) -> bool:
    """Whether an error of NCCL, gloo or the store says that another rank ended or didn't answer in time."""
    return world_size() > 1 and (
        isinstance(error, torch_dist.DistError) or any(words in str(error) for words in LOST_RANK)
    )
