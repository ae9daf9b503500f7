"""The engines by the names that the catalog's rows have."""

from accel_gpt2.catalog.engines import EngineName
from accel_gpt2.cloud.engine import Engine
from accel_gpt2.cloud.hf_jobs import HfJobsEngine
from accel_gpt2.cloud.local import LocalEngine
from accel_gpt2.cloud.skypilot import SkyPilotEngine

_ENGINES: dict[EngineName, type[Engine]] = {
    "skypilot": SkyPilotEngine,
    "hf-jobs": HfJobsEngine,
    "local": LocalEngine,
}


def engine_of(name: EngineName) -> Engine:
    """The engine of this name."""
    return _ENGINES[name]()
