"""A trained run to put things into."""

from pathlib import Path

import pytest

from tests.fuzz.conftest import train_template


@pytest.fixture(scope="session")
def run_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained run, as the tests of malformed input damage it."""
    return train_template(tmp_path_factory.getbasetemp())
