"""The Hugging Face hub: is it there, is a repository there, is a copy here already.

Answers come within seconds. Left to themselves, datasets and transformers retry an unreachable hub
for 23 and 46 seconds (measured with datasets 5.2, transformers 5.23) before they look into their
cache; so the hub is asked once, briefly, and the libraries are then told to stay offline.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from huggingface_hub import HfApi

from accel_gpt2.data.raw import (
    FieldChoice,
    RawSplit,
    choose_fields,
    labels_as_text,
    require_text_type,
    require_texts,
)
from accel_gpt2.errors import UserError

# In all: name resolution and several addresses each have time limits of their own.
_PATIENCE_SECONDS = 6.0
_REQUEST_SECONDS = 5.0


class HubAnswer(Enum):
    """What the hub said about a repository."""

    FOUND = "found"
    MISSING = "missing"  # it does not exist, or is private and the token does not open it
    UNREACHABLE = "unreachable"  # no network, or HF_HUB_OFFLINE is set


def ask_hub(repo_id: str, repo_type: Literal["dataset", "model"]) -> HubAnswer:
    """Ask once whether a repository exists; at most six seconds.

    Honours HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and proxies, as huggingface_hub does.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    answers: list[HubAnswer] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repo_id, repo_type=repo_type, timeout=_REQUEST_SECONDS)
            answers.append(HubAnswer.FOUND)
        except (RepositoryNotFoundError, HFValidationError):
            answers.append(HubAnswer.MISSING)
        except Exception:  # the network's errors have many types, from sockets up to proxies
            answers.append(HubAnswer.UNREACHABLE)

    # A daemon: a name server that never answers must not keep the process alive.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    return answers[0] if answers else HubAnswer.UNREACHABLE


def is_hub_id(name: str) -> bool:
    """Whether a repository could have this name.

    >>> is_hub_id("imdb"), is_hub_id("fancyzhx/ag_news"), is_hub_id("a/b/c"), is_hub_id("../x")
    (True, True, False, False)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def why_unreachable() -> str:
    """The end of a sentence about a hub that gave no answer."""
    from huggingface_hub.constants import is_offline_mode

    return "is not asked (HF_HUB_OFFLINE is set)" if is_offline_mode() else "does not answer"


def dataset_is_cached(hub_id: str) -> bool:
    """Whether `datasets` has prepared this data set on this machine before (HF_HOME)."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *namespace, name = hub_id.split("/")
    folder = "___".join([*namespace, camelcase_to_snakecase(name)])
    return any(Path(datasets.config.HF_DATASETS_CACHE).expanduser().glob(f"{folder}/*/*/*"))


def load_hub_splits(hub_id: str, *, reachable: bool, progress: bool) -> dict[str, Any]:
    """All splits (`datasets.Dataset`) of a data set on the hub, downloaded or from the cache.

    Raises:
        UserError: when it cannot be loaded, with the reason that `datasets` gives.
    """
    import datasets

    try:
        with _datasets_behaviour(offline=not reachable, bars=progress and sys.stderr.isatty()):
            return dict(datasets.load_dataset(hub_id))
    except Exception as error:  # a builder may raise anything on files that it cannot read
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The data set {hub_id} cannot be loaded from the Hugging Face hub: {reason}"
        ) from None


@contextmanager
def _datasets_behaviour(*, offline: bool, bars: bool) -> Iterator[None]:
    """Let `datasets` go straight to its cache, or not, and show its progress bars, or not."""
    import datasets

    was_offline = datasets.config.HF_HUB_OFFLINE
    had_bars = not datasets.are_progress_bars_disabled()
    # What HF_HUB_OFFLINE=1 does at import, for one call: no retries.
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        if had_bars:
            datasets.enable_progress_bars()


def read_hub_split(hub_id: str, name: str, split: Any, choice: FieldChoice) -> RawSplit:
    """Text and labels of one split; the texts stay where `datasets` has mapped them.

    Raises:
        UserError: for fields that are not there or not usable, and for missing values.
    """
    where = f"{hub_id}, split {name}"
    table = split.data.table
    strings = [
        field.name
        for field in table.schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    text_field, label_field = choose_fields(table.column_names, strings, choice, where)
    require_text_type(table.schema.field(text_field).type, where, text_field)

    def place(row: int) -> str:
        return f"{where}, row {row}"

    texts = table[text_field]
    require_texts(texts, place, text_field)
    labels = labels_as_text(table[label_field].combine_chunks(), place, label_field)
    feature = split.features[label_field]
    return RawSplit(
        table=pa.table({"text": texts, "label": labels}),
        place=place,
        class_names=tuple(getattr(feature, "names", None) or ()),
    )
