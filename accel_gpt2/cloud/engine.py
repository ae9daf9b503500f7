"""What every engine can do, and what all of them share: the price of a wish, files, an upload."""

import dataclasses
import datetime
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from accel_gpt2.catalog.engines import (
    CLOUDS,
    SPOT_CONTROLLER_IDLE_SECONDS,
    SPOT_CONTROLLER_USD_PER_HOUR,
    CloudSpec,
)
from accel_gpt2.catalog.prices import GpuPrice, gpu_variants
from accel_gpt2.cloud.keep import copy_run
from accel_gpt2.cloud.ledger import Launch, launch_directory
from accel_gpt2.cloud.prices import current_prices
from accel_gpt2.errors import UsageError, nearest
from accel_gpt2.plan.cost import SETUP_SECONDS, CostQuote, Rental, quote
from accel_gpt2.render.cloud import is_offered
from accel_gpt2.render.cloud_job import CloudJob

# gone: nothing of it is there any more, however it ended.
Standing = Literal["starting", "running", "succeeded", "failed", "cancelled", "gone"]

# results: everything but checkpoints.
What = Literal["results", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A machine and how long it is to train; `usd_per_hour` is None for the list's price.

    `kept_seconds` is how long it is billed after the training.
    """

    cloud: CloudSpec
    gpu: str
    num_gpus: int
    run_seconds: int
    spot: bool
    usd_per_hour: float | None
    kept_seconds: int

    @property
    def rental(self) -> Rental:
        """What is paid for: set-up with booting, and until an idle machine is gone."""
        around = SETUP_SECONDS + self.kept_seconds
        return Rental(run_seconds=self.run_seconds, num_gpus=self.num_gpus, setup_seconds=around)


class Engine(Protocol):
    """Starts trainings on the machines of some providers, by a program that others wrote."""

    def quote(self, wish: Wish) -> CostQuote:
        """What a wish costs today.

        Raises:
            UserError: when it cannot be had.
        """

    def render(self, job: CloudJob) -> dict[str, str]:
        """The files of a launch by their names, and `command.txt` with what is typed."""

    def check(self) -> None:
        """See that what starts machines is here, before a launch is on record.

        Raises:
            UserError: with what to type.
        """

    def submit(self, job: CloudJob, launch: Launch) -> int | None:
        """Start it, stay until it has ended, fetch the results and have the machine taken down.

        Returns the exit code of `accel-gpt2 train` there, None where it did not come to train.

        Raises:
            UserError: when it did not start, or how it ended is not known.
        """

    def status(self, launch: Launch) -> Standing:
        """Where it is.

        Raises:
            UserError: when nobody answers.
        """

    def logs(self, launch: Launch, *, follow: bool) -> None:
        """Print what the training says."""

    def copy(self, launch: Launch, what: What) -> None:
        """Copy what there is of the run into the launch's run directory, as much as is missing.

        From where it outlives the machine, or else from the machine. `cloud.fetch` does it safely.

        Raises:
            UserError: when it cannot be had, with what to type.
        """

    def cancel(self, launch: Launch) -> None:
        """End it and its bill, whatever of it is there; nothing may be.

        Raises:
            UserError: when that is not certain.
        """


def find_cloud(provider: str) -> CloudSpec:
    """The provider's row.

    Raises:
        UsageError: when no engine starts machines of it.
    """
    if provider not in CLOUDS:
        raise UsageError(
            f"No engine starts machines of {provider!r}.{nearest(provider, list(CLOUDS))} Known "
            f"are {', '.join(CLOUDS)}."
        )
    return CLOUDS[provider]


def listed_offer(wish: Wish) -> GpuPrice:
    """The price list's offer for a wish, the cheapest of a GPU's variants.

    Raises:
        UsageError: when the engine does not rent it, or only with more GPUs.
    """
    variants = gpu_variants(wish.gpu)
    offers = [
        offer
        for offer in current_prices().offers
        if offer.gpu in variants and is_offered(wish.cloud, offer, spot=wish.spot)
    ]
    fitting = [offer for offer in offers if wish.num_gpus % offer.min_gpus == 0]
    if not fitting:
        raise UsageError(_not_offered(wish, offers))
    exact = [offer for offer in fitting if offer.gpu == wish.gpu]
    offer = min(exact or fitting, key=lambda offer: _price(offer, wish))
    if wish.usd_per_hour is None:
        return offer
    per_gpu = wish.usd_per_hour / wish.num_gpus
    return dataclasses.replace(
        offer,
        usd_per_gpu_hour=per_gpu,
        spot_usd_per_gpu_hour=per_gpu if wish.spot else None,
        as_of=datetime.datetime.now().date(),
        source="--usd-per-hour",
    )


def offered_gpu(wish: Wish) -> str:
    """The variant of the GPU that a provider rents, by which a training is planned.

    Raises:
        UsageError: when the engine does not rent it, or only with more GPUs.
    """
    return wish.gpu if wish.cloud.engine == "local" else listed_offer(wish).gpu


def _price(offer: GpuPrice, wish: Wish) -> float:
    price = offer.spot_usd_per_gpu_hour if wish.spot else offer.usd_per_gpu_hour
    assert price is not None, "is_offered has looked"
    return price


def _not_offered(wish: Wish, larger: Sequence[GpuPrice]) -> str:
    provider, spot = wish.cloud.provider, " as spot" if wish.spot else ""
    if larger:
        least = min(offer.min_gpus for offer in larger)
        return (
            f"{provider} sells {wish.gpu}{spot} only {least} at a time: give --num-gpus {least}, "
            f"or look for others with `accel-gpt2 cost --gpu {wish.gpu} --hours 1`."
        )
    offered = sorted(
        {x.gpu for x in current_prices().offers if is_offered(wish.cloud, x, spot=wish.spot)}
    )
    known = f" It has {', '.join(offered)}." if offered else ""
    return (
        f"There is no price for {wish.gpu} of {provider}{spot}.{known} `accel-gpt2 cost --gpu "
        f"{wish.gpu} --hours 1` lists who has it."
    )


def quote_offer(offer: GpuPrice, wish: Wish) -> CostQuote:
    """What an offer costs for a wish, with everything that is billed around the training."""
    pricing: Literal["on-demand", "spot"] = "spot" if wish.spot else "on-demand"
    made = quote(offer, wish.rental, today=datetime.datetime.now().date(), pricing=pricing)
    assert made is not None, "is_offered has looked"
    return _with_controller(made) if wish.spot else made


def _with_controller(quote: CostQuote) -> CostQuote:
    """With the machine that watches the one that may be taken away, and idles after it."""
    seconds = quote.billed_seconds + SPOT_CONTROLLER_IDLE_SECONDS
    more = SPOT_CONTROLLER_USD_PER_HOUR * seconds / 3600
    return dataclasses.replace(
        quote,
        usd_per_hour=quote.usd_per_hour + SPOT_CONTROLLER_USD_PER_HOUR,
        usd_compute=quote.usd_compute + more,
        usd_total=quote.usd_total + more,
        spot_usd_total=quote.usd_total + more,
    )


# What an installation from sources needs; tests, docs and runs stay here.
_SOURCES = (
    "accel_gpt2", "launch", "accelerate_configs", "ds_configs",
    "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE",
)  # fmt: skip
_NOT_SOURCES = shutil.ignore_patterns("__pycache__", ".*_cache", "*.pyc")


def find_sources() -> Path | None:
    """The checkout that this program runs from, or None for an installed package."""
    import accel_gpt2

    root = Path(accel_gpt2.__file__).parents[1]
    return root if all((root / name).exists() for name in _SOURCES) else None


def upload_directory(name: str) -> Path:
    """What goes to the machine of a launch."""
    return launch_directory(name) / "upload"


def fill_upload(
    upload: Path, *, sources: Path | None, files: Mapping[str, Path], run_directory: Path | None
) -> None:
    """Gather what a machine needs: the package's sources, local data and models, a run to go on.

    Args:
        sources: a checkout, copied to `package/`.
        files: files and folders by their path below `upload`.
        run_directory: copied to `runs/`, where there is something to go on from.
    """
    upload.mkdir(parents=True)
    if sources is not None:
        for name in _SOURCES:
            _copy(sources / name, upload / "package" / name)
    for name, path in files.items():
        _copy(path, upload / name)
    if run_directory is not None:
        copy_run(run_directory, upload / "runs" / run_directory.name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=_NOT_SOURCES)
    else:
        shutil.copyfile(source, target)
