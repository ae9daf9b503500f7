"""Training speed on a GPU beside what a user would run instead, and where our step spends its time.

    python benchmarks/gpu_bench.py [--seconds 540] [--nanogpt FOLDER] [--output docs/benchmarks]
    python benchmarks/gpu_bench.py --device cpu --sizes tiny          # a rehearsal without a GPU

A table of trainings, the most telling ones first: document tokens per second (padding does not
count), MFU by the sheet's peak, and peak of allocated memory, ours by its own loop against
`transformers.Trainer` (padded, grouped by length, flattened) and nanoGPT, eager and compiled, with
random weights, 8,192 tokens a step, bf16, AdamW, clipping and no dropout on all sides. First the
losses of ours and of transformers on the same batch and weights are compared. It needs no network,
stops in time, says what is left out, and writes after every row. Where the package is not
installed, it runs from the repository with PYTHONPATH=. and, beside torch, transformers, accelerate
and peft, the wheels that gpu_options.py names.

Exit code 1 when a bar is missed or losses differ.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_options import gpu_options, is_there
from gpu_trainings import WARM_UP_STEPS, Bench, Case, Measured, Scale, Side
from results import say

from accel_gpt2.units import MIB

LEAST_SPEED_UP = 1.6  # of GPT-2 small over the eager padded Trainer
LEAST_MFU = 0.45  # of medium and larger at 1,024 tokens
LEAST_SHARE_AT_SHORT_LENGTHS = 0.9  # of the MFU at 1,024 tokens, at the lengths of AG News
LARGEST_LOSS_DIFFERENCE = {"cuda": 5e-3, "cpu": 1e-4}  # relative; bf16 and fp32


def _case(side: Side, model: str, lengths: str, **options: Any) -> Case:
    return Case(side=side, model=model, lengths=lengths, **options)


def cases(sizes: str) -> Iterator[Case]:
    """The most telling first."""
    if sizes == "tiny":
        for side in ("ours", "Trainer padded", "Trainer grouped", "Trainer flattened"):
            yield _case(side, "gpt2-tiny", "AG News")
        yield _case("ours", "gpt2-tiny", "64")
        yield _case("ours", "gpt2-tiny", "AG News", packed=False)
        yield _case("ours", "gpt2-tiny", "AG News", finetuning="lora")
        yield _case("nanoGPT", "gpt2-tiny", "64")
        return
    trainers: tuple[Side, ...] = ("Trainer padded", "Trainer grouped", "Trainer flattened")
    for lengths in ("AG News", "1024"):
        yield _case("ours", "gpt2", lengths)
        yield _case("Trainer padded", "gpt2", lengths)
    yield _case("ours", "gpt2-medium", "1024")
    yield _case("ours", "gpt2", "AG News", compiled=True)
    yield _case("ours", "gpt2", "1024", compiled=True)
    yield _case("nanoGPT", "gpt2", "1024")
    yield _case("nanoGPT", "gpt2", "1024", compiled=True)
    yield _case("ours", "gpt2", "AG News", packed=False)
    yield _case("Trainer grouped", "gpt2", "AG News")
    yield _case("Trainer flattened", "gpt2", "AG News")
    yield _case("ours", "gpt2-medium", "1024", compiled=True)
    yield _case("ours", "gpt2-medium", "AG News")
    yield _case("Trainer padded", "gpt2-medium", "1024")
    for model in ("gpt2-large", "gpt2-xl"):
        yield _case("ours", model, "1024")
        yield _case("ours", model, "AG News")
        yield _case("Trainer padded", model, "1024")
    yield _case("Trainer padded", "gpt2", "1024", compiled=True)
    for side in ("ours", *trainers):
        yield _case(side, "gpt2", "IMDB")
    for model in ("gpt2", "gpt2-xl"):
        for lengths in ("1024", "AG News"):
            yield _case("ours", model, lengths, finetuning="lora")
            yield _case("Trainer padded", model, lengths, finetuning="lora")
    yield _case("ours", "gpt2-large", "1024", compiled=True)
    yield _case("ours", "gpt2-xl", "1024", compiled=True)
    yield _case("Trainer grouped", "gpt2", "AG News", compiled=True)
    for model in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
        yield _case("ours", model, "IMDB")
        yield _case("Trainer grouped", model, "AG News")


def main() -> int:
    """Measure, write the tables, and say whether the bars are held."""
    parser = gpu_options(__doc__, seconds=540.0)
    parser.add_argument("--nanogpt", type=Path, help="a folder with nanoGPT's model.py")
    options = parser.parse_args()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.setdefault(name, "expandable_segments:True")
    if not is_there(options.device):
        return 2
    bench = Bench(torch.device(options.device), Scale.of(options.sizes), options.nanogpt)
    page = Page(bench, options.output)
    started = time.monotonic()
    rows = list(cases(options.sizes))
    sizes = [rows[0].model] if options.sizes == "tiny" else ["gpt2", "gpt2-medium"]
    for model in sizes:
        page.losses[model] = bench.losses(model)
        say(f"{model}: loss {page.losses[model][0]:.5f} ours, {page.losses[model][1]:.5f} theirs")
    # The breakdown is of the first cases, and its time is kept free.
    breakdowns = [x for x in rows if x.side == "ours" and x.finetuning == "full"][:3]
    end = options.seconds - 15.0 * len(breakdowns)
    slowest: dict[tuple[str, bool], float] = {}
    for case in rows:
        left = end - (time.monotonic() - started)
        kind = (case.model, case.compiled)
        if case.side == "nanoGPT" and options.nanogpt is None:
            reason = "no --nanogpt folder is given"
        elif left < max(15.0 if not case.compiled else 60.0, 1.3 * slowest.get(kind, 0.0)):
            reason = "no time left"
        else:
            case_started = time.monotonic()
            result = bench.measure(case)
            slowest[kind] = max(slowest.get(kind, 0.0), time.monotonic() - case_started)
            page.rows.append(result)
            say(row(result))
            page.write()
            continue
        page.left_out.append(f"{case.label}: {reason}")
        say(f"left out: {page.left_out[-1]}")
    for case in breakdowns:
        if options.seconds - (time.monotonic() - started) > 15.0:
            page.breakdowns[case.label] = bench.breakdown(case)
            page.write()
    say(f"wrote {page.write()}")
    return 1 if any(not held for _, held in page.bars()) else 0


@dataclass(slots=True)
class Page:
    """What was found out so far, as Markdown and as JSON."""

    bench: Bench
    folder: Path
    rows: list[Measured] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    losses: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    breakdowns: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def bars(self) -> list[tuple[str, bool]]:
        """Each bar that the rows so far say something about, and whether it is held."""
        found = []
        allowed = LARGEST_LOSS_DIFFERENCE[self.bench.device.type]
        for model, (ours, theirs) in self.losses.items():
            difference = abs(ours - theirs) / theirs
            found.append((f"{model}: the losses differ by {difference:.1e}", difference <= allowed))
        for lengths in ("AG News", "1024"):
            own = self._best("gpt2", lengths)
            eager = self._one(_case("Trainer padded", "gpt2", lengths))
            if own and eager and own.tokens_per_second and eager.tokens_per_second:
                factor = own.tokens_per_second / eager.tokens_per_second
                claim = f"gpt2, {lengths}: {factor:.2f}x the eager Trainer ({LEAST_SPEED_UP}x)"
                found.append((claim, factor >= LEAST_SPEED_UP))
        for model in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
            own = self._best(model, "1024")
            if own is None or own.mfu is None:
                continue
            claim = f"{model}, 1024: {own.mfu:.1%} MFU ({LEAST_MFU:.0%})"
            found.append((claim, own.mfu >= LEAST_MFU))
            short = self._best(model, "AG News")
            if short is not None and short.mfu is not None:
                share = short.mfu / own.mfu
                claim = f"{model}: at AG News' lengths {share:.0%} of that MFU"
                found.append((claim, share >= LEAST_SHARE_AT_SHORT_LENGTHS))
        return found

    def _one(self, case: Case) -> Measured | None:
        return next((x for x in self.rows if x.case == case), None)

    def _best(self, model: str, lengths: str) -> Measured | None:
        both = [self._one(_case("ours", model, lengths, compiled=x)) for x in (False, True)]
        measured = [x for x in both if x is not None and x.tokens_per_second is not None]
        return max(measured, key=lambda x: x.tokens_per_second or 0.0, default=None)

    def write(self) -> Path:
        """Both files; the Markdown's path."""
        name = self.bench.gpu.name if self.bench.gpu else self.bench.device.type
        path = self.folder / f"{time.strftime('%Y-%m-%d')}-training-on-{name}.md"
        self.folder.mkdir(parents=True, exist_ok=True)
        bars = self.bars()
        content = {
            "device": self.bench.name,
            "torch": torch.__version__,
            "bars": [{"claim": claim, "held": held} for claim, held in bars],
            "losses": self.losses,
            "rows": [dataclasses.asdict(x) for x in self.rows],
            "breakdowns": self.breakdowns,
            "left_out": self.left_out,
        }
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        parts = sorted(
            {part for shares in self.breakdowns.values() for part in shares},
            key=lambda part: -statistics.fmean(x.get(part, 0.0) for x in self.breakdowns.values()),
        )
        lines = [
            f"# Training speed: {self.bench.name}",
            "",
            f"`python benchmarks/gpu_bench.py`, torch {torch.__version__}, {platform.platform()}. "
            f"Random weights and tokens, {self.bench.scale.step_tokens:,} tokens a step, "
            f"{'bf16 autocast' if self.bench.precision == 'bf16' else 'fp32'}, fused AdamW, "
            "clipping, no dropout. Document tokens: padding does not count. MFU by the sheet's "
            "peak. Warm-up is the time of the model's building, compiling and first "
            f"{WARM_UP_STEPS} steps.",
            "",
            *(f"- {'held' if held else '**missed**'}: {claim}" for claim, held in bars),
            "",
            "| training | tokens/s | of the eager padded Trainer | MFU | peak MiB | warm-up s |",
            "|---|---:|---:|---:|---:|---:|",
            *(self._row(x) for x in self.rows),
            "",
        ]
        if parts:
            lines += [
                "Where our step's time goes:",
                "",
                f"| training | {' | '.join(parts)} |",
                f"|---|{'---:|' * len(parts)}",
                *(
                    f"| {label} | {' | '.join(f'{shares.get(part, 0.0):.1%}' for part in parts)} |"
                    for label, shares in self.breakdowns.items()
                ),
                "",
            ]
        if self.left_out:
            lines += ["Left out:", "", *(f"- {line}" for line in self.left_out), ""]
        path.write_text("\n".join(lines), "utf-8")
        return path

    def _row(self, measured: Measured) -> str:
        case = dataclasses.replace(measured.case, side="Trainer padded", compiled=False)
        eager = self._one(case)
        times = ""
        if eager and eager.tokens_per_second and measured.tokens_per_second:
            times = f"{measured.tokens_per_second / eager.tokens_per_second:.2f}x"
        return row(measured, times)


def row(measured: Measured, times: str = "") -> str:
    """A line of the table."""
    rate, mfu, peak = measured.tokens_per_second, measured.mfu, measured.peak_bytes
    cells = (
        measured.case.label,
        measured.note if rate is None else f"{rate:,.0f}",
        times,
        "" if mfu is None else f"{mfu:.1%}",
        "" if peak is None else f"{peak / MIB:,.0f}",
        f"{measured.warm_up_seconds:.1f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
