"""What `plan` prints: the recommended recipe against the card, what comes next, and why not."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from accel_gpt2.cli.hardware import describe_profile
from accel_gpt2.cli.output import print_line, print_table
from accel_gpt2.errors import UsageError, nearest
from accel_gpt2.plan.absent import WHEN_THERE
from accel_gpt2.plan.memory import MemoryTerm
from accel_gpt2.plan.packing import packs_rows
from accel_gpt2.plan.placement import PLACEMENTS, num_models
from accel_gpt2.plan.run_plan import Option, Rejected, RunPlan, memory_parts
from accel_gpt2.plan.throughput import TimeTerm
from accel_gpt2.terminal import printable
from accel_gpt2.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.text import Text

_FEW = 3  # of what fits as well; --all shows every candidate

# Parts of the bar, from left to right; told apart without colours too.
_FILLS = "█▓▒░"
_COLOURS = ("blue", "dark_orange", "green", "magenta", "cyan", "yellow", "red")


def show_plan(plan: RunPlan, *, command: str, everything: bool) -> None:
    """Data: the plan for a reader, as wide as the terminal; plain where stdout is none."""
    option = plan.recommended or plan.smallest
    print_styled(wrapped(_title(plan)), style="bold")
    if plan.recommended is None:
        print_styled(
            f"\nNothing that was asked for fits. Nearest: {option.label}", style="bold red"
        )
    else:
        print_styled(f"\nRecommended: {option.label}", style="bold green")
    for name, text in _facts(plan, option):
        print_styled(wrapped(text, name=f"  {name:<8}"))
    print_styled(_bar(option))
    if everything:
        _print_rejected("All other candidates, best first", plan.rejected)
    else:
        _print_rejected("Next best", plan.alternatives[:_FEW])
        _print_rejected("Rejected", plan.failures)
    if plan.recommended is not None:
        print_styled("\nRun it:", style="bold")
        print_styled(f"  {command}")


def print_styled(text: "str | Text", *, style: str = "") -> None:
    """Data: text in bold or a colour where stdout is a terminal."""
    from rich.console import Console
    from rich.text import Text

    if isinstance(text, str):
        text = Text("\n".join(map(printable, text.split("\n"))), style=style)
    # Long lines are left to the terminal to break, so that commands can be copied.
    Console(highlight=False, width=_width()).print(text, soft_wrap=True)


def wrapped(text: str, *, name: str = "") -> str:
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
    packed = packs_rows(dataclasses.replace(recipe, placement=option.placement))
    rows = "tokens, in rows without padding" if packed else "padded tokens"
    facts = [
        ("memory", f"{of_usable(option)}: {option.verdict}"),
        ("peak", memory.advice(recipe)),
        ("step", f"{batch}, in micro batches of {recipe.micro_batch_tokens:,} {rows}"),
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
        for size, name in ((option.host_bytes, "RAM"), (option.disk_bytes, "disk"))
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


def of_usable(option: Option) -> str:
    """What a device holds, with its range, and whether that fits."""
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
    print_styled(f"\n{heading}:", style="bold")
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
    """Data: the sentences of the terms whose names hold `name`, and where they count; of one that
    the recommended recipe has not, when it is there.

    Raises:
        UsageError: when no term of a plan is called so.
    """
    option = plan.recommended or plan.smallest
    memory, time = option.memory, option.time
    places: list[tuple[str, Sequence[MemoryTerm | TimeTerm]]] = [
        *((phase.name, phase.terms) for phase in memory.phases),
        ("RAM", option.host),
        ("disk", option.disk),
    ]
    if time is not None:
        places += [("time of the run", time.terms), ("time of a step", time.step_terms)]
    found = dict.fromkeys(term.name for _, terms in places for term in terms)
    names = list(found | dict.fromkeys(WHEN_THERE))
    chosen = [x for x in names if x.lower() == name.lower()]
    chosen = chosen or [x for x in names if name.lower() in x.lower()]
    if not chosen:
        raise UsageError(
            f"--explain {name}: no term is called so.{nearest(name, names)} There are "
            f"{', '.join(names)}."
        )
    for term_name in chosen:
        print_line(term_name)
        if term_name not in found:
            print_line(f"  none with this recipe: it is there {WHEN_THERE[term_name]}")
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
