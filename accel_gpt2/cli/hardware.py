"""What this machine has, which profile that is, and whether it is what a profile promises."""

import dataclasses
import glob
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from accel_gpt2.catalog.gpus import GpuSpec, find_gpu
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.errors import DoesNotFitError, UsageError, nearest
from accel_gpt2.units import MIB, format_bytes

NO_GPU = "no GPU was found: running on the CPU"

# Firmware and drivers keep a part of what is sold as "16 GB".
_GPU_MEMORY_TOLERANCE = 0.05
_HOST_MEMORY_TOLERANCE = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedGpu:
    """One visible GPU; `compute_capability` is CUDA's, (0, 0) where it is unknown."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] = (0, 0)

    @property
    def spec(self) -> GpuSpec | None:
        """Its catalog row, or None."""
        return find_gpu(self.name, self.memory_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedHardware:
    """What is here and may be used: `hidden_by` names the variable that hides the GPUs, if any."""

    gpus: tuple[DetectedGpu, ...]
    host_memory_bytes: int
    num_cores: int
    hidden_by: str | None = None


def detect_hardware(environment: Mapping[str, str] = os.environ) -> DetectedHardware:
    """Look at the machine: GPUs (as far as CUDA_VISIBLE_DEVICES shows them), memory and cores.

    `nvidia-smi` is asked, because importing torch takes seconds; torch is asked only where a GPU's
    device file exists and `nvidia-smi` does not answer.
    """
    import psutil

    gpus = _gpus_by_nvidia_smi(environment)
    if gpus is None:
        gpus = _gpus_by_torch() if glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/dxg") else ()
        found = len(gpus)
    else:
        found = len(gpus)
        gpus = _visible(gpus, environment.get("CUDA_VISIBLE_DEVICES"))
    hidden_by = "CUDA_VISIBLE_DEVICES" if found and not gpus else None
    if gpus and environment.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        gpus, hidden_by = (), "ACCELERATE_USE_CPU"
    return DetectedHardware(
        gpus=tuple(gpu for _, gpu in gpus),
        host_memory_bytes=int(min(psutil.virtual_memory().total, _container_memory_bytes())),
        num_cores=_num_cores(),
        hidden_by=hidden_by,
    )


# Each GPU with its UUID, in the order of nvidia-smi.
_Gpus = tuple[tuple[str, DetectedGpu], ...]


def _gpus_by_nvidia_smi(environment: Mapping[str, str]) -> _Gpus | None:
    query = "--query-gpu=uuid,name,memory.total,compute_cap"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,  # the driver can take seconds to wake where persistence mode is off
            check=True,
            env=dict(environment),
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_nvidia_smi(answer)


def parse_nvidia_smi(answer: str) -> _Gpus:
    """Read `uuid, name, memory in MiB, compute capability`, one GPU a line.

    >>> parse_nvidia_smi("GPU-1a, Tesla T4, 15360, 7.5")[0][1].compute_capability
    (7, 5)
    """
    gpus = []
    for line in answer.splitlines():
        match = re.fullmatch(r"(\S+), (.+), (\d+), ([\d.]+|\[?N/A\]?)", line.strip())
        if match is None:
            continue
        uuid, name, mebibytes, capability = match.groups()
        major, _, minor = capability.partition(".")
        gpu = DetectedGpu(
            name=name,
            memory_bytes=int(mebibytes) * MIB,
            compute_capability=(int(major), int(minor or 0)) if major.isdigit() else (0, 0),
        )
        gpus.append((uuid, gpu))
    return tuple(gpus)


def _visible(gpus: _Gpus, visible_devices: str | None) -> _Gpus:
    """What CUDA_VISIBLE_DEVICES leaves: indices or UUID prefixes, up to the first bad one."""
    if visible_devices is None:
        return gpus
    chosen = []
    for entry in (part.strip() for part in visible_devices.split(",")):
        if entry.isdigit() and int(entry) < len(gpus):
            chosen.append(gpus[int(entry)])
        elif entry.startswith("GPU-") and any(uuid.startswith(entry) for uuid, _ in gpus):
            chosen.append(next(gpu for gpu in gpus if gpu[0].startswith(entry)))
        else:
            break
    return tuple(chosen)


def _gpus_by_torch() -> _Gpus:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gpu = DetectedGpu(
            name=device.name,
            memory_bytes=device.total_memory,
            compute_capability=(device.major, device.minor),
        )
        gpus.append((str(index), gpu))
    return tuple(gpus)


def _container_memory_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """What a container may use (cgroup version 2), which its kernel enforces by killing."""
    try:
        return float(limit.read_text(encoding="ascii").replace("max", "inf"))
    except (OSError, ValueError):
        return float("inf")


def _num_cores() -> int:
    # The cores that this process may use, which in a container are fewer than the machine's.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def profile_for(detected: DetectedHardware) -> HardwareProfile:
    """The profile of what is here: a row where one matches, otherwise one named `auto`.

    Of different GPUs in one machine the smallest speaks for all, because data-parallel training
    waits for it.
    """
    if not detected.gpus:
        return PROFILES["cpu"]
    smallest = min(detected.gpus, key=lambda gpu: gpu.memory_bytes)
    spec = smallest.spec
    for profile in PROFILES.values():
        if spec is not None and profile.gpu is spec and profile.num_gpus == len(detected.gpus):
            return profile
    return HardwareProfile(
        name="auto",
        gpu=_unknown_gpu(smallest) if spec is None else spec,
        num_gpus=len(detected.gpus),
        interconnect="pcie" if len(detected.gpus) > 1 else "none",
        host_memory_bytes=detected.host_memory_bytes,
        recipe_defaults=MappingProxyType({"mixed_precision": _mixed_precision(smallest)}),
    )


def _unknown_gpu(gpu: DetectedGpu) -> GpuSpec:
    return GpuSpec(
        name="unknown",
        display_name=gpu.name,
        match=(gpu.name,),
        memory_bytes=gpu.memory_bytes,
        peak_flops=MappingProxyType({}),
        bandwidth_bytes_per_second=None,
        tdp_watts=None,
        source="detected on this machine; no catalog row",
    )


def _mixed_precision(gpu: DetectedGpu) -> str:
    # bf16 tensor cores came with Ampere (8.0), fp16 ones with Volta (7.0).
    if gpu.compute_capability >= (8, 0):
        return "bf16"
    return "fp16" if gpu.compute_capability >= (7, 0) else "no"


def choose_profile(name: str, detected: DetectedHardware) -> HardwareProfile:
    """The profile that a run uses on this machine: the named one, the detected one, or `cpu`.

    Without a GPU every profile falls back to the CPU; `check_profile` says so.

    Raises:
        UsageError: when no profile has this name.
        DoesNotFitError: when the machine has fewer or smaller GPUs than the profile promises.
    """
    if name != "auto" and name not in PROFILES:
        known = ["auto", *PROFILES]
        raise UsageError(
            f"There is no profile {name!r}.{nearest(name, known)} Known are {', '.join(known)}; "
            "`accel-gpt2 profiles` describes them."
        )
    if name == "auto" or not detected.gpus:
        return profile_for(detected)
    profile = PROFILES[name]
    if profile.gpu is not None:
        _require(profile, profile.gpu, detected)
    return profile


def planned_profile(name: str, detect: Callable[[], DetectedHardware]) -> HardwareProfile:
    """The machine that a plan is made for: a named one need not be here, and none is looked for.

    Raises:
        UsageError: when no profile has this name.
    """
    if name in PROFILES and PROFILES[name].gpu is not None:
        return PROFILES[name]
    detected = detect()
    return profile_here(choose_profile(name, detected), detected)


def profile_here(profile: HardwareProfile, detected: DetectedHardware) -> HardwareProfile:
    """A profile with the host memory and the threads that this machine really has."""
    return dataclasses.replace(
        profile,
        host_memory_bytes=detected.host_memory_bytes,
        num_threads=threads_per_process(detected.num_cores),
    )


def threads_per_process(
    num_cores: int, num_processes: int = 1, environment: Mapping[str, str] = os.environ
) -> int:
    """What each process computes with on the CPU: OMP_NUM_THREADS, or its share of the cores."""
    asked = environment.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return max(1, num_cores // num_processes)


def _require(profile: HardwareProfile, gpu: GpuSpec, detected: DetectedHardware) -> None:
    problems = []
    if len(detected.gpus) < profile.num_gpus:
        problems.append(f"{profile.num_gpus} GPUs, and {len(detected.gpus)} can be used here")
    used = detected.gpus[: profile.num_gpus]
    smallest = min(used, key=lambda gpu: gpu.memory_bytes)
    if smallest.memory_bytes < gpu.memory_bytes * (1 - _GPU_MEMORY_TOLERANCE):
        problems.append(
            f"{format_bytes(gpu.memory_bytes)} of GPU memory ({gpu.display_name}), and the "
            f"{smallest.name} here has {format_bytes(smallest.memory_bytes)}"
        )
    if problems:
        raise DoesNotFitError(
            f"Profile {profile.name} promises {'; it promises '.join(problems)}. Give "
            f"--profile {profile_for(detected).name}."
        )


def check_profile(
    name: str, profile: HardwareProfile, detected: DetectedHardware, mixed_precision: str
) -> list[str]:
    """What the person should know before anything is loaded, one sentence each.

    `name` is the profile that was asked for, `profile` the one that is used.

    Raises:
        DoesNotFitError: for fp16 without a GPU, which torch cannot train.
    """
    warnings = []
    if not detected.gpus and name not in {"auto", "cpu"}:
        why = f" ({detected.hidden_by} hides the GPUs)" if detected.hidden_by else ""
        warnings.append(
            f"Profile {name} has {describe_profile(PROFILES[name])}, but {NO_GPU}{why}."
        )
    elif not detected.gpus and name == "auto":
        why = f" ({detected.hidden_by} hides the GPUs)" if detected.hidden_by else ""
        warnings.append(f"{NO_GPU[0].upper()}{NO_GPU[1:]}{why}.")
    if profile.name == name and (
        detected.host_memory_bytes < profile.host_memory_bytes * (1 - _HOST_MEMORY_TOLERANCE)
    ):
        warnings.append(
            f"Profile {name} counts on {format_bytes(profile.host_memory_bytes)} of host memory, "
            f"and this machine has {format_bytes(detected.host_memory_bytes)}."
        )
    if 0 < profile.num_gpus < len(detected.gpus):
        warnings.append(
            f"{len(detected.gpus)} GPUs can be used here, and profile {profile.name} uses "
            f"{profile.num_gpus}."
        )
    warnings += _precision_warnings(profile, mixed_precision)
    return warnings


def _precision_warnings(profile: HardwareProfile, mixed_precision: str) -> list[str]:
    computes_in_bf16 = mixed_precision in {"bf16", "pure_bf16"}
    if profile.gpu is None:
        if mixed_precision == "fp16":
            raise DoesNotFitError(
                "mixed_precision = 'fp16' needs a GPU, and this runs on the CPU: give "
                "--mixed-precision no."
            )
        slow = computes_in_bf16
        where = "most CPUs compute bf16 far more slowly than fp32"
    else:
        peaks = profile.gpu.peak_flops
        slow = computes_in_bf16 and bool(peaks) and "bf16" not in peaks
        where = f"{profile.gpu.display_name} only emulates bf16; fp16 is its fast precision"
    return [f"mixed_precision is {mixed_precision}: {where}."] if slow else []


def describe_profile(profile: HardwareProfile) -> str:
    """The hardware in a few words.

    >>> describe_profile(PROFILES["2x-rtx4070ti"])
    '2 x RTX 4070 Ti SUPER 16 GB'
    """
    if profile.gpu is None:
        return "no GPU"
    count = f"{profile.num_gpus} x " if profile.num_gpus > 1 else ""
    return f"{count}{profile.gpu.display_name}"
