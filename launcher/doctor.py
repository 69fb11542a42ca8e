"""`sftcore doctor`: what this machine and environment can and can't run, and the remedy.

In: this environment; the folder that runs go to. Out: findings, one a line: ok, missing or broken.
Invariant: a check tries the thing (imports it, calls it, renames a file) and never only looks a name up; one
that crashes is a finding, not the end.
Trade-off: what may crash runs in a process of its own (2 to 6 s each for torch and DeepSpeed), so a doctor's
visit takes about half a minute.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from sftcore.amounts import size
from sftcore.errors import SftError
from sftcore.fsio import folder_lock

OK, MISSING, BROKEN = "ok", "missing", "broken"
PROBE_SECONDS = 180
MIN_DISK_BYTES, MIN_SHM_BYTES = 10 * 10**9, 10**9
NUM_RENAMES = 200
ALL_REDUCE_BYTES = 64 * 2**20
CORE = ("torch", "transformers", "deepspeed", "datasets", "peft", "tokenizers", "safetensors", "pyarrow")
OPTIONAL = {  # package -> (code that uses it, how to get it, what for)
    "flash-attn": ("import flash_attn, flash_attn.flash_attn_interface", "sftcore[gpu]", "attention on GPUs"),
    "liger-kernel": ("import liger_kernel.ops.cross_entropy", "sftcore[gpu]", "fused kernels on GPUs"),
    "bitsandbytes": (
        "import torch, bitsandbytes.functional as f; d = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "w, s = f.quantize_4bit(torch.ones(64, 64, device=d), quant_type='nf4')\n"
        "assert f.dequantize_4bit(w, s).shape == (64, 64)",
        "sftcore[quant]",
        "QLoRA",
    ),
    "vllm": ("import vllm", "vllm", "fast probes on GPUs"),
}
OPS = """
import contextlib, io, json, os, torch
if not torch.cuda.is_available(): os.environ.setdefault("DS_ACCELERATOR", "cpu")
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    found = {name: bool(builder.is_compatible(verbose=False)) for name, builder in ALL_OPS.items()}
print(json.dumps(found))
"""
GPUS = """
import json, torch
names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
works = [bool((torch.ones(8, device=f"cuda:{i}") * 2).sum().item() == 16) for i in range(len(names))]
print(json.dumps({"cuda": torch.version.cuda, "nccl": torch.cuda.is_available() and torch.cuda.nccl.version(),
    "gpus": [[p.name, p.total_memory, w] for p, w in zip(names, works)]}))
"""
ALL_REDUCE = """
import sys, time, torch, torch.distributed as dist, torch.multiprocessing as mp
backend, world, size, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def rank_main(rank):
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    x = torch.ones(size // 4, device=device)
    dist.all_reduce(x)
    assert x[0].item() == world
    seconds = []
    for _ in range(5):
        dist.barrier(); started = time.perf_counter()
        dist.all_reduce(x)
        if backend == "nccl": torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if rank == 0: print(size * 2 * (world - 1) / world / min(seconds))
    dist.destroy_process_group()
if __name__ == "__main__": mp.start_processes(rank_main, nprocs=world, start_method="fork")
"""
DTYPES = """
import json
from sftcore.precision import dtype_here, matmul_rate
print(json.dumps([dtype_here(), matmul_rate("bfloat16"), matmul_rate("float32")]))
"""
LOCK = """
import sys
from pathlib import Path
from sftcore.amounts import size
from sftcore.errors import UserInputError
from sftcore.fsio import folder_lock
try:
    with folder_lock(Path(sys.argv[1]), purpose="a check"): print("free")
except UserInputError: print("in use")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found.

    Args:
        state: ok | missing | broken.
        found: version, size, or the reason.
        remedy: empty where nothing is to be done.
        needed: whether sftcore can't do without.
    """

    name: str
    state: str
    found: str
    remedy: str = ""
    needed: bool = False


def examine(folder: Path) -> Iterable[Finding]:
    """All findings, in order; `folder` is where runs go."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        check_python,
        check_core,
        check_gpus,
        check_dtype,
        check_ops,
        check_optional,
        check_compiler,
        check_slurm,
        lambda: check_disk(folder),
        lambda: [check_renames(folder)],
    )
    for check in checks:
        yield from check()


def check_python() -> Iterable[Finding]:
    """The interpreter."""
    fine = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} at {sys.executable}"
    yield Finding(
        name="python",
        state=OK if fine else BROKEN,
        found=found,
        remedy="" if fine else "make the environment with Python 3.11 or newer",
        needed=True,
    )


def check_core() -> Iterable[Finding]:
    """Packages that sftcore can't do without, imported together."""
    for name in CORE:
        version = _version(name)
        remedy = "" if version else f"pip install {name}"
        yield Finding(
            name=name, state=OK if version else MISSING, found=version or "", remedy=remedy, needed=True
        )
    failure, _ = probe(f"import {', '.join(CORE)}")
    if failure:
        yield Finding(
            name="imports", state=BROKEN, found=failure, remedy="make a new environment", needed=True
        )


def check_gpus() -> Iterable[Finding]:
    """CUDA, each GPU by a small computation, and an all-reduce over ranks (NCCL, or gloo without GPUs)."""
    failure, said = probe(GPUS)
    if failure:
        yield Finding(name="cuda", state=BROKEN, found=failure, remedy="fix torch or the driver (nvidia-smi)")
        return
    found = json.loads(said)
    if found["cuda"] is None:
        remedy = "for GPUs: install the torch build for CUDA (https://pytorch.org/get-started)"
        yield Finding(name="cuda", state=MISSING, found="torch is built for CPUs", remedy=remedy)
    elif not found["gpus"]:
        remedy = "ask for a GPU (Slurm: --gpus-per-node), or see nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield Finding(
            name="cuda", state=MISSING, found=f"CUDA {found['cuda']}, no GPU in sight", remedy=remedy
        )
    else:
        yield Finding(name="cuda", state=OK, found=f"CUDA {found['cuda']}, NCCL {found['nccl']}")
    for number, (name, num_bytes, works) in enumerate(found["gpus"]):
        text = f"{name}, {size(num_bytes)}"
        remedy = "" if works else "reset it, or leave it out of CUDA_VISIBLE_DEVICES"
        yield Finding(name=f"gpu {number}", state=OK if works else BROKEN, found=text, remedy=remedy)
    yield (
        check_all_reduce("nccl", len(found["gpus"]))
        if len(found["gpus"]) > 1
        else check_all_reduce("gloo", 2)
    )


def check_dtype() -> Iterable[Finding]:
    """What model.dtype: auto means here, and the CPU's rates in both dtypes (one thread, as all probes)."""
    failure, said = probe(DTYPES)
    if failure:
        yield Finding(name="dtype", state=BROKEN, found=failure, remedy="pip install --force-reinstall torch")
        return
    dtype, *rates = json.loads(said)
    bfloat16, float32 = (f"{rate / 1e9:,.0f}" for rate in rates)
    found = f"auto is {dtype}; this CPU: bfloat16 {bfloat16}, float32 {float32} GFLOP/s a thread"
    yield Finding(name="dtype", state=OK, found=found)


def check_all_reduce(backend: str, world: int) -> Finding:
    """64 MiB summed over `world` processes; bus bandwidth = size * 2 (n - 1) / n / seconds (nccl-tests)."""
    name = f"all-reduce ({backend}, {world} ranks)"
    failure, said = probe(
        ALL_REDUCE, backend, str(world), str(ALL_REDUCE_BYTES), str(20000 + os.getpid() % 9999)
    )
    if failure:
        remedy = "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and see NCCL_DEBUG=INFO"
        return Finding(name=name, state=BROKEN, found=failure, remedy=remedy)
    return Finding(name=name, state=OK, found=f"{float(said) / 1e9:.1f} GB/s bus bandwidth")


def check_ops() -> Iterable[Finding]:
    """DeepSpeed's operations: which can be built here."""
    failure, said = probe(OPS)
    if failure:
        yield Finding(name="deepspeed ops", state=BROKEN, found=failure, remedy="pip install deepspeed")
        return
    ops = json.loads(said)
    able = sorted(name for name, can in ops.items() if can)
    rest = sorted(name for name, can in ops.items() if not can)
    yield Finding(name="deepspeed ops", state=OK if able else MISSING, found=", ".join(able) or "none")
    if rest:
        remedy = (
            "for offload to NVMe: libaio-dev; for the others: a GPU and nvcc" if "async_io" in rest else ""
        )
        yield Finding(name="deepspeed ops", state=MISSING, found=", ".join(rest), remedy=remedy)


def check_optional() -> Iterable[Finding]:
    """Packages that some recipes want, each by using it."""
    for name, (code, extra, purpose) in OPTIONAL.items():
        version = _version(name)
        if not version:
            remedy = f"pip install '{extra}' ({purpose})"
            yield Finding(name=name, state=MISSING, found="", remedy=remedy)
            continue
        failure, _ = probe(code)
        remedy = f"{version} doesn't work here: pip install --force-reinstall '{extra}'" if failure else ""
        yield Finding(name=name, state=BROKEN if failure else OK, found=failure or version, remedy=remedy)


def check_compiler() -> Iterable[Finding]:
    """A C++ compiler, with which DeepSpeed builds its operations at first use."""
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    if path is None:
        remedy = "install a C++ compiler (Debian: g++), or load the site's module"
        yield Finding(name="compiler", state=MISSING, found=compiler, remedy=remedy, needed=True)
        return
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    yield Finding(name="compiler", state=OK, found=(said.splitlines() or [path])[0], needed=True)


def check_slurm() -> Iterable[Finding]:
    """Slurm's clients, and whether a controller answers."""
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        yield Finding(
            name="slurm", state=MISSING, found="no sinfo, sbatch", remedy="use a login node for --on slurm"
        )
        return
    command = ["sinfo", "--noheader", "--format", "%P %D nodes %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        failure = done.stderr.strip()
    except subprocess.TimeoutExpired:
        failure = "sinfo: no answer in 30 s"
    if failure:
        remedy = "the controller doesn't answer: see SLURM_CONF and scontrol ping"
        yield Finding(name="slurm", state=BROKEN, found=failure.splitlines()[-1], remedy=remedy)
        return
    yield Finding(name="slurm", state=OK, found="; ".join(done.stdout.split("\n")[:8]).strip("; "))


def check_disk(folder: Path) -> Iterable[Finding]:
    """Free space where runs go, and in /dev/shm, through which ranks and loaders hand tensors."""
    where = next(path for path in (folder, *folder.parents) if path.is_dir())
    places = {
        "disk": (where, MIN_DISK_BYTES, "free space, or --run to another disk; a 7B checkpoint takes 100 GB"),
        "/dev/shm": (Path("/dev/shm"), MIN_SHM_BYTES, "containers: --shm-size=8g (docker), --ipc=host"),
    }
    for name, (path, needed, remedy) in places.items():
        if not path.is_dir():
            yield Finding(name=name, state=MISSING, found=f"no {path}", remedy=remedy)
            continue
        free = shutil.disk_usage(path).free
        few = free < needed
        yield Finding(
            name=name,
            state=BROKEN if few else OK,
            found=f"{size(free)} free in {path}",
            remedy=remedy if few else "",
        )


def check_renames(folder: Path) -> Finding:
    """Files and folders replaced there while another thread reads: each read is whole; and locks lock."""
    place = folder / f".doctor.{uuid.uuid4().hex[:8]}"
    remedy = "checkpoints need atomic renames: put runs on another file system (--run DIR)"
    try:
        place.mkdir(parents=True)
        torn = _rename_under_reading(place)
        locks = _locks(place)
    except OSError as error:
        return Finding(name="run folder", state=BROKEN, found=str(error), remedy=remedy, needed=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if torn:
        return Finding(name="run folder", state=BROKEN, found=torn, remedy=remedy, needed=True)
    if not locks:
        remedy = "no file locks there (Lustre: mount with -o flock): start one process a run at a time"
        return Finding(name="run folder", state=BROKEN, found="flock doesn't lock", remedy=remedy)
    return Finding(
        name="run folder", state=OK, found=f"{NUM_RENAMES} atomic renames, locks, in {folder.resolve()}"
    )


def _rename_under_reading(place: Path) -> str:
    """Replace a file again and again while it is read; the first torn read, or nothing."""
    target, done = place / "file", threading.Event()
    torn: list[str] = []
    contents = [letter * 65536 for letter in "ab"]
    target.write_text(contents[0])

    def read() -> None:
        while not done.is_set() and not torn:
            try:
                if target.read_text() not in contents:
                    torn.append("a reader saw half a file")
            except OSError as error:
                torn.append(f"a reader saw no file: {error}")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(NUM_RENAMES):
        temporary = place / "temporary"
        temporary.write_text(contents[number % 2])
        os.replace(temporary, target)
    done.set()
    reader.join()
    return torn[0] if torn else ""


def _locks(place: Path) -> bool:
    try:
        with folder_lock(place, purpose="a check") as held:
            return held and probe(LOCK, str(place)) == ("", "in use")
    except SftError:
        return False


def probe(code: str, *arguments: str) -> tuple[str, str]:
    """Run Python code in a process of its own: (why it failed, or empty; what it printed)."""
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_SECONDS} s", ""
    if done.returncode == 0:
        return "", done.stdout.strip()
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return (lines[-1][:300] if lines else f"exit code {done.returncode}"), ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def is_able(findings: Iterable[Finding]) -> bool:
    """Whether nothing that sftcore needs is missing or broken."""
    return all(finding.state == OK for finding in findings if finding.needed)


def line_of(finding: Finding) -> str:
    """A finding for a terminal."""
    remedy = f"\n{'':10}do: {finding.remedy}" if finding.remedy else ""
    found = f": {finding.found}" if finding.found else ""
    return f"{finding.state:<9} {finding.name}{found}{remedy}"


def as_json(findings: Iterable[Finding]) -> str:
    """All findings for a program."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False)
