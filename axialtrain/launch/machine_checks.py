"""What `axialtrain doctor` looks at on each machine: packages, devices, limits, the environment."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from axialtrain.launch.findings import Found

PACKAGES = ("axialtrain", "torch", "deepspeed", "fairscale", "hydra-core", "fsspec", "safetensors")
# Bytes that must be free in /dev/shm. Without GPUs only the semaphores of local processes are
# there; NCCL keeps the buffers between the GPUs of a host there, which Docker's 64 MB do not hold.
LEAST_SHARED = 16 * 2**20
LEAST_SHARED_GPU = 2**30
# A group connects each of its ranks with each other, and there are one a mesh axis, three of
# several axes and DeepSpeed's: up to 16 sockets for each rank, beside shards and libraries.
LEAST_FILES, FILES_OF_A_RANK = 512, 16
LEAST_THREADS = 1024  # of this user: torch, gloo and the loaders start some dozens a rank
_SLOW = {
    "NCCL_P2P_DISABLE": "GPUs of a host then talk through its memory",
    "NCCL_SHM_DISABLE": "GPUs of a host then talk through its network",
    "NCCL_IB_DISABLE": "hosts then talk over TCP, not InfiniBand",
}


def versions() -> dict[str, str]:
    """What must be the same on every rank, by name."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check_versions(found: Found) -> None:
    """Those that are installed against those that the package asks for."""
    there = versions()
    found.fact(", ".join(f"{name} {version}" for name, version in there.items()))
    if there["axialtrain"] == "missing":  # a checkout on the path, which asks for nothing
        for name in ("deepspeed", "fairscale"):
            if there[name] == "missing":
                found.trouble(
                    f"{name} is not installed",
                    "install axialtrain into this environment (launch/install.sh, or pip)",
                )
        return
    for text in metadata.requires("axialtrain") or ():
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(asked.name)
        except metadata.PackageNotFoundError:
            found.trouble(f"{asked.name} is not installed", f"pip install '{asked}'")
            continue
        if not asked.specifier.contains(version, prereleases=True):
            found.trouble(
                f"{asked.name} is {version}, axialtrain needs {asked.specifier}",
                f"pip install --constraint constraints.txt '{asked.name}{asked.specifier}'",
            )


def check_devices(found: Found, *, wanted: str = "auto", processes: int = 1) -> None:
    """Cores, memory and GPUs. wanted: launcher.device; processes: ranks of this host."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    found.fact(f"{cores} cores, {_size(memory)} of memory, OMP_NUM_THREADS {threads}")
    if threads.isdigit() and int(threads) * processes > cores and int(threads) > 1:
        found.trouble(
            f"OMP_NUM_THREADS={threads} for {processes} ranks on {cores} cores",
            f"set OMP_NUM_THREADS={max(1, cores // processes)}, or leave it out and set "
            "launcher.threads",
        )
    count = torch.cuda.device_count()
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        found.fact(f"cuda:{index} {device.name}, {_size(device.total_memory)}")
    if count == 0:
        found.fact("no GPU that torch sees")
    if wanted == "cuda" and count < processes:
        found.trouble(
            f"launcher.device=cuda for {processes} ranks, and {count} GPUs are here",
            "start fewer ranks on this host, or take launcher.device=cpu",
        )
    if count:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        if visible and wanted != "cuda":  # the deepspeed launcher sets it on any host
            found.fact(f"CUDA_VISIBLE_DEVICES={visible}, which changes nothing without a GPU")
        elif visible:
            found.trouble(
                f"CUDA_VISIBLE_DEVICES={visible}, and this host has no GPU",
                "unset CUDA_VISIBLE_DEVICES, or start the container with its GPUs (--gpus all)",
            )
    elif torch.version.cuda is None:
        found.trouble(
            f"this host has NVIDIA GPUs, and torch {torch.__version__} was built without CUDA",
            "install the CUDA build of the same torch version",
        )
    elif visible is not None:
        found.trouble(
            f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs of this host",
            "unset CUDA_VISIBLE_DEVICES, or name GPUs that nvidia-smi lists",
        )
    else:
        found.trouble(
            "this host has NVIDIA GPUs, and torch sees none",
            "run nvidia-smi: the driver must be at least as new as the CUDA of torch",
        )


def check_limits(found: Found, *, world: int = 1, shared: Path = Path("/dev/shm")) -> None:
    """File handles, processes, locked memory, shared memory. world: ranks of the run."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = LEAST_FILES + FILES_OF_A_RANK * world
    found.fact(f"file handles {_limit(files)}, at most {_limit(most)}")
    if files != resource.RLIM_INFINITY and files < needed:
        how = f"ulimit -n {max(needed, 4096)}"
        if most != resource.RLIM_INFINITY and most < needed:
            how = "raise the hard limit (limits.conf, systemd's LimitNOFILE, docker --ulimit)"
        found.trouble(
            f"a process may have {files} files and sockets open, {_ranks(world)} may take {needed}",
            f"{how} before the ranks start",
        )
    threads, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    found.fact(f"processes and threads {_limit(threads)}")
    if threads != resource.RLIM_INFINITY and threads < LEAST_THREADS and os.geteuid() != 0:
        found.trouble(
            f"this user may have {threads} threads, ranks may take {LEAST_THREADS}",
            f"ulimit -u {LEAST_THREADS * 4} before the ranks start",
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and os.listdir("/sys/class/infiniband"):
        found.fact(f"locked memory {_limit(locked)}, with InfiniBand or EFA devices")
        if locked != resource.RLIM_INFINITY:
            found.trouble(
                f"InfiniBand needs locked memory, and {locked} bytes are allowed",
                "ulimit -l unlimited before the ranks start (docker --ulimit memlock=-1)",
            )
    try:
        room = os.statvfs(shared)
    except FileNotFoundError:
        found.trouble(f"{shared} is not there", "mount a tmpfs there: processes share memory in it")
        return
    total, free = room.f_frsize * room.f_blocks, room.f_frsize * room.f_bavail
    least = LEAST_SHARED_GPU if torch.cuda.device_count() else LEAST_SHARED
    found.fact(f"{shared} {_size(total)}, {_size(free)} free")
    if free < least:
        found.trouble(
            f"{shared} has {_size(free)} free of {_size(total)}, allowed is from {_size(least)}",
            "start the container with a larger one (docker --shm-size=8g, a Kubernetes emptyDir "
            f"with medium: Memory at {shared}), or remove what fills it",
        )


def check_build_locks(found: Found) -> None:
    """Locks of builds of DeepSpeed's ops that nobody is doing: a run that builds waits on them.

    torch makes the file when a build begins and keeps it open until it removes it: a lock that no
    process has open is left from one that was killed.
    """
    root = build_root()
    locks = sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])
    found.fact(f"builds of DeepSpeed's ops in {root}: {len(locks) or 'no'} locks")
    if not locks:
        return
    held = _open_files()
    for lock in locks:
        try:
            info = lock.stat()
        except FileNotFoundError:
            continue  # its build has just ended
        if (info.st_dev, info.st_ino) in held:
            found.fact(f"{lock.parent.name} is being built now")
            continue
        minutes = max(0.0, time.time() - info.st_mtime) / 60
        found.trouble(
            f"{lock} is the lock of a build that no process here is doing, {minutes:.0f} min old; "
            "a run that needs it waits for ever",
            f"rm {lock} (unless another host is building there now)",
        )


def build_root() -> Path:
    """Where torch builds extensions: below it is a folder for each of its builds, and each op."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions"


def _open_files() -> set[tuple[int, int]]:
    """(device, inode) of what the processes that we may look into have open."""
    held = set()
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            info = handle.stat()
        except OSError:
            continue  # ended meanwhile, or another user's
        held.add((info.st_dev, info.st_ino))
    return held


def check_environment(found: Found, environment: Mapping[str, str] = os.environ) -> None:
    """Variables that launchers and NCCL read, where they are set wrongly."""
    interfaces = [name for _, name in socket.if_nameindex()]
    found.fact(f"network interfaces {', '.join(interfaces)}")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environment.get(name)
        if value is None:
            continue
        found.fact(f"{name}={value}")
        if not _names_interface(name, value, interfaces):
            found.trouble(
                f"{name}={value} names no interface of this host",
                f"allowed are {', '.join(interfaces)}; name the one that joins the hosts, or unset "
                "it",
            )
    for name, effect in _SLOW.items():
        if environment.get(name, "0") not in ("", "0"):
            found.fact(f"{name}={environment[name]}: slow, {effect}")
    if environment.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        found.fact(f"NCCL_DEBUG={environment['NCCL_DEBUG']}: every rank will print pages")
    _check_rendezvous(found, environment)


def _names_interface(variable: str, value: str, interfaces: list[str]) -> bool:
    """gloo takes whole names; NCCL beginnings, `=` before whole names, `^` before what to avoid."""
    asked = [one for one in value.lstrip("^=").split(",") if one]
    if variable == "GLOO_SOCKET_IFNAME" or value.startswith("="):
        return bool(asked) and all(one in interfaces for one in asked)
    if value.startswith("^"):
        return not all(name.startswith(tuple(asked)) for name in interfaces)
    return any(name.startswith(tuple(asked)) for name in interfaces)


def _check_rendezvous(found: Found, environment: Mapping[str, str]) -> None:
    given = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    for name, value in given.items():
        if value is not None and not re.fullmatch(r"[0-9]{1,9}", value):
            found.trouble(f"{name}={value} is no number", "set it as torchrun does, or unset it")
            return
    rank, world = given["RANK"], given["WORLD_SIZE"]
    if rank is not None and world is None:
        found.trouble(
            f"RANK={rank} is set and WORLD_SIZE is not",
            "unset RANK, or start the ranks with torchrun, which sets both",
        )
    address = environment.get("MASTER_ADDR")
    if address is None or world is None:
        return
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        found.trouble(
            f"MASTER_ADDR={address} cannot be resolved ({error})",
            "name a host that every host knows, or give its address",
        )


def _size(count: float) -> str:
    if count < 1e9:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.1f} GB"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _ranks(count: int) -> str:
    return "one rank" if count == 1 else f"each of {count} ranks"
