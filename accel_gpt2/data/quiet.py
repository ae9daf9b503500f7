"""The libraries' own talk, switched off where ours says it better."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, reports or talk of coming versions: our progress line is the only talk."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    only_errors_of_deepspeed()  # which is imported where a model is saved
    try:
        with warnings.catch_warnings():
            # Libraries that use one another's deprecated names; our constraints file pins them.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def only_errors_of_deepspeed() -> None:
    """Its log, which is on stdout, begins with a warning of having no GPU, in every training; what
    fails is still said."""
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
