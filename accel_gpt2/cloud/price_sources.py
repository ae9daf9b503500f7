"""Who says today's prices: Lambda, Hugging Face, and gpuhunt for others; each in its own words."""

import dataclasses
import datetime
import importlib.util
import logging
import math
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.prices import FormFactor, GpuPrice, price_problems
from accel_gpt2.catalog.providers import PROVIDERS
from accel_gpt2.errors import UserError

_SOCKET_SECONDS = 20.0

# A source gives today's offers of the catalog's GPUs.
Source = Callable[[datetime.date], tuple[GpuPrice, ...]]


class SourceNotSetUp(UserError):
    """A source that needs a key or a package which is not there."""


def _catalog_gpus() -> dict[tuple[str, int], str]:
    """Model and gigabytes, as sold, to the row's name: of two variants the one that is not PCIe."""
    names = {}
    for gpu in GPUS.values():
        title = re.fullmatch(r"(.+?)(?: (SXM|PCIe))? (\d+) GB", gpu.display_name)
        if title is not None and title[2] != "PCIe":
            names[_plain(title[1]), int(title[3])] = gpu.name
    return names


def _plain(model: str) -> str:
    return re.sub(r"nvidia|tesla|geforce|[^a-z0-9]", "", model.lower())


def find_rented_gpu(
    model: str, memory_gb: float, *, hint: str = ""
) -> tuple[str, FormFactor] | None:
    """The catalog's GPU that a provider means, and whether it is SXM or PCIe; None for others.

    `hint` is any text of the provider's that may say which.

    >>> find_rented_gpu("A100", 40, hint="40 GB SXM4"), find_rented_gpu("NVIDIA H100", 80, hint="")
    (('a100-40', 'sxm'), ('h100-80', 'unknown'))
    >>> find_rented_gpu("H100", 80, hint="gpu_1x_h100_pcie"), find_rented_gpu("GH200", 96)
    (('h100-80-pcie', 'pcie'), None)
    """
    name = _catalog_gpus().get((_plain(model), round(memory_gb)))
    if name is None:
        return None
    text = hint.lower()
    said: FormFactor = "pcie" if "pcie" in text else "sxm" if "sxm" in text else "unknown"
    if f"{name}-pcie" in GPUS:
        return (f"{name}-pcie" if said == "pcie" else name), said
    if "SXM" in GPUS[name].display_name:
        return None if said == "pcie" else (name, "sxm")  # the PCIe V100 has no row
    return name, "pcie"


def _offer(
    *,
    provider: str,
    sku: str,
    model: str,
    memory_gb: float,
    hint: str,
    num_gpus: int,
    tier: str = "on-demand",
    usd_per_hour: float | None,
    spot_usd_per_hour: float | None = None,
    today: datetime.date,
    source: str,
) -> GpuPrice | None:
    """An offer from what a source says of a machine with all its GPUs; None for other GPUs."""
    found = find_rented_gpu(model, memory_gb, hint=hint)
    if found is None:
        return None
    gpu, form_factor = found
    return GpuPrice(
        provider=provider,
        sku=sku,
        gpu=gpu,
        form_factor=form_factor,
        min_gpus=num_gpus,
        tier=tier,
        usd_per_gpu_hour=None if usd_per_hour is None else round(usd_per_hour / num_gpus, 4),
        spot_usd_per_gpu_hour=None
        if spot_usd_per_hour is None
        else round(spot_usd_per_hour / num_gpus, 4),
        billing_increment_seconds=PROVIDERS[provider].billing_increment_seconds,
        as_of=today,
        source=source,
    )


def _cheapest(offers: Iterable[GpuPrice | None]) -> tuple[GpuPrice, ...]:
    """One offer of each kind: a provider has several machines with the same GPUs."""
    best: dict[object, GpuPrice] = {}
    for offer in offers:
        if offer is not None and _price(offer) < _price(best.get(offer.key)):
            best[offer.key] = offer
    return tuple(best.values())


def _price(offer: GpuPrice | None) -> float:
    prices = () if offer is None else (offer.usd_per_gpu_hour, offer.spot_usd_per_gpu_hour)
    return next((x for x in prices if x is not None), math.inf)


def ask_lambda(
    today: datetime.date,
    *,
    base_url: str | None = None,
    timeout_seconds: float = _SOCKET_SECONDS,
) -> tuple[GpuPrice, ...]:
    """Lambda's own prices, of whatever it sells today whether or not one is free.

    Raises:
        SourceNotSetUp: when there is no API key.
        UserError: when Lambda does not answer as its API describes.
    """
    # Here and below: what speaks HTTP loads only when somebody is asked.
    from accel_gpt2.cloud.lambda_api import (
        KEY_FILE,
        KEY_VARIABLE,
        LAMBDA_URL,
        find_key,
        instance_types,
    )

    key = find_key()
    if key is None:
        raise SourceNotSetUp(f"lambda needs an API key, in {KEY_VARIABLE} or {KEY_FILE}.")
    found = instance_types(key, base_url=base_url or LAMBDA_URL, timeout_seconds=timeout_seconds)
    with _as_described("lambda"):
        return _cheapest(_lambda_offer(x["instance_type"], today) for x in found.values())


def _lambda_offer(described: Mapping[str, Any], today: datetime.date) -> GpuPrice | None:
    # "A100 (40 GB SXM4)"; "N/A" where there is no GPU.
    gpu = re.fullmatch(r"(.+) \((\d+) GB(.*)\)", described["gpu_description"])
    num_gpus = described["specs"]["gpus"]
    if gpu is None or num_gpus < 1:
        return None
    return _offer(
        provider="lambda",
        sku=described["name"],
        model=gpu[1],
        memory_gb=int(gpu[2]),
        hint=gpu[3],
        num_gpus=num_gpus,
        usd_per_hour=described["price_cents_per_hour"] / 100,
        today=today,
        source="https://cloud.lambda.ai/api/v1/instance-types",
    )


_UNIT_SECONDS = MappingProxyType({"second": 1, "minute": 60, "hour": 3600})


def ask_hf_jobs(today: datetime.date, *, endpoint: str | None = None) -> tuple[GpuPrice, ...]:
    """What Hugging Face Jobs cost, by huggingface_hub; `endpoint` is the hub's own unless given.

    Raises:
        UserError: when the hub does not answer as huggingface_hub expects.
    """
    from huggingface_hub import HfApi

    with _as_described("hf-jobs"):
        return _cheapest(
            _offer(
                provider="hf-jobs",
                sku=flavor.name,
                model=flavor.accelerator.model,
                memory_gb=_number(flavor.accelerator.vram) / int(flavor.accelerator.quantity),
                hint="sxm",  # the hub's A100 and H200 are; others have no such variant
                num_gpus=int(flavor.accelerator.quantity),
                usd_per_hour=flavor.unit_cost_usd * 3600 / _UNIT_SECONDS[flavor.unit_label],
                today=today,
                source="huggingface_hub.list_jobs_hardware()",
            )
            for flavor in HfApi(endpoint=endpoint).list_jobs_hardware()
            if flavor.accelerator is not None and flavor.accelerator.type == "gpu"
        )


def _number(text: str) -> float:
    """
    >>> _number("24 GB")
    24.0
    """
    return float(text.split()[0])


# gpuhunt's names of providers, and the region whose prices prices.csv has.
_GPUHUNT_PROVIDERS = MappingProxyType(
    {
        "aws": ("aws", "us-east-1"),
        "azure": ("azure", "eastus"),
        "gcp": ("gcp", "us-central1"),
        "runpod": ("runpod", ""),
        "verda": ("verda", ""),
    }
)


def ask_gpuhunt(today: datetime.date) -> tuple[GpuPrice, ...]:
    """The prices that dstack collects every day, by the package gpuhunt.

    Raises:
        SourceNotSetUp: when gpuhunt is not installed.
        UserError: when a provider's list cannot be fetched.
    """
    if importlib.util.find_spec("gpuhunt") is None:
        raise SourceNotSetUp("gpuhunt is not installed: type pip install 'accel-gpt2[prices]'.")
    from importlib.metadata import version

    import gpuhunt

    source = f"gpuhunt {version('gpuhunt')}"
    with _as_described("gpuhunt"), _impatient_sockets():
        catalog = gpuhunt.Catalog(balance_resources=False)
        items = catalog.query(provider=list(_GPUHUNT_PROVIDERS), min_gpu_count=1)
    silent = set(_GPUHUNT_PROVIDERS) - {item.provider for item in items}
    if silent:
        raise UserError(f"gpuhunt could not fetch the prices of {', '.join(sorted(silent))}.")
    with _as_described("gpuhunt"):
        return _from_gpuhunt(items, today, source)


def _from_gpuhunt(items: Iterable[Any], today: datetime.date, source: str) -> tuple[GpuPrice, ...]:
    """Of each provider, GPU and tier the smallest machine, at its lowest price in the home region.

    On-demand and spot are items of their own there.
    """
    on_demand: list[GpuPrice] = []
    spot: dict[object, float] = {}
    for item in items:
        provider, region = _GPUHUNT_PROVIDERS[item.provider]
        # RunPod's community machines are listed by country, its own by data centre.
        community = provider == "runpod" and re.fullmatch("[A-Z]{2}", item.location)
        tier = "community" if community else "secure" if provider == "runpod" else "on-demand"
        offer = _offer(
            provider=provider,
            sku=item.instance_name,
            model=item.gpu_name or "",
            memory_gb=item.gpu_memory or 0,
            hint="pcie" if item.instance_name.startswith("Standard_NC") else item.instance_name,
            num_gpus=item.gpu_count,
            tier=tier,
            usd_per_hour=item.price,
            today=today,
            source=source,
        )
        # The catalogs write 0 and 700 where there is no price.
        if offer is None or price_problems(offer) or not item.location.startswith(region):
            continue
        if item.spot:
            spot[offer.key] = min(_price(offer), spot.get(offer.key, math.inf))
        else:
            on_demand.append(offer)
    smallest: dict[object, GpuPrice] = {}
    for offer in sorted(_cheapest(on_demand), key=lambda x: x.min_gpus):
        smallest.setdefault((offer.provider, offer.gpu, offer.tier), offer)
    return tuple(_with_spot(offer, spot.get(offer.key)) for offer in smallest.values())


def _with_spot(offer: GpuPrice, usd_per_gpu_hour: float | None) -> GpuPrice:
    """A spot price above the on-demand one is of a zone where nobody would take it."""
    if usd_per_gpu_hour is None or usd_per_gpu_hour > _price(offer):
        return offer
    return dataclasses.replace(offer, spot_usd_per_gpu_hour=usd_per_gpu_hour)


@contextmanager
def _as_described(name: str) -> Iterator[None]:
    """Whatever goes wrong with a source is one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the network's errors have many types, and so has a changed answer
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{name} could not be asked: {type(error).__name__}: {first_line.rstrip('.')}."
        ) from None


@contextmanager
def _impatient_sockets() -> Iterator[None]:
    """gpuhunt sets no time-outs, and prints tracebacks of what it could not fetch."""
    log = logging.getLogger("gpuhunt")
    level, seconds = log.level, socket.getdefaulttimeout()
    log.setLevel(logging.CRITICAL + 1)
    socket.setdefaulttimeout(_SOCKET_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(seconds)
        log.setLevel(level)


# Of one day's prices the later source's count, so what a provider says itself comes last.
SOURCES: Mapping[str, Source] = MappingProxyType(
    {"gpuhunt": ask_gpuhunt, "lambda": ask_lambda, "hf-jobs": ask_hf_jobs}
)
