"""Which talk of the libraries is left out."""

import logging
import sys

import pytest

from accel_gpt2.data.quiet import quiet_transformers


def test_deepspeed_says_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Its logger, which writes to stdout, where results are: no warnings, however often."""
    for _ in range(2):
        with quiet_transformers():
            pass
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        logger.warning("Setting accelerator to CPU.")
        logger.error("It failed.")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().out == "It failed.\n"
