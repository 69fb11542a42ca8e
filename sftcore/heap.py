"""Memory of libraries on CPUs: what one step frees serves the next, and kernels of past shapes go.

In: nothing. Out: a process whose freed memory stays with it, up to a size, and whose kernels don't pile up.
Invariant: no number depends on it; other C libraries and CUDA's memory are left alone.
Trade-off: by default glibc maps large tensors afresh and the kernel zeroes their pages again in every step:
8 samples of SmolLM2-135M took 1.59 instead of 1.26 s a step (2026-11). Tensors of `KEPT_BYTES` and more do go
back, as gradients of 262,144 words: kept, they left holes in the heap that grew (Gemma-3-270M, 64 samples
a step: 9.3 GB; with the limit 8.3, with nothing kept 8.0 and 13 % slower).
"""

from __future__ import annotations

import ctypes
import os
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
KEPT_BYTES = 2**28  # of one tensor; up to twice as many stay at the heap's end
KEPT_KERNELS = 128  # a step of SmolLM2 uses some 50; with 32 kept it took a quarter longer


def forget_old_kernels() -> None:
    """Let oneDNN, and torch before it, keep so few compiled kernels; call it before a model's first forward.

    Each pack's length brings kernels of its own, and both keep 1,024, with scratch space: 8 MB a step of
    8 samples of SmolLM2-135M; 1,600 shapes of products took 616 MB (torch 2.13). It costs no time.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))


def keep_freed_memory() -> None:
    """Give back what loading freed; from then on keep what is freed for the next that asks."""
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # a ZeRO-3 rank of two held nearly a whole model's bytes in freed pieces
    libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text or "std::bad_alloc" in text
    )
