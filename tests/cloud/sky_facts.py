"""Run by SkyPilot's own Python: its small catalogs from JSON, then what it reads in task files.

`python sky_facts.py OFFERS.json TASK...` prints a JSON list with one object for each task.
"""

import csv
import json
import os
import sys
from pathlib import Path

_COLUMNS = [
    "InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "MemoryGiB", "Price",
    "Region", "GpuInfo", "SpotPrice", "AvailabilityZone",
]  # fmt: skip
_PLACES = {
    "lambda": ("us-east-1", ""),
    "aws": ("us-east-1", "us-east-1a"),
    "azure": ("eastus", ""),
    "gcp": ("us-central1", "us-central1-a"),
    "runpod": ("US", "US-GA-1"),
}


def write_catalogs(offers: list[dict[str, object]]) -> None:
    """In place of what SkyPilot would fetch: files that are there are kept."""
    for provider, (region, zone) in _PLACES.items():
        folder = Path(os.path.expanduser("~/.sky/catalogs/v8")) / provider
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "vms.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for offer in offers:
                if offer["provider"] != provider:
                    continue
                gpu, count, price = offer["gpu"], offer["num_gpus"], offer["usd_per_hour"]
                info = {"Name": gpu, "Count": count, "MemoryInfo": {"SizeInMiB": 40960}}
                gpu_info = repr({"Gpus": [info], "TotalGpuMemoryInMiB": 40960})
                rest = [region, gpu_info, "", zone]
                writer.writerow([offer["machine"], gpu, count, 12, 85, price, *rest])


def main() -> None:
    """Print what SkyPilot understands."""
    offers_path, *tasks = sys.argv[1:]
    write_catalogs(json.loads(Path(offers_path).read_text()))
    import sky

    facts = []
    for path in tasks:
        task = sky.Task.from_yaml(path)
        (resources,) = task.resources
        autostop = resources.autostop_config
        facts.append(
            {
                "version": sky.__version__,
                "cloud": str(resources.cloud).lower(),
                "machine": resources.instance_type,
                "gpus": dict(resources.accelerators),
                "down": autostop.down,
                "idle_minutes": autostop.idle_minutes,
                "wait_for": autostop.wait_for.value,
                "spot": resources.use_spot,
                "recovery": resources.job_recovery,
                "mounts": sorted(task.storage_mounts or task.file_mounts or {}),
                "has_scripts": bool(task.setup and task.run),
            }
        )
    sys.stdout.write("FACTS " + json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
