"""Who rents GPUs: how time is billed, and what disks and downloads cost beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# marketplace: hosts set the prices, which move by the hour. subscription: a monthly fee.
Market = Literal["cloud", "marketplace", "subscription"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSpec:
    """One provider's terms.

    Time is billed in whole `billing_increment_seconds`, and never less than
    `minimum_billed_seconds`. The price of a gigabyte (10^9 bytes) of disk in a month of 730 hours,
    and of one that is downloaded, is None where it is not known; 0 means that there is no charge.
    """

    name: str
    display_name: str
    market: Market
    billing_increment_seconds: int
    source: str
    minimum_billed_seconds: int = 0
    disk_usd_per_gb_month: float | None = None
    egress_usd_per_gb: float | None = None


# Skypilot-catalog, the vendors' pricing pages and hub-docs as read in 2026-11; what a page did not
# say is None.
_ROWS = (
    ProviderSpec(
        name="lambda",
        display_name="Lambda",
        market="cloud",
        billing_increment_seconds=60,
        disk_usd_per_gb_month=0.0,  # the instance's own; persistent file systems are extra
        egress_usd_per_gb=0.0,
        source="docs.lambda.ai, billing: by the minute from a healthy launch, no egress fee, "
        "prices without tax (2026-11)",
    ),
    ProviderSpec(
        name="aws",
        display_name="AWS",
        market="cloud",
        billing_increment_seconds=1,
        minimum_billed_seconds=60,
        egress_usd_per_gb=0.09,
        source="aws.amazon.com/ec2/pricing/on-demand (2026-11)",
    ),
    ProviderSpec(
        name="azure",
        display_name="Azure",
        market="cloud",
        billing_increment_seconds=1,
        egress_usd_per_gb=0.0875,
        source="azure.microsoft.com/pricing: virtual machines, bandwidth (2026-11)",
    ),
    ProviderSpec(
        name="gcp",
        display_name="Google Cloud",
        market="cloud",
        billing_increment_seconds=1,
        minimum_billed_seconds=60,
        egress_usd_per_gb=0.12,
        source="cloud.google.com/compute/all-pricing (2026-11)",
    ),
    ProviderSpec(
        name="runpod",
        display_name="RunPod",
        market="cloud",
        billing_increment_seconds=1,
        disk_usd_per_gb_month=0.10,  # while it runs; $0.20 while it is stopped
        egress_usd_per_gb=0.0,
        source="docs.runpod.io, pods/pricing (2026-11)",
    ),
    ProviderSpec(
        name="hf-jobs",
        display_name="Hugging Face Jobs",
        market="cloud",
        billing_increment_seconds=60,
        disk_usd_per_gb_month=0.0,  # the flavor's own; it is gone when the job ends
        source="huggingface/hub-docs, docs/hub/jobs-pricing.md @0b8c07f8",
    ),
    ProviderSpec(
        name="modal",
        display_name="Modal",
        market="cloud",
        billing_increment_seconds=1,
        source="modal.com/pricing via api-evangelist/modal-labs (2026-07-01)",
    ),
    ProviderSpec(
        name="jarvis-labs",
        display_name="JarvisLabs",
        market="cloud",
        billing_increment_seconds=60,
        source="jarvislabs.ai/pricing via api-evangelist/jarvislabs (2026-06-21)",
    ),
    ProviderSpec(
        name="novita",
        display_name="Novita",
        market="cloud",
        billing_increment_seconds=1,
        source="novitalabs/novita-skills, gpu-guide.md (read 2026-11)",
    ),
    ProviderSpec(
        name="verda",
        display_name="Verda",
        market="cloud",
        billing_increment_seconds=1,
        source="datacrunch.io/pricing via api-evangelist/datacrunch (2026-06-21)",
    ),
    ProviderSpec(
        name="salad",
        display_name="Salad",
        market="marketplace",
        billing_increment_seconds=3600,
        source="increment not found: by the hour, the longest that is in use",
    ),
    ProviderSpec(
        name="vast-ai",
        display_name="Vast.ai",
        market="marketplace",
        billing_increment_seconds=1,
        source="docs.vast.ai, pricing: by the second; disk and traffic at each host's own price",
    ),
    ProviderSpec(
        name="colab-pro-plus",
        display_name="Colab Pro+",
        market="subscription",
        billing_increment_seconds=1,  # of use; what is paid is the month, see catalog/prices.py
        disk_usd_per_gb_month=0.0,
        egress_usd_per_gb=0.0,
        source="colab.research.google.com/signup",
    ),
)

PROVIDERS: Mapping[str, ProviderSpec] = MappingProxyType({row.name: row for row in _ROWS})
