"""Two launched processes of one training, of which one comes to an end that nobody planned.

    dying_processes.py FOLDER          every death below, in forks of one start, by hand
    dying_processes.py FOLDER DEATH    one of two processes that torchrun has started

A fork is what a person gets who types `RANK=0 WORLD_SIZE=2 ... python launch/train.py` twice. What
each process of a death said and when it ended is left in `FOLDER/deaths.json`.
"""

import accel_gpt2.train  # isort: skip  (before torch: it sets what torch reads when it is loaded)

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a training loads on its way, here once for all forks.
import accelerate  # noqa: F401
import psutil  # noqa: F401
import torch._dynamo
import torch.distributed.tensor  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

import accel_gpt2.classify.evaluate
import accel_gpt2.classify.fit
import accel_gpt2.classify.scores
import accel_gpt2.train.loop
from accel_gpt2.classify.lock import hold
from accel_gpt2.cli.train import launched_main
from accel_gpt2.errors import UserError
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train import peers

assert accel_gpt2.train
GRACE_SECONDS = 1.0
GIVE_UP_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """Where a process is, what happens to it, and which ones it happens to."""

    place: str
    end: Callable[[], Any]
    ranks: tuple[int, ...] = (1,)
    call: int = 1  # of the place's function
    others: Callable[[], Any] | None = None  # what happens to the others, there
    run: str | None = None  # the run directory; its own where nothing is said
    work: Callable[[Path, Path], None] | None = None  # of recipe and run; the command line's


PLACES: dict[str, tuple[Any, str]] = {
    "loading": (accel_gpt2.classify.fit, "prepare_data"),
    "step": (accel_gpt2.train.loop, "learning_rate_at"),
    "evaluation": (accel_gpt2.train.loop, "score_documents"),
    "saving": (accel_gpt2.train.loop, "save_checkpoint"),
    "scoring": (accel_gpt2.classify.scores, "score_documents"),
}


def unexpected() -> None:
    raise ZeroDivisionError("injected")


def expected() -> None:
    raise UserError("The injected folder does not exist; make it.")


def full_disk() -> None:
    raise OSError(28, "No space left on device", "runs/a/log.jsonl")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stuck() -> None:
    """What NCCL does where gloo raises an error: it waits."""
    time.sleep(600)


def slow_to_leave() -> None:
    """A tracker that uploads when the training is over."""
    real = accel_gpt2.classify.fit._close

    def close(*args: Any) -> None:
        time.sleep(2 * GRACE_SECONDS)
        real(*args)

    accel_gpt2.classify.fit._close = close


def fit(recipe: Path, run: Path) -> None:
    """What whoever writes a program of their own calls."""
    accel_gpt2.classify.fit.fit(resolve([read_layer(recipe)]), run, quiet=True)


def evaluate(recipe: Path, run: Path) -> None:
    """What `launch/evaluate.py` calls."""
    accel_gpt2.classify.evaluate.evaluate_run(run, quiet=True)


DEATHS = {
    "unexpected in a step": Death(place="step", call=3, end=unexpected),
    "unexpected in a step of the first": Death(place="step", call=3, end=unexpected, ranks=(0,)),
    "unexpected while saving": Death(place="saving", end=unexpected, ranks=(0,)),
    "unexpected, and the other is stuck": Death(place="step", call=3, end=unexpected, others=stuck),
    "killed, and the other is stuck": Death(
        place="step", call=3, end=killed, ranks=(0,), others=stuck
    ),
    "expected in an evaluation": Death(place="evaluation", end=expected),
    "expected while loading": Death(place="loading", end=expected),
    "expected by both": Death(place="loading", end=expected, ranks=(0, 1)),
    "a full disk": Death(place="step", call=3, end=full_disk),
    "an exit": Death(place="step", call=3, end=lambda: sys.exit(3)),
    "killed in a step": Death(place="step", call=3, end=killed),
    "killed while loading": Death(place="loading", end=killed),
    "the first killed in a step": Death(
        place="step", call=7, end=killed, ranks=(0,), run="taken over"
    ),
    "nobody": Death(place="step", end=killed, ranks=(), run="taken over"),
    "killed in a program of one's own": Death(place="step", call=3, end=killed, work=fit),
    "killed in an evaluation": Death(place="scoring", end=killed, run="taken over", work=evaluate),
    "refused": Death(place="step", end=killed, ranks=(), run="held by another"),
    "a signal to one while loading": Death(place="loading", end=stopped),
    "a signal to one in a step": Death(place="step", call=3, end=stopped, others=slow_to_leave),
}


def inject(death: Death, rank: int, died: Path) -> None:
    """Have the place's function do, at that call, what is to happen to this process."""
    module, name = PLACES[death.place]
    real = getattr(module, name)
    calls = 0

    def instead(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == death.call:
            if rank in death.ranks:
                died.write_text(str(time.monotonic()))
                death.end()
            elif death.others is not None:
                death.others()
        return real(*args, **options)

    setattr(module, name, instead)


def train(recipe: Path, run: Path) -> None:
    """What `launch/train.py` does."""
    sys.argv = ["launch/train.py", f"--recipe={recipe}", f"--output-dir={run}", "--quiet"]
    launched_main()


def die(folder: Path, name: str) -> dict[str, Any]:
    """Two processes of one death: how they ended, when, and what they said."""
    death = DEATHS[name]
    talk, died = folder / f"{name}.txt", folder / f"{name}.died"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            joined = os.open(talk, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(joined, 1)
            os.dup2(joined, 2)
            peers.GRACE_SECONDS = GRACE_SECONDS
            inject(death, rank, died)
            work = death.work or train
            try:
                work(folder / "recipe.yaml", folder / (death.run or name))
            except SystemExit as left:
                os._exit(int(left.code or 0))
            except UserError as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
                os._exit(error.exit_code)
            os._exit(99)
        ranks[pid] = rank
    started = time.monotonic()
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < 2:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended[ranks[pid]] = (os.waitstatus_to_exitcode(status), time.monotonic())
        elif time.monotonic() - started > GIVE_UP_SECONDS:
            for pid, rank in ranks.items():
                if rank not in ended:
                    os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.01)
    death_time = float(died.read_text()) if died.exists() else started
    return {
        "codes": [ended[rank][0] for rank in range(2)],
        "seconds": [ended[rank][1] - death_time for rank in range(2)],
        "said": talk.read_text(),
        "pids": list(ranks),
    }


def main(folder: Path) -> None:
    """Every death; the processes are those of hand-made starts."""
    gc.freeze()
    results = {}
    for name, death in DEATHS.items():
        held = death.run == "held by another"
        with hold(folder / "held by another") if held else contextlib.nullcontext():
            started = time.monotonic()
            results[name] = die(folder, name)
            sys.stderr.write(f"{name}: {time.monotonic() - started:.1f} s\n")
    (folder / "deaths.json").write_text(json.dumps(results))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        where, chosen = Path(sys.argv[1]), sys.argv[2]
        inject(DEATHS[chosen], int(os.environ["RANK"]), where / "torchrun.died")
        train(where / "recipe.yaml", where / "torchrun")
    else:
        main(Path(sys.argv[1]))
