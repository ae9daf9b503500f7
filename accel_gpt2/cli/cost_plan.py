"""What a training takes on each GPU that could be rented, by its plan, and on the own machine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.prices import PriceSet, gpu_variants
from accel_gpt2.catalog.profiles import PROFILES, HardwareProfile
from accel_gpt2.cli.hardware import describe_profile, detect_hardware, planned_profile
from accel_gpt2.cli.options import TrainOptions, given_layers
from accel_gpt2.cli.output import warn
from accel_gpt2.errors import DoesNotFitError, UsageError, UserError, nearest
from accel_gpt2.plan.cost import LocalCost, Power, local_cost
from accel_gpt2.units import GIB

if TYPE_CHECKING:
    from accel_gpt2.plan.run_plan import Option
    from accel_gpt2.plan.throughput import SecondsRange
    from accel_gpt2.recipe import Layer

_GB = 10**9
_SYSTEM_BYTES = 30 * _GB  # an image, torch with CUDA and the published weights; generous
DEFAULT_DISK_GB = 50.0
_MOST_HOURS = 100_000.0  # eleven years

# Of a GPU without a profile: the least host memory that the one-GPU offers of these GPUs have.
_HOST_MEMORY_BYTES = 15 * GIB


def rented_gpus(
    options: TrainOptions, gpu: str | None, num_gpus: int | None, prices: PriceSet, *, planned: bool
) -> tuple[tuple[str, ...], int]:
    """The GPUs to rent, each a row of the catalog, and how many of them.

    Raises:
        UsageError: when what was given names no GPU, or two.
    """
    name = next((x.values["profile"] for x in options.layers if "profile" in x.values), None)
    if name is None:
        if gpu is not None:
            return gpu_variants(gpu), num_gpus or 1
        if not planned:
            raise UsageError("--hours of which GPU? Give --gpu, for instance --gpu a100-40.")
        offered = {offer.gpu for offer in prices.prices}
        return tuple(x for x in GPUS if x in offered), num_gpus or 1
    if gpu is not None:
        raise UsageError("--gpu and --profile both name what to rent; give one of them.")
    profile = PROFILES.get(str(name))
    if profile is None or profile.gpu is None:
        known = [x.name for x in PROFILES.values() if x.gpu is not None]
        raise UsageError(
            f"--profile {name} is no machine that can be rented.{nearest(str(name), known)} Give "
            f"one of {', '.join(known)}."
        )
    return gpu_variants(profile.gpu.name), num_gpus or profile.num_gpus


def training_layers(options: TrainOptions, *, planned: bool) -> "list[Layer] | None":
    """What is to be trained; None where the hours are given.

    Raises:
        UsageError: when neither is.
    """
    typed = [x.origin for x in options.layers if "profile" not in x.values]
    typed += [] if options.recipe_file is None else ["--recipe"]
    if planned:
        if not typed:
            raise UsageError(
                "How long does it train? Give --hours, for instance --hours 3, or what to train, "
                "for instance --model gpt2-xl --dataset imdb."
            )
        return given_layers(options)
    if typed:
        warn(f"--hours is given, so nothing is planned and {', '.join(typed)} does not count.")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a training takes on one kind of machine."""

    run_seconds: int
    disk_bytes: int
    download_bytes: int
    recipe: str = ""


def given_need(hours: float | None) -> Need:
    """What was typed.

    Raises:
        UsageError: when it is no time.
    """
    if hours is None or not 0 < hours <= _MOST_HOURS:
        raise UsageError(f"--hours {hours} is no time to rent for: give hours, as in --hours 3.")
    disk = int(DEFAULT_DISK_GB * _GB)
    return Need(run_seconds=max(1, round(hours * 3600)), disk_bytes=disk, download_bytes=0)


def planned_needs(layers: "list[Layer]", gpus: Iterable[str], num_gpus: int) -> dict[str, Need]:
    """What each GPU would need for it.

    GPUs on which it does not fit, or whose speed is not known, are left out.

    Raises:
        DoesNotFitError: when it fits on none.
        UsageError: when its time is not known.
    """
    from accel_gpt2.cli.planning import does_not_fit, plan_here

    needs = {}
    failure = UserError("")
    for gpu in gpus:
        plan = plan_here(layers, rented_profile(gpu, num_gpus), depth="none")
        if plan is None:
            raise UsageError("The shape of this model is not known here: give --gpu and --hours.")
        option, data = plan.recommended, plan.data
        if data is None:
            raise UsageError(
                f"How long it trains is known when {plan.asked.recipe.dataset} has been read: give "
                "--gpu and --hours."
            )
        if option is None:
            failure = DoesNotFitError(does_not_fit(plan))
        elif option.seconds is None:
            how = option.recipe.mixed_precision
            failure = UsageError(f"How fast {gpu} computes {how} is not known: give --hours.")
        else:
            needs[gpu] = _need(option, option.seconds)
    if not needs:
        raise failure
    return needs


def _need(option: "Option", seconds: "SecondsRange") -> Need:
    (final_bytes,) = (term.bytes for term in option.disk if term.name == "final models")
    return Need(
        run_seconds=max(1, math.ceil(seconds.expected)),
        disk_bytes=_SYSTEM_BYTES + option.disk_bytes,
        download_bytes=final_bytes,
        recipe=option.label,
    )


def rented_profile(gpu: str, num_gpus: int) -> HardwareProfile:
    """A row where there is one, otherwise a machine made from the GPU's row."""
    spec = GPUS[gpu]
    same = [x for x in PROFILES.values() if x.gpu is spec]
    for profile in same:
        if profile.num_gpus == num_gpus:
            return profile
    family = PROFILES.get(gpu.removesuffix("-pcie"))
    each = _HOST_MEMORY_BYTES if family is None else family.host_memory_bytes
    interconnect = "nvlink" if "SXM" in spec.display_name else "pcie"
    precision = "bf16" if "bf16" in spec.peak_flops else "fp16"
    return HardwareProfile(
        name=gpu if num_gpus == 1 else f"{num_gpus}x-{gpu}",
        gpu=spec,
        num_gpus=num_gpus,
        interconnect="none" if num_gpus == 1 else interconnect,
        host_memory_bytes=each * num_gpus,
        recipe_defaults=MappingProxyType({"mixed_precision": precision}),
    )


def own_machine(
    layers: "list[Layer]", local: str | None, power: Power
) -> tuple[LocalCost | None, str | None, str | None]:
    """The own machine's cost, how it would train, or why neither is known."""
    from accel_gpt2.cli.planning import plan_here

    profile = planned_profile(local or "auto", detect_hardware)
    name = describe_profile(profile)
    if profile.gpu is None:
        return None, None, "there is no GPU here; --local rtx4070ti compares with a card"
    plan = plan_here(layers, profile, depth="none")
    option = None if plan is None else plan.recommended
    if option is None:
        return None, None, f"it does not fit on the {name}"
    if option.seconds is None:
        return None, None, f"the speed of the {name} is not known; `accel-gpt2 bench` measures it"
    found = local_cost(
        name,
        profile.gpu,
        num_gpus=profile.num_gpus,
        run_seconds=math.ceil(option.seconds.expected),
        power=power,
    )
    return found, option.label, f"the power of the {name} is not known" if found is None else None
