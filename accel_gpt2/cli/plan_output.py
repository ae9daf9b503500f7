"""What `plan` prints: the recommended recipe against the card, what comes next, and why not."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.cli.hardware import describe_profile
from accel_gpt2.cli.output import print_json, print_line, print_table
from accel_gpt2.errors import UsageError, nearest
from accel_gpt2.plan.candidates import CHOICES
from accel_gpt2.plan.memory import ByteRange, MemoryTerm
from accel_gpt2.plan.placement import PLACEMENTS, models_per_gpu, num_models
from accel_gpt2.plan.search import Option, Rejected, RunPlan, memory_parts
from accel_gpt2.plan.table import TableRow, crossed_cells
from accel_gpt2.plan.throughput import TimePlan, TimeTerm
from accel_gpt2.terminal import printable
from accel_gpt2.units import GIB, format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.text import Text

_FEW = 3  # of what fits as well; --all shows every candidate

# Parts of the bar, from left to right; told apart without colours too.
_FILLS = "█▓▒░"
_COLOURS = ("blue", "dark_orange", "green", "magenta", "cyan", "yellow", "red")


def show_plan(plan: RunPlan, *, command: str, everything: bool) -> None:
    """Data: the plan for a reader, as wide as the terminal; plain where stdout is none."""
    option = plan.recommended or plan.smallest
    _print(_wrapped(_title(plan)), style="bold")
    if plan.recommended is None:
        _print(f"\nNothing that was asked for fits. Nearest: {option.label}", style="bold red")
    else:
        _print(f"\nRecommended: {option.label}", style="bold green")
    for name, text in _facts(plan, option):
        _print(_wrapped(text, name=f"  {name:<8}"))
    _print(_bar(option))
    if everything:
        _print_rejected("All other candidates, best first", plan.rejected)
    else:
        _print_rejected("Next best", plan.alternatives[:_FEW])
        _print_rejected("Rejected", plan.failures)
    if plan.recommended is not None:
        _print("\nRun it:", style="bold")
        _print(f"  {command}")


def _print(text: "str | Text", *, style: str = "") -> None:
    from rich.console import Console
    from rich.text import Text

    if isinstance(text, str):
        text = Text("\n".join(map(printable, text.split("\n"))), style=style)
    # Long lines are left to the terminal to break, so that commands can be copied.
    Console(highlight=False, width=_width()).print(text, soft_wrap=True)


def _wrapped(text: str, *, name: str = "") -> str:
    """A fact as wide as the terminal, its later lines under its first word."""
    return textwrap.fill(
        text,
        width=_width(),
        initial_indent=name,
        subsequent_indent=" " * len(name),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width() -> int:
    return shutil.get_terminal_size().columns  # rich prints nothing at all where COLUMNS is 0


def _title(plan: RunPlan) -> str:
    recipe, data = plan.asked.recipe, plan.data
    known = "not read yet"
    if data is not None:
        tokens = format_count(data.num_train_documents * data.mean_tokens)
        known = (
            f"{data.num_classes} classes, {format_count(data.num_train_documents)} training "
            f"documents, {tokens} tokens"
        )
    return f"{recipe.model} on {recipe.dataset} ({known}), {describe_profile(plan.profile)}"


def _facts(plan: RunPlan, option: Option) -> list[tuple[str, str]]:
    recipe, memory = option.recipe, option.memory
    batch = (
        f"{recipe.global_batch_tokens:,} document tokens"
        if recipe.global_batch_tokens
        else f"{recipe.global_batch_size:,} documents"
    )
    facts = [
        ("memory", f"{_of_usable(option)}: {option.verdict}"),
        ("peak", memory.advice(recipe)),
        ("step", f"{batch}, in micro batches of {recipe.micro_batch_tokens:,} padded tokens"),
    ]
    if plan.profile.gpu is not None:
        each = " for each model" if option.placement == "concurrent" else ""
        torch_bytes = (
            f"{format_bytes(memory.allocated_bytes)} allocated by torch, "
            f"{format_bytes(memory.reserved.expected)} reserved with fragmentation{each}"
        )
        facts.insert(1, ("of it", torch_bytes))
    needs = [
        f"{format_bytes(size)} of {name}"
        for size, name in ((memory.host_bytes, "RAM"), (memory.disk_bytes, "disk"))
        if size
    ]
    if needs:
        facts.append(("besides", ", ".join(needs)))
    facts.append(("time", _time(plan, option)))
    if option.time is not None:
        facts.append(("basis", option.time.source))
    facts += [
        ("", f"{quantity.replace('_', ' ')}: {x.ratio:.2f} x what the formula says, {x.source}")
        for quantity, x in plan.residuals.items()
    ]
    if option.cost_usd is not None:
        price = recipe.price_usd_per_hour
        facts.append(("cost", f"${option.cost_usd:.2f}, at ${price:g} an hour"))
    return facts


def _of_usable(option: Option) -> str:
    device, usable = option.device, option.memory.usable_bytes
    there = "" if usable is None else f" of {format_bytes(usable)} that can be used"
    return (
        f"{format_bytes(device.expected)} ({format_bytes(device.low)} to "
        f"{format_bytes(device.high)}){there}"
    )


def _time(plan: RunPlan, option: Option) -> str:
    time, seconds = option.time, option.seconds
    if time is None:
        return "unknown: this GPU has no row in the catalog; `accel-gpt2 bench` measures it"
    rate = f"{format_count(time.tokens_per_second)} tokens/s"
    if time.mfu is not None:
        rate += f", MFU {time.mfu:.0%}"
    if seconds is None or plan.data is None:
        return f"{rate}; the whole needs the data set's size, which training reads"
    models = num_models(option.recipe, plan.data.num_classes)
    what = "1 model" if models == 1 else f"{models} models, {PLACEMENTS[option.placement].title}"
    return (
        f"{format_seconds(seconds.expected)} ({format_seconds(seconds.low)} to "
        f"{format_seconds(seconds.high)}) for {what}; {rate}"
    )


def _bar(option: Option) -> "Text":
    """The memory of the fullest moment against what can be used, and a legend."""
    from rich.text import Text

    parts = memory_parts(option)
    usable = option.memory.usable_bytes or option.device.expected
    cells_per_byte = max(10, _width() - 4) / max(usable, option.device.expected)
    limit = round(cells_per_byte * usable)
    bar, legend = Text(), Text()
    total = 0
    for index, (name, size) in enumerate(parts):
        fill, colour = _FILLS[index % len(_FILLS)], _COLOURS[index % len(_COLOURS)]
        total += size
        bar.append(fill * (round(cells_per_byte * total) - len(bar)), style=colour)
        legend.append(f"\n  {fill} ", style=colour)
        legend.append(f"{format_bytes(size):>8}  {name}")
    bar.append("·" * (limit - len(bar)))
    bar = bar[:limit] + Text("|") + bar[limit:]
    legend.append(f"\n  | {format_bytes(usable):>8}  can be used")
    return Text("\n  ") + bar + legend


def _print_rejected(heading: str, rejected: Sequence[Rejected]) -> None:
    if not rejected:
        return
    _print(f"\n{heading}:", style="bold")
    print_table(
        {"recipe": "left", "memory": "right", "time": "right", "why not": "left"},
        [_row(x) for x in rejected],
    )


def _row(rejected: Rejected) -> list[str]:
    option = rejected.option
    if option is None:
        return [rejected.label, "", "", rejected.reason]
    seconds = "" if option.seconds is None else format_seconds(option.seconds.expected)
    label = f"{rejected.label}, {option.recipe.micro_batch_tokens:,} tokens"
    return [label, format_bytes(option.device.expected), seconds, rejected.reason]


def explain(plan: RunPlan, name: str) -> None:
    """Data: the sentences of the terms whose names hold `name`, and where they count.

    Raises:
        UsageError: when no term of the recommended recipe's memory or time is called so.
    """
    option = plan.recommended or plan.smallest
    memory, time = option.memory, option.time
    places: list[tuple[str, Sequence[MemoryTerm | TimeTerm]]] = [
        *((phase.name, phase.terms) for phase in memory.phases),
        ("RAM", memory.host),
        ("disk", memory.disk),
    ]
    if time is not None:
        places += [("time of the run", time.terms), ("time of a step", time.step_terms)]
    names = list(dict.fromkeys(term.name for _, terms in places for term in terms))
    chosen = [x for x in names if x.lower() == name.lower()]
    chosen = chosen or [x for x in names if name.lower() in x.lower()]
    if not chosen:
        raise UsageError(
            f"--explain {name}: no term is called so.{nearest(name, names)} There are "
            f"{', '.join(names)}."
        )
    for term_name in chosen:
        print_line(term_name)
        said: set[str] = set()
        for place, terms in places:
            for term in terms:
                if term.name == term_name:
                    again = term.why in said
                    said.add(term.why)
                    print_line(f"  {place}: {_amount(term)}{'' if again else f'. {term.why}'}")


def _amount(term: MemoryTerm | TimeTerm) -> str:
    if isinstance(term, MemoryTerm):
        return f"{format_bytes(term.bytes)} ({term.bytes:,} bytes)"
    return format_seconds(term.seconds)


def plan_document(plan: RunPlan, *, command: str, everything: bool) -> dict[str, object]:
    """The answer of `--json`.

    The memory and the time are those of the recommended recipe; where nothing fits, of what needs
    least. Of what was rejected `everything` lists each candidate, else one of each kind.
    """
    option = plan.recommended or plan.smallest
    rejected = plan.rejected if everything else plan.failures
    change = plan.nearest
    return {
        "fits": plan.recommended is not None,
        **_option_document(option),
        "profile": plan.profile.name,
        "data": None if plan.data is None else dataclasses.asdict(plan.data),
        "prefer": plan.prefer,
        "residuals": {name: dataclasses.asdict(x) for name, x in plan.residuals.items()},
        "command": command if plan.recommended is not None else None,
        "alternatives": [_rejected_document(x) for x in plan.alternatives],
        "rejected": [_rejected_document(x) for x in rejected],
        "nearest": None if change is None else {"change": change.change, **_summary(change.option)},
    }


def _option_document(option: Option) -> dict[str, object]:
    memory, time, seconds = option.memory, option.time, option.seconds
    return {
        "label": option.label,
        "verdict": option.verdict,
        "strategy": option.strategy.name,
        "placement": option.placement,
        "memory": {
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved.expected,
            "device_bytes": option.device.expected,
            "usable_bytes": memory.usable_bytes,
            "host_bytes": memory.host_bytes,
            "disk_bytes": memory.disk_bytes,
            "reserved_range": _range(memory.reserved),
            "device_range": _range(option.device),
            "peak_phase": memory.peak.name,
            "advice": memory.advice(option.recipe),
            "terms": [dataclasses.asdict(term) for term in memory.terms],
            "phases": [{"name": phase.name, "bytes": phase.bytes} for phase in memory.phases],
            "source": memory.source,
        },
        "time": {
            "seconds": None if seconds is None else seconds.expected,
            "low_seconds": None if seconds is None else seconds.low,
            "high_seconds": None if seconds is None else seconds.high,
            "cost_usd": option.cost_usd,
        }
        | ({} if time is None or seconds is None else _time_document(time)),
        "recipe": dataclasses.asdict(option.recipe),
        "origins": dict(option.resolved.origins),
    }


def _range(values: ByteRange) -> list[int]:
    return [values.low, values.high]


def _time_document(time: TimePlan) -> dict[str, object]:
    return {
        "step_seconds": time.step_seconds.expected,
        "tokens_per_second": time.tokens_per_second,
        "mfu": time.mfu,
        "num_steps": time.num_steps,
        "train_tokens": time.train_tokens,
        "terms": [dataclasses.asdict(term) for term in time.terms],
        "source": time.source,
    }


def _summary(option: Option) -> dict[str, object]:
    choices = {key: getattr(option.recipe, key) for key in CHOICES}
    return {
        **choices,
        "strategy": option.strategy.name,
        "placement": option.placement,
        "verdict": option.verdict,
        "device_bytes": option.device.expected,
        "seconds": None if option.seconds is None else option.seconds.expected,
        "cost_usd": option.cost_usd,
    }


def _rejected_document(rejected: Rejected) -> dict[str, object]:
    summary = {} if rejected.option is None else _summary(rejected.option)
    return {"label": rejected.label, "why": rejected.why, "reason": rejected.reason, **summary}


def show_table(rows: Sequence[TableRow], *, json: bool) -> None:
    """Data: the matrix of the requirements, and what became of their crosses."""
    crosses = crossed_cells(rows)
    if json:
        print_json(
            {
                "rows": [_table_document(row) for row in rows],
                "crosses": [
                    {
                        "title": cross.title,
                        "fits": option is not None,
                        "recipe": None if option is None else _summary(option),
                    }
                    for cross, option in crosses
                ],
            }
        )
        return
    for model, dataset in dict.fromkeys((row.model, row.dataset) for row in rows):
        shown = [row for row in rows if (row.model, row.dataset) == (model, dataset)]
        _print(f"\n{model} on {dataset}, {shown[0].num_classes} classes", style="bold")
        print_table(
            {
                "machine": "left",
                "one by one": "left",
                "GiB": "right",
                "one": "right",
                "all": "right",
                "at once": "left",
                " GiB": "right",
                " all": "right",
            },
            [_table_cells(row) for row in shown],
        )
    _print(f"\n{_wrapped(_TABLE_LEGEND)}\n")
    for cross, option in crosses:
        _print(_wrapped(f"On 16 GB, {cross.title}: {_cross_sentence(option)}"))


_TABLE_LEGEND = (
    "bf16: full fine-tuning with AdamW and fp32 weights under autocast. 8-bit: AdamW's states. "
    "ckpt: gradient checkpointing, of all blocks or some. xN: N models on each GPU at once. "
    "~: tight, with the most that it may need. "
    "✗: the requirements said that it does not fit; they gave no other figures."
)


def _table_cells(row: TableRow) -> list[str]:
    one_by_one, at_once = row.sequential, row.parallel
    seconds = None if one_by_one is None or one_by_one.seconds is None else one_by_one.seconds
    together = None if at_once is None or at_once.seconds is None else at_once.seconds
    return [
        row.profile,
        _code(one_by_one, row, crossed="one" in row.crossed),
        _gibibytes(one_by_one),
        "" if seconds is None else _short_time(seconds.expected / row.num_classes),
        "" if seconds is None else _short_time(seconds.expected),
        _code(at_once, row, crossed="parallel" in row.crossed),
        _gibibytes(at_once),
        "" if together is None else _short_time(together.expected),
    ]


def _code(option: Option | None, row: TableRow, *, crossed: bool) -> str:
    """A recipe in a narrow column."""
    mark = "✗ " if crossed else ""
    if option is None:
        return f"{mark}does not fit"
    recipe = option.recipe
    words = [recipe.mixed_precision.replace("_", " ")]
    if recipe.finetuning != "full":
        words = [{"lora": "LoRA", "qlora": "QLoRA"}[recipe.finetuning]]
    words += ["8-bit"] if recipe.optimizer == "adamw_8bit" else []
    words += ["ckpt"] if recipe.gradient_checkpointing else []
    num_gpus = PROFILES[row.profile].num_gpus
    at_once = models_per_gpu(option.placement, num_models=row.num_classes, num_gpus=num_gpus)
    words += [f"x{at_once}"] if at_once > 1 else []
    words += ["on one base"] if option.placement == "shared-base" else []
    return mark + " ".join(words)


def _gibibytes(option: Option | None) -> str:
    if option is None:
        return ""
    if option.verdict == "tight":
        return f"~{option.device.high / GIB:.1f}"
    return f"{option.device.expected / GIB:.1f}"


def _short_time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 3570 else f"{seconds / 3600:.1f} h"


def _cross_sentence(option: Option | None) -> str:
    if option is None:
        return "does not fit with any recipe."
    verdict = "fits" if option.verdict == "fits" else "is tight"
    return f"{verdict} with {option.label}: {_of_usable(option)}."


def _table_document(row: TableRow) -> dict[str, object]:
    return {
        "model": row.model,
        "profile": row.profile,
        "dataset": row.dataset,
        "num_classes": row.num_classes,
        "crossed": sorted(row.crossed),
        "sequential": None if row.sequential is None else _summary(row.sequential),
        "parallel": None if row.parallel is None else _summary(row.parallel),
    }
