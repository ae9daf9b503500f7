"""Today's prices, asked for on demand: checked, merged with what is known, kept in the cache.

A refresh is all or nothing: where one source fails or one price jumps, the copy stays as it was.
"""

import datetime
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from accel_gpt2.catalog.prices import (
    GpuPrice,
    PriceSet,
    price_problems,
    read_prices,
    shipped_prices,
    write_prices,
)
from accel_gpt2.cloud.price_sources import Source, SourceNotSetUp
from accel_gpt2.data.cache import cache_directory
from accel_gpt2.durable import make_directory, write_failure, write_text
from accel_gpt2.errors import UserError

# More than a change of prices: a mistake of a source, until somebody has looked.
LARGEST_JUMP = 0.5

_PATIENCE_SECONDS = 60.0


def prices_path() -> Path:
    """The user's copy, which a refresh writes; it need not exist."""
    return cache_directory() / "prices.csv"


def current_prices() -> PriceSet:
    """Of each offer the newer of two prices: the package's, and the one of the last refresh.

    Raises:
        UserError: when the user's copy is damaged.
    """
    shipped = shipped_prices()
    try:
        text = prices_path().read_text(encoding="utf-8")
    except FileNotFoundError:
        return shipped
    except (OSError, UnicodeError) as error:
        raise UserError(f"{prices_path()} cannot be read ({error}).") from None
    copied = read_prices(text, str(prices_path()))
    offers = merged(shipped.offers, copied)
    return PriceSet(name="current", offers=offers, subscriptions=shipped.subscriptions)


def merged(*lists: Iterable[GpuPrice]) -> tuple[GpuPrice, ...]:
    """All offers, each once: the newest, and of one day the one of the later list."""
    newest: dict[object, GpuPrice] = {}
    for offer in (x for offers in lists for x in offers):
        before = newest.get(offer.key)
        if before is None or before.as_of <= offer.as_of:
            newest[offer.key] = offer
    return tuple(newest.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """What a refresh did: where it wrote, and the offers that each source gave."""

    path: Path
    num_offers: Mapping[str, int]
    not_set_up: tuple[str, ...]


def refresh_prices(
    sources: Mapping[str, Source],
    *,
    today: datetime.date,
    accept_jumps: bool = False,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> Refreshed:
    """Ask every source, and write the user's copy if all of them answered sensibly.

    Sources that are not set up are passed over.

    Raises:
        UserError: when a source fails, none is set up, a price jumps, or nothing can be written;
            what was there before stays.
    """
    known = _known_prices()
    found: dict[str, tuple[GpuPrice, ...]] = {}
    not_set_up: list[str] = []
    failures: list[str] = []
    for name, source in sources.items():
        try:
            found[name] = _checked(name, _within(patience_seconds, name, source, today))
        except SourceNotSetUp as error:
            not_set_up.append(str(error))
        except UserError as error:
            failures.append(str(error))
    if failures or not found:
        reasons = [*failures, *not_set_up]
        raise UserError("\n".join([*reasons, "No price was refreshed; what was known stays."]))
    asked = merged(*found.values())
    jumps = _jumps(known, asked)
    if jumps and not accept_jumps:
        raise UserError(
            "\n".join([*jumps, "No price was refreshed: look them up, then give --accept."])
        )
    path = prices_path()
    try:
        make_directory(path.parent)
    except OSError as error:
        raise write_failure(path, error) from None
    write_text(path, write_prices(merged(known, asked)))
    return Refreshed(
        path=path,
        num_offers={name: len(offers) for name, offers in found.items()},
        not_set_up=tuple(not_set_up),
    )


def _known_prices() -> tuple[GpuPrice, ...]:
    try:
        return current_prices().offers
    except UserError:  # a damaged copy is what a refresh is for
        return shipped_prices().offers


def _within(
    seconds: float, name: str, source: Source, today: datetime.date
) -> tuple[GpuPrice, ...]:
    """What a source gives in this time, whichever library it waits in.

    Raises:
        UserError: when it takes longer.
        Exception: the source's own.
    """
    answers: list[tuple[GpuPrice, ...] | BaseException] = []

    def ask() -> None:
        try:
            answers.append(source(today))
        except BaseException as error:
            answers.append(error)

    # A daemon: what never answers must not keep the process alive.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise UserError(f"{name} did not answer within {seconds:g} s.")
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]


def _checked(name: str, offers: tuple[GpuPrice, ...]) -> tuple[GpuPrice, ...]:
    problems = [
        f"{name}, {offer.sku}: {problem}." for offer in offers for problem in price_problems(offer)
    ]
    if problems:
        raise UserError("\n".join(problems))
    if not offers:
        raise UserError(f"{name} answered, and has no price of a GPU that the catalog knows.")
    return offers


def _jumps(known: Iterable[GpuPrice], asked: Iterable[GpuPrice]) -> list[str]:
    before = {offer.key: offer for offer in known}
    found = []
    for offer in asked:
        old = before.get(offer.key)
        for what in ("usd_per_gpu_hour", "spot_usd_per_gpu_hour"):
            was, now = getattr(old, what, None), getattr(offer, what)
            if was is not None and now is not None and abs(now / was - 1) > LARGEST_JUMP:
                spot = " spot" if what.startswith("spot") else ""
                found.append(
                    f"{offer.provider} {offer.sku}{spot}: ${now:g} an hour, and ${was:g} before."
                )
    return found
