"""Document tokens per second of a training, beside what a person would run instead.

    python benchmarks/training_peers.py [--data ../shared/data] [--nanogpt FOLDER]

Every side trains in a process of its own, on one thread in fp32: from the same initial weights, on
the same documents, as many of them in an optimizer step, by AdamW with the same settings, clipped
alike and without dropout. It is its own program otherwise, with its own batches, collator, loss and
loop. Sides take turns in an order that rotates, and a ratio is of two turns of one round. Only
predicted tokens of documents count; padding is waste. First each side says the loss of the same
documents, alone and as a batch; and a plain loop on our batches has to arrive at our held-out loss.
The ceiling is a side too: the step's matrix products and nothing else.

`make bench` builds the environment that has the peers: trl and litgpt want packages that
accel-gpt2 does not need. What is missing is left out, and named. Results go to --output after every
round. A quarter of an hour on two quiet cores.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import child
from peers.workload import Workload
from results import processor

from accel_gpt2.plan.flops import train_flops_per_token

OURS = "ours"
_REFERENCE = "reference"
_LARGEST_DIFFERENCE = 1e-5  # of a document's loss, relative
_LARGEST_HELD_OUT_DIFFERENCE = 1e-4  # of the reference's from ours in the end, nats per token
_CEILING = 0.75
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Something that trains.

    Attributes:
        key: module of `peers`, and its variant behind a colon.
        note: what is not the same as ours; "" where the losses of documents must be equal.
        packages: without which it is left out.
        slow: mostly padding; it takes one step in every other round, and no step to warm up.
        bars: how much faster ours is to be, by the data set.
    """

    key: str
    name: str
    note: str = ""
    packages: tuple[str, ...] = ()
    slow: bool = False
    bars: Mapping[str, float] = field(default_factory=dict)


SIDES = (
    Side(key=OURS, name="accel-gpt2"),
    Side(key="reference", name="plain loop on our batches, one document at a time"),
    Side(
        key="trainer:dynamic",
        name="Trainer, padded to the longest of a batch",
        bars={"ag_news": 1.8, "imdb": 1.35},
    ),
    Side(key="trainer:grouped", name="Trainer, group_by_length", bars={"ag_news": 1.1}),
    Side(key="trainer:flattened", name="Trainer, flattened", bars={"ag_news": 1.1}),
    Side(key="sft", name="TRL SFTTrainer, packing", packages=("trl",)),
    Side(key="trainer:512", name="Trainer, padded to 512", slow=True),
    Side(key="trainer:1024", name="Trainer, padded to 1024", slow=True, bars={"ag_news": 10.0}),
    Side(
        key="run_clm",
        name="run_clm_no_trainer",
        note="another objective: rows cut from the stream of all text",
        bars={"ag_news": 1.0},
    ),
    Side(
        key="nanogpt",
        name="nanoGPT",
        note="another objective, as run_clm_no_trainer; 50,304 words",
        bars={"ag_news": 1.0},
    ),
    Side(
        key="litgpt_full",
        name="litgpt finetune_full",
        note="another model of the same sizes: rotary positions, untied head, 50,304 words; "
        "its loop does not clip",
        packages=("litgpt", "lightning"),
        bars={"ag_news": 1.9},
    ),
)
# The step's products alone, with the model's vocabulary and with one padded to a multiple of 64,
# which is the faster one, and the ceiling.
PRODUCTS = ("products:50257", "products:50304")
_STEPS_PER_TURN = {"ag_news": 3, "imdb": 1}


class SideFailed(Exception):
    """A side ended by itself; the message is what it last said."""


# One thread each, so that a CPU second is a second of one core; nothing is asked of a network.
_ENVIRONMENT = {
    "PYTHONPATH": str(_HERE),
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # What a killed side held is released by nobody else.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}
# Sides are forked from a process that has imported what most of them need, ten seconds each.
_PROCESSES = multiprocessing.get_context("forkserver")


class Child:
    """The process of one side."""

    def __init__(self, key: str, work: Workload) -> None:
        self._log = work.folder / f"{key.replace(':', '-')}.log"
        self._connection, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(
            target=child.main, args=(key, work.folder, self._log, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def answer(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            SideFailed: when it says nothing any more.
        """
        try:
            answer: dict[str, Any] = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            said = self._log.read_text("utf-8", errors="replace").strip().splitlines()
            raise SideFailed(said[-1] if said else f"exit code {self._process.exitcode}") from None
        return answer

    def ask(self, command: str) -> dict[str, Any]:
        """Its answer to a command."""
        with contextlib.suppress(ConnectionError):  # `answer` knows more
            self._connection.send(command)
        return self.answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def main() -> int:
    """Measure, write Markdown and JSON, and say whether the losses agree."""
    options = _options()
    os.environ.update(_ENVIRONMENT)
    _PROCESSES.set_forkserver_preload(["peers.trainer", "peers.ours"])
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": _versions(),
        "layers": options.layers,
        "width": options.width,
        "documents_per_step": options.documents_per_step,
        "workloads": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for lengths in options.lengths:
            work = Workload(
                folder=Path(folder) / lengths,
                lengths=lengths,
                data=None if options.data is None else options.data.resolve(),
                nanogpt=None if options.nanogpt is None else options.nanogpt.resolve(),
                num_layers=options.layers,
                width=options.width,
                documents_per_step=options.documents_per_step,
            )
            for found in _measure(work, options):
                results["workloads"][lengths] = found
                _write_results(options.output, results)
    if all(found["losses_agree"] for found in results["workloads"].values()):
        return 0
    _say("not every side has our loss; the tables name them")
    return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = [side.key for side in SIDES if side.key != OURS]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=keys, default=keys)
    parser.add_argument(
        "--lengths", nargs="+", choices=list(_STEPS_PER_TURN), default=list(_STEPS_PER_TURN)
    )
    parser.add_argument("--data", type=Path, help="folder with ag_news/ and imdb/")
    parser.add_argument("--nanogpt", type=Path, help="folder with a copy of nanoGPT")
    parser.add_argument("--layers", type=int, default=4, help="12 for GPT-2 small")
    parser.add_argument("--width", type=int, default=256, help="768 for GPT-2 small")
    parser.add_argument(
        "--documents-per-step", type=int, default=8, help="Trainer's own default is 8"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    return parser.parse_args()


def _measure(work: Workload, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known of one data set, after every round."""
    work.write()
    _say(f"{work.lengths}: documents and initial weights")
    preparing = Child("prepare", work)
    found: dict[str, Any] = {"synthetic": work.data is None, **preparing.answer()}
    preparing.close()
    sides = [x for x in SIDES if x.key in {OURS, *options.peers}]
    longest = found["tokens_of_longest"]
    left_out = {x.key: why for x in sides if (why := _missing(x, work, longest))}
    keys = [x.key for x in sides if x.key not in left_out] + list(PRODUCTS)
    steps = _STEPS_PER_TURN[work.lengths]
    slow = {x.key for x in sides if x.slow}
    steps_of = {key: 1 if key in slow else steps for key in keys}
    turns: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
    held_out: dict[str, float] = {}
    losses: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as closing:
        children = {}
        for key in keys:
            children[key] = Child(key, work)
            closing.callback(children[key].close)

        def fail(key: str, error: SideFailed) -> None:
            if key == OURS:
                raise SystemExit(f"accel-gpt2 itself does not train: {error}") from error
            _say(f"{work.lengths}: {key} is left out: {error}")
            left_out[key] = str(error)
            children.pop(key).close()
            turns.pop(key)

        for key, side in list(children.items()):
            try:
                side.answer()
                if key not in PRODUCTS:
                    losses[key] = side.ask("losses")
                if key not in slow:
                    side.ask("steps 1")
                _say(f"{work.lengths}: {key} is ready")
            except SideFailed as error:
                fail(key, error)
        for number in range(options.rounds):
            order = [key for key in keys if key in children]
            for key in order[number % len(order) :] + order[: number % len(order)]:
                if key in slow and number % 2:
                    continue
                try:
                    turn = children[key].ask(f"steps {steps_of[key]}")
                    turns[key].append({"round": number, **turn})
                    if number + 1 == options.rounds and key not in PRODUCTS and key not in slow:
                        held_out[key] = children[key].ask("evaluate")["loss"]
                except SideFailed as error:
                    fail(key, error)
                    continue
                last = turns[key][-1]
                _say(
                    f"{work.lengths} round {number + 1}/{options.rounds} {key}: "
                    f"{last['document_tokens'] / last['cpu_seconds']:.0f} document tokens a second"
                )
            found |= {
                "rounds": number + 1,
                "left_out": left_out,
                "losses": losses,
                "turns": turns,
                "held_out": held_out,
                "load": round(os.getloadavg()[0], 2),
            }
            found["summary"] = _summary(work, found)
            found["losses_agree"] = not any(x["disagrees"] for x in found["summary"].values())
            yield found


def _missing(side: Side, work: Workload, longest: int) -> str:
    """Why a side cannot run here, or ""."""
    missing = [name for name in side.packages if not importlib.util.find_spec(name)]
    if missing:
        return f"{' and '.join(missing)} not installed: see `make bench`"
    if side.key == "nanogpt" and work.nanogpt is None:
        return "no copy of it: give --nanogpt FOLDER"
    if side.key == "trainer:512" and longest >= 512:
        return f"it would cut the documents, the longest of which has {longest:,} tokens"
    return ""


def _summary(work: Workload, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of the table, by side."""
    turns = found["turns"]
    flops = train_flops_per_token(
        n_layer=work.num_layers,
        n_embd=work.width,
        vocab_size=found["vocab_size"],
        context_tokens=found["context_tokens"],
    )
    rows = {}
    for key, own in turns.items():
        rounds = {x["round"]: x for x in turns[OURS]}
        pairs = [(rounds[x["round"]], x) for x in own]
        row: dict[str, Any] = {
            "document_tokens_per_cpu_second": statistics.median(map(_speed, own)),
            "tokens_per_step": sum(x["document_tokens"] for x in own)
            / sum(x["steps"] for x in own),
            "disagrees": False,
        }
        if key not in PRODUCTS:
            computed = sum(x["computed_tokens"] for x in own)
            row["token_efficiency"] = sum(x["document_tokens"] for x in own) / computed
            row["model_gflops"] = row["document_tokens_per_cpu_second"] * flops / 1e9
            row |= _agreement(key, found["losses"])
            if key in found["held_out"]:
                row["held_out_loss"] = found["held_out"][key]
                row["held_out_difference"] = row["held_out_loss"] - found["held_out"][OURS]
                if key == _REFERENCE:
                    off = abs(row["held_out_difference"])
                    row["disagrees"] |= off > _LARGEST_HELD_OUT_DIFFERENCE
        for name, of in (("ratio", _speed), ("wall_ratio", _wall_speed)):
            ratios = [of(ours) / of(theirs) for ours, theirs in pairs]
            row[name] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows[key] = row
    return rows


def _agreement(key: str, losses: Mapping[str, Any]) -> dict[str, Any]:
    """The largest relative difference of a document's loss from ours, and of the batch's from the
    sum of its documents."""
    ours, own = losses[OURS], losses[key]
    pairs = list(zip(own["each"], ours["each"], strict=True))
    alone = max(abs(a / b - 1) for a, b in pairs)
    together = abs(own["batch"] / sum(own["each"]) - 1)
    same = not next(side.note for side in SIDES if side.key == key)
    worst = max(alone, together) if same else together
    return {
        "loss_difference": alone,
        "batch_difference": together,
        "disagrees": worst > _LARGEST_DIFFERENCE,
    }


def _speed(turn: Mapping[str, Any]) -> float:
    return float(turn["document_tokens"] / turn["cpu_seconds"])


def _wall_speed(turn: Mapping[str, Any]) -> float:
    return float(turn["document_tokens"] / turn["wall_seconds"])


def _write_results(output: Path, results: Mapping[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{results['date']}-training-peers.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(results), encoding="utf-8")


def _markdown(results: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Training beside its peers",
        "",
        f"{results['date']}, by",
        "",
        "```",
        results["command"],
        "```",
        "",
        f"{results['machine']}; {versions}. {results['layers']} layers x {results['width']}, "
        f"GPT-2's vocabulary, fp32, one thread, {results['documents_per_step']} documents in an "
        "optimizer step. How it is measured is said at the top of `benchmarks/training_peers.py`.",
        "",
        "Ours keeps its freed memory by `mallopt` (docs/log.md); the others and the products alone "
        "do not. Our first step has the longest document in it, so that memory runs out at once or "
        "never; without warm-up, which no side has here, it counts for much after so few steps.",
    ]
    for lengths, found in results["workloads"].items():
        lines += ["", f"## Documents as long as those of {lengths}", "", *_table(lengths, found)]
    return "\n".join(lines) + "\n"


def _table(lengths: str, found: Mapping[str, Any]) -> list[str]:
    summary = found["summary"]
    kind = "synthetic documents" if found["synthetic"] else "documents"
    lines = [
        f"{found['train_documents']:,} {kind} of {found['tokens_per_document']:.0f} tokens, the "
        f"longest of {found['tokens_of_longest']:,}; {found['rounds']} rounds of "
        f"{_STEPS_PER_TURN[lengths]} steps, load {found['load']} at the end. Held-out losses are "
        "those at the end, of sides that trained as many steps on documents of their own choice; "
        "the plain loop trains on ours.",
        "",
        "| side | document tokens per CPU second | ours is faster by | on the wall clock | bar | "
        "tokens of a step | document tokens of computed | model GFLOP/s | document's loss off by | "
        "held-out loss | from ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for side in SIDES:
        if side.key in found["left_out"]:
            notes.append(f"- {side.name} is left out: {found['left_out'][side.key]}.")
        if side.key not in summary:
            continue
        row = summary[side.key]
        cells = [
            f"{side.name}{'*' if side.note else ''}",
            f"{row['document_tokens_per_cpu_second']:,.0f}",
            _ratio(row["ratio"]),
            _ratio(row["wall_ratio"]),
            _bar(row["ratio"][0], side.bars.get(lengths)),
            f"{row['tokens_per_step']:,.0f}",
            f"{row['token_efficiency']:.1%}",
            f"{row['model_gflops']:.1f}",
            f"{max(row['loss_difference'], row['batch_difference']):.0e}",
            *_held_out(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if side.note:
            notes.append(f"- {side.name}*: {side.note}.")
        if row["disagrees"]:
            notes.append(f"- {side.name}: **its loss is not ours**; its speed says nothing.")
    for key in (key for key in PRODUCTS if key in summary):
        words, share = int(key.partition(":")[2]), summary[key]["ratio"][0]
        reached = ""
        if lengths == "ag_news" and key == PRODUCTS[-1]:
            reached = f" (bar {_CEILING:.0%}: {'met' if share >= _CEILING else 'missed'})"
        notes.append(
            f"- The step's matrix products alone, with {words:,} words: "
            f"{summary[key]['document_tokens_per_cpu_second']:,.0f} tokens per CPU second; ours "
            f"reaches {share:.0%} of it{reached}."
        )
    return [*lines, "", *notes]


def _held_out(row: Mapping[str, Any]) -> tuple[str, str]:
    if "held_out_loss" not in row:
        return "", ""
    return f"{row['held_out_loss']:.3f}", f"{row['held_out_difference']:+.5f}"


def _ratio(ratio: Sequence[float]) -> str:
    median, least, most = ratio
    return f"{median:.2f} ({least:.2f}-{most:.2f})"


def _bar(ratio: float, bar: float | None) -> str:
    if bar is None:
        return ""
    return f"{bar:g}: " + ("met" if ratio >= bar else f"missed by {1 - ratio / bar:.0%}")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "trl", "litgpt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
