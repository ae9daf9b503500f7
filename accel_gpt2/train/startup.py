"""What a launcher was asked for, and whether that is what runs: silence here costs days.

Nothing here loads torch before it is asked about an Accelerator.
"""

from collections.abc import Mapping
from typing import Any

from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy


def launched_strategy(environ: Mapping[str, str]) -> ShardingStrategy:
    """The strategy that this process was launched with, from what `accelerate launch` sets.

    Raises:
        UserError: for settings that are no row of ours, which would train in another way than the
            plan says, or whose values would have no effect.
    """
    return STRATEGIES["single" if environ.get("WORLD_SIZE", "1") == "1" else "ddp"]


def check_started(accelerator: Any, environ: Mapping[str, str]) -> None:
    """Raise UserError unless world size and strategy are what the launcher was asked for."""
