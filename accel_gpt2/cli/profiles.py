"""`profiles`: the machines that are known by name."""

from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.cli.hardware import describe_profile, detect_hardware, profile_for
from accel_gpt2.cli.options import DebugOption, JsonOption
from accel_gpt2.cli.output import print_json, print_table, say


def profiles(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the machines that --profile knows."""
    here = profile_for(detect_hardware())
    if json:
        print_json(
            {
                "profiles": [_document(profile) for profile in PROFILES.values()],
                "auto": _document(here),
            }
        )
        return
    print_table(
        {
            "profile": "left",
            "GPUs": "left",
            "TFLOP/s each": "right",
            "precision": "left",
        },
        [_row(profile) for profile in PROFILES.values()],
    )
    say(f"--profile auto is, on this machine: {here.name} ({describe_profile(here)}).")


def _row(profile: HardwareProfile) -> list[str]:
    precision = str(profile.recipe_defaults["mixed_precision"])
    peak = None if profile.gpu is None else profile.gpu.peak_flops.get(precision)
    return [
        profile.name,
        describe_profile(profile),
        "" if peak is None else f"{peak / 1e12:.0f}",
        precision,
    ]


def _document(profile: HardwareProfile) -> dict[str, object]:
    gpu = profile.gpu
    return {
        "name": profile.name,
        "gpu": None
        if gpu is None
        else {
            "name": gpu.name,
            "display_name": gpu.display_name,
            "memory_bytes": gpu.memory_bytes,
            "peak_flops": dict(gpu.peak_flops),
            "bandwidth_bytes_per_second": gpu.bandwidth_bytes_per_second,
            "tdp_watts": gpu.tdp_watts,
            "source": gpu.source,
        },
        "num_gpus": profile.num_gpus,
        "interconnect": profile.interconnect,
        "host_memory_bytes": profile.host_memory_bytes,
        "recipe_defaults": dict(profile.recipe_defaults),
    }
