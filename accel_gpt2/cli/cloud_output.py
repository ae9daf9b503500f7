"""How `cloud launch` shows what it is about to start."""

from typing import TYPE_CHECKING

from accel_gpt2.catalog.engines import SPOT_CONTROLLER_USD_PER_HOUR
from accel_gpt2.cli.cloud_prepare import Prepared
from accel_gpt2.cli.output import print_line, warn
from accel_gpt2.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from accel_gpt2.plan.run_plan import Option


def launch_document(prepared: Prepared) -> dict[str, object]:
    job, quote, option = prepared.job, prepared.quote, prepared.option
    return {
        "name": job.name,
        "provider": job.cloud.provider,
        "gpu": job.gpu,
        "num_gpus": job.num_gpus,
        "usd_per_hour": job.usd_per_hour,
        "usd_total": quote.usd_total,
        "budget_usd": job.budget_usd,
        "run_seconds": quote.run_seconds,
        "setup_seconds": quote.setup_seconds,
        "spent_usd": job.spent_usd,
        "left_seconds": job.left_seconds,
        "as_of": quote.as_of.isoformat(),
        "source": quote.source,
        "plan": None if option is None else option.label,
        "memory_bytes": None if option is None else option.device.expected,
        "verdict": None if option is None else option.verdict,
        "run_directory": str(prepared.run_directory),
        "train_command": job.train_command,
        "uploads": [*(["package"] if prepared.sources else []), *prepared.shipped],
        "files": prepared.files,
    }


def show_launch(prepared: Prepared, *, contents: bool) -> None:
    """Data: what would happen, with the files' contents or only their places."""
    from accel_gpt2.cloud.ledger import launch_directory

    job, quote, option = prepared.job, prepared.quote, prepared.option
    machine = f"{job.num_gpus} x {job.gpu}" if job.num_gpus > 1 else job.gpu
    spot = ", spot" if job.spot else ""
    spent = f", of which {format_usd(job.spent_usd)} are spent" if job.spent_usd else ""
    watched = (
        f", of it ${SPOT_CONTROLLER_USD_PER_HOUR:.2f} for the machine that brings it back"
        if job.spot
        else ""
    )
    training = format_seconds(quote.run_seconds)
    rows = {
        "Training": f"{prepared.recipe.model} on {prepared.recipe.dataset}",
        "Machine": f"{machine} from {job.cloud.provider}{spot}, as {job.name}",
        "Plan": _fit(option) if option is not None else "not planned, because --hours is given",
        "Time": f"{training}, and {format_seconds(quote.setup_seconds)} around it",
        "Price": f"${quote.usd_per_hour:g} an hour{watched} ({quote.as_of}, {quote.source})",
        "Estimate": (
            f"{format_usd(quote.usd_total)} of a budget of {format_usd(job.budget_usd)}{spent}"
        ),
        "Ends": f"after {format_seconds(max(0, job.left_seconds))} at the latest, saved",
        "Results": str(prepared.run_directory),
    }
    if job.kept is not None:
        rows["Kept"] = f"{job.bucket}, every few minutes"
    for title, text in rows.items():
        print_line(f"{title:<9} {text}")
    for name, text in prepared.files.items():
        if contents:
            print_line(f"\n# {name}\n{text.rstrip()}")
        elif name != "command.txt":
            print_line(f"{'File':<9} {launch_directory(job.name) / name}")
    if not contents:
        print_line("$ " + prepared.files["command.txt"].strip().replace("\n", "\n$ "))
    if quote.freshness != "fresh":
        warn(f"The price is {quote.age_days} days old; `accel-gpt2 cost refresh` asks for today's.")


def _fit(option: "Option") -> str:
    usable = option.memory.usable_bytes
    there = "" if usable is None else f" of {format_bytes(usable)}"
    memory = f"{format_bytes(option.device.expected)}{there}"
    return f"{option.label}; {memory} ({option.verdict})"


def format_usd(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 0.01 else f"${amount:.4f}"
