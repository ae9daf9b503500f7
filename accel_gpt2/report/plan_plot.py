"""The memory of each recipe of a plan, stacked term by term, against the card's limit."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from accel_gpt2.plan.run_plan import AROUND_TERMS, Option, RunPlan, memory_parts
from accel_gpt2.report.drawing import DOTS_PER_INCH, LIGHT, Theme, png, short_label, style
from accel_gpt2.units import GIB

_MOST_BARS = 8
_LONGEST_LABEL = 60


def memory_bars(plan: RunPlan, theme: Theme = LIGHT) -> bytes:
    """PNG: one bar per recipe, the recommended one on top, then what fits, then what does not.

    Recipes that differ only in how a step is cut share a bar: that of the best of them.
    """
    options = drawn_options(plan)
    parts = [dict(memory_parts(option)) for option in options]
    # What lies around the terms comes last in every bar.
    names = sorted({name: None for part in parts for name in part}, key=AROUND_TERMS.__contains__)
    with style(theme):
        figure = Figure(
            figsize=(8.4, 1.9 + 0.42 * len(options)), dpi=DOTS_PER_INCH, layout="constrained"
        )
        axes = figure.subplots()
        left = [0.0] * len(options)
        for index, name in enumerate(names):
            widths = [part.get(name, 0) / GIB for part in parts]
            axes.barh(
                range(len(options)),
                widths,
                left=left,
                height=0.62,
                label=name,
                color=theme.series[index % len(theme.series)],
                hatch="///" if index >= len(theme.series) else None,
                edgecolor=theme.surface,
                linewidth=0.6,
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        usable = options[0].memory.usable_bytes
        if usable is not None:
            axes.axvline(usable / GIB, color=theme.ink, linewidth=1.4)
            axes.annotate(
                f"{usable / GIB:.1f} GiB can be used",
                (usable / GIB, -0.75),
                ha="center",
                va="bottom",
                annotation_clip=False,
            )
        axes.set_yticks(range(len(options)), _labels(options, plan))
        axes.set_ylim(len(options) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.04 * max(*left, (usable or 0) / GIB))
        axes.set_xlabel(f"GiB of memory: {plan.model.name} on {plan.profile.name}")
        figure.legend(loc="outside lower center", ncols=4)
        return png(figure)


def drawn_options(plan: RunPlan) -> list[Option]:
    """The recommended option, then the others that are worth a bar: one of each kind."""
    rejected = [*plan.alternatives, *plan.failures]
    options = [] if plan.recommended is None else [plan.recommended]
    options += [x.option for x in rejected if x.option is not None]
    return options[:_MOST_BARS]


def _labels(options: Sequence[Option], plan: RunPlan) -> list[str]:
    marks = {"fits": "", "tight": " (tight)", "does not fit": " (does not fit)"}
    labels = []
    for option in options:
        text = short_label(option.label, otherwise="recipe", longest=_LONGEST_LABEL)
        star = "★ " if option is plan.recommended else ""
        labels.append(f"{star}{text}{marks[option.verdict]}")
    return labels
