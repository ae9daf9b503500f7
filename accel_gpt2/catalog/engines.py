"""Through what a provider's machines are started, and what they are called there."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

EngineName = Literal["skypilot", "hf-jobs", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSpec:
    """How one provider's machines are started by an engine.

    `gpus` maps catalog GPUs to the engine's names. `has_buckets` says whether a bucket can be
    mounted on the machine; checkpoints in it outlive the machine, so that spot machines can be
    recovered. `tier` is the price tier that the engine rents. `boot_seconds` are billed before any
    script of ours runs.
    """

    provider: str
    engine: EngineName
    gpus: Mapping[str, str]
    has_buckets: bool
    store: str | None = None  # SkyPilot's name of the provider's own buckets
    tier: str = "on-demand"
    boot_seconds: int = 180


# A managed (spot) job is watched by a small machine: 4 cores, 16 GB and a disk of 50 GB, which are
# $0.19 to 0.20 an hour at AWS, Google and Azure (sky/jobs/constants.py; list prices of m6i.xlarge,
# n2-standard-4 and D4s_v5). It is stopped when it was idle for ten minutes.
SPOT_CONTROLLER_USD_PER_HOUR = 0.20
SPOT_CONTROLLER_IDLE_SECONDS = 600

# SkyPilot 0.14.1's names: sky/catalog/data_fetchers, and for RunPod sky/provision/runpod/utils.py.
_SKY_GPUS = MappingProxyType(
    {
        "a100-40": "A100",
        "a100-80": "A100-80GB",
        "a100-80-pcie": "A100-80GB",
        "h100-80": "H100",
        "h100-80-pcie": "H100",
        "h200": "H200",
        "l4": "L4",
        "t4": "T4",
        "a10g": "A10G",
        "v100": "V100",
    }
)
# SkyPilot calls both of Lambda's H100 "H100", and takes the cheaper one. It could be told the
# machine instead, but then it heeds no `max_hourly_cost` (seen in dry runs).
_LAMBDA_GPUS = MappingProxyType({k: v for k, v in _SKY_GPUS.items() if k != "h100-80"})
_RUNPOD_GPUS = MappingProxyType(
    {
        "a100-80": "A100-80GB-SXM",
        "a100-80-pcie": "A100-80GB",
        "h100-80": "H100-SXM",
        "h100-80-pcie": "H100",
        "h200": "H200-SXM",
        "rtx4090": "RTX4090",
    }
)
# huggingface_hub's SpaceHardware and JobHardware, the one-GPU flavors.
_HF_FLAVORS = MappingProxyType(
    {"t4": "t4-small", "l4": "l4x1", "a10g": "a10g-small", "a100-80": "a100-large", "h200": "h200"}
)

_ROWS = (
    # Lambda machines cannot be stopped, only terminated; SkyPilot has no storage there.
    CloudSpec(provider="lambda", engine="skypilot", gpus=_LAMBDA_GPUS, has_buckets=False),
    CloudSpec(provider="aws", engine="skypilot", gpus=_SKY_GPUS, has_buckets=True, store="s3"),
    CloudSpec(provider="gcp", engine="skypilot", gpus=_SKY_GPUS, has_buckets=True, store="gcs"),
    CloudSpec(provider="azure", engine="skypilot", gpus=_SKY_GPUS, has_buckets=True, store="azure"),
    CloudSpec(
        provider="runpod",
        engine="skypilot",
        gpus=_RUNPOD_GPUS,
        has_buckets=False,
        tier="secure",  # SkyPilot rents no others
    ),
    CloudSpec(
        provider="hf-jobs",
        engine="hf-jobs",
        gpus=_HF_FLAVORS,
        has_buckets=True,
        boot_seconds=0,  # billed from when the container runs
    ),
    # This machine: the same scripts, in a fresh directory.
    CloudSpec(
        provider="local",
        engine="local",
        gpus=MappingProxyType({}),
        has_buckets=True,  # any directory
        boot_seconds=0,
    ),
)

CLOUDS: Mapping[str, CloudSpec] = MappingProxyType({row.provider: row for row in _ROWS})
