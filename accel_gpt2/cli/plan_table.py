"""What `plan --table` prints: the matrix of the requirements."""

from collections.abc import Sequence

from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.cli.output import print_json, print_table
from accel_gpt2.cli.plan_document import summary
from accel_gpt2.cli.plan_output import of_usable, print_styled, wrapped
from accel_gpt2.plan.placement import models_per_gpu
from accel_gpt2.plan.run_plan import Option
from accel_gpt2.plan.table import TableRow, crossed_cells
from accel_gpt2.units import GIB

_TABLE_LEGEND = (
    "bf16: full fine-tuning with AdamW and fp32 weights under autocast. 8-bit: AdamW's states. "
    "ckpt: gradient checkpointing, of all blocks or some. xN: N models on each GPU at once. "
    "~: tight, with the most that it may need. "
    "✗: the requirements said that it does not fit; they gave no other figures."
)


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
                        "recipe": None if option is None else summary(option),
                    }
                    for cross, option in crosses
                ],
            }
        )
        return
    for model, dataset in dict.fromkeys((row.model, row.dataset) for row in rows):
        shown = [row for row in rows if (row.model, row.dataset) == (model, dataset)]
        print_styled(f"\n{model} on {dataset}, {shown[0].num_classes} classes", style="bold")
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
    print_styled(f"\n{wrapped(_TABLE_LEGEND)}\n")
    for cross, option in crosses:
        print_styled(wrapped(f"On 16 GB, {cross.title}: {_cross_sentence(option)}"))


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
    return f"{verdict} with {option.label}: {of_usable(option)}."


def _table_document(row: TableRow) -> dict[str, object]:
    return {
        "model": row.model,
        "profile": row.profile,
        "dataset": row.dataset,
        "num_classes": row.num_classes,
        "crossed": sorted(row.crossed),
        "sequential": None if row.sequential is None else summary(row.sequential),
        "parallel": None if row.parallel is None else summary(row.parallel),
    }
