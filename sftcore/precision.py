"""In which dtype a model is held: bfloat16 where the hardware computes in it, else float32.

In: the recipe's model section, this machine. Out: "bfloat16" or "float32", and torch's dtype of that name.
Invariant: equal machines give equal answers: flags decide, and a timing only where a CPU has no known flags.
Trade-off: CPUs with AVX-512 but without its bfloat16 instructions get float32 although they emulate bfloat16
less slowly than AVX2 does. There a product of (130, 576) by (576, 1536) takes 34.8 ms in bfloat16 and 4.1 ms
in float32 (one thread, November 2026).
"""

from __future__ import annotations

import time
from functools import lru_cache
from statistics import median
from typing import Literal

import torch

from sftcore.config import ModelSettings

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")  # of x86, as torch.cpu.get_capabilities() calls them
X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
PRODUCT, REPEATS, ROUNDS = 1024, 2, 15  # of the measurement: rows and columns, products a round
ENOUGH_SECONDS = 1.0  # of measuring: emulated products take seconds each
Name = Literal["bfloat16", "float32"]


def dtype_of(settings: ModelSettings) -> Name:
    """The dtype that a model section stands for on this machine."""
    return dtype_here() if settings.dtype == "auto" else settings.dtype


def torch_dtype(settings: ModelSettings) -> torch.dtype:
    """As `dtype_of`, as torch's."""
    return DTYPES[dtype_of(settings)]


def dtype_here() -> Name:
    """bfloat16 with a GPU, or on a CPU that has instructions for it; else float32."""
    return "bfloat16" if torch.cuda.is_available() or has_fast_bfloat16() else "float32"


@lru_cache(maxsize=1)
def has_fast_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16, and torch and oneDNN may use that (variables can limit them)."""
    flags = torch.cpu.get_capabilities()
    kind = str(flags.get("architecture", "")).lower()
    if kind in X86:
        return any(flags.get(name) for name in BFLOAT16_FLAGS) and _libraries_use_it()
    if kind in ARM and torch.backends.mkldnn.is_available():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return matmul_rate("bfloat16") > matmul_rate("float32")


def _libraries_use_it() -> bool:
    """Whether torch (ATEN_CPU_CAPABILITY) and oneDNN (ONEDNN_MAX_CPU_ISA) use AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2") and bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def matmul_rate(dtype: Name) -> float:
    """FLOP a second of this machine in a product of (1024, 1024) by (1024, 1024); the median of rounds."""
    a, b = (torch.randn(PRODUCT, PRODUCT, dtype=DTYPES[dtype]) for _ in range(2))
    seconds = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        for _ in range(REPEATS):
            a @ b
        seconds.append(time.perf_counter() - started)
        if len(seconds) > 1 and sum(seconds) > ENOUGH_SECONDS:
            break
    return 2 * PRODUCT**3 * REPEATS / median(seconds[1:])
