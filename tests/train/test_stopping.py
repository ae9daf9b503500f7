"""Signals, time and money: what is remembered, what ends at once, and with which exit code."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from accel_gpt2.errors import ExitCode, StoppedEarly
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.stopping import Limit, StopRequest, limits_of

CPU = torch.device("cpu")
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("saved", "code"), [(True, ExitCode.STOPPED), (False, ExitCode.INTERRUPTED)]
)
def test_a_signal_while_preparing_ends_at_once(
    number: signal.Signals, saved: bool, code: ExitCode
) -> None:
    """Nothing is under way: 130 for a new run, 75 for one that has something to go on from."""
    with StopRequest(saved=saved), pytest.raises(StoppedEarly, match=number.name) as stopped:
        signal.raise_signal(number)
    assert stopped.value.exit_code == code


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_while_working_is_remembered(number: signal.Signals) -> None:
    """The step goes on, the next question is answered with yes, and saving decides the code."""
    with StopRequest() as stop:
        stop.preparing = False
        assert not stop.requested(CPU)
        os.kill(os.getpid(), number)
        assert stop.requested(CPU)
        assert stop.error().exit_code == ExitCode.INTERRUPTED
        stop.saved = True
        assert stop.error().exit_code == ExitCode.STOPPED
        assert str(stop.error()) == (
            f"Stopped by {number.name}; the work is saved. Start again to go on."
        )
    assert signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}


_TWO_INTERRUPTS = """
import os, signal, sys, time
from accel_gpt2.train.stopping import StopRequest
with StopRequest() as stop:
    stop.preparing = False
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what the terminal sent already
    time.sleep(1.1)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never here", flush=True)
"""


def test_a_second_interrupt_leaves_at_once() -> None:
    """A person's second Ctrl-C ends with 130; the same one sent twice is one."""
    ended = subprocess.run(
        [sys.executable, "-c", _TWO_INTERRUPTS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == ExitCode.INTERRUPTED
    assert ended.stdout == "still here\n"
    assert "Ctrl-C again leaves at once" in ended.stderr
    assert "Leaving at once; the last whole checkpoint stands." in ended.stderr


def test_a_limit_keeps_time_for_saving() -> None:
    """What comes after the question is counted in, so that a job scheduler does not come first."""
    stop = StopRequest([Limit(seconds=100, reached="The time limit of 100 s is reached")])
    assert not stop.requested(CPU)
    stop.reserve(99)
    assert not stop.requested(CPU)
    stop.reserve(100.5)
    stop.reserve(3)  # the longest counts
    assert stop.requested(CPU)
    stop.saved = True
    assert stop.error().exit_code == ExitCode.LIMIT_REACHED
    assert str(stop.error()) == (
        "The time limit of 100 s is reached; the work is saved. Start again to go on."
    )


def test_a_signal_is_named_before_a_limit() -> None:
    """Both at once: a scheduler that sent the signal expects its code."""
    with StopRequest([Limit(seconds=0, reached="The budget is reached")], saved=True) as stop:
        stop.preparing = False
        assert stop.requested(CPU)
        assert stop.error().exit_code == ExitCode.LIMIT_REACHED
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(CPU)
        assert stop.error().exit_code == ExitCode.STOPPED


def test_the_budget_is_for_all_starts_and_the_time_limit_for_one() -> None:
    """A budget counts to 95%, and earlier starts with it; they do not shorten --max-time."""
    recipe = TrainRecipe(max_time_seconds=60.0, budget_usd=1.0, price_usd_per_hour=0.5)
    assert [limit.seconds for limit in limits_of(recipe, 0)] == [60, 6840]
    assert [limit.seconds for limit in limits_of(recipe, 6800)] == [60, 40]
    assert limits_of(TrainRecipe(price_usd_per_hour=0.5), 7000) == []


def test_a_signal_that_a_library_takes_for_its_own_error_is_still_a_signal() -> None:
    """C extensions that are being loaded, and pyarrow, make other errors from what is raised."""
    with pytest.raises(StoppedEarly, match="SIGTERM"), StopRequest():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        except StoppedEarly:
            raise TypeError("unexpected argument type") from None
    with pytest.raises(TypeError, match="a real one"), StopRequest():
        raise TypeError("a real one")
