"""What `plan --json` prints."""

import dataclasses

from accel_gpt2.plan.candidates import CHOICES
from accel_gpt2.plan.memory import ByteRange
from accel_gpt2.plan.run_plan import Option, Rejected, RunPlan
from accel_gpt2.plan.throughput import TimePlan


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
        "nearest": None if change is None else {"change": change.change, **summary(change.option)},
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
            "host_bytes": option.host_bytes,
            "disk_bytes": option.disk_bytes,
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


def summary(option: Option) -> dict[str, object]:
    """What was chosen, and what it comes to."""
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
    choice = {} if rejected.option is None else summary(rejected.option)
    return {"label": rejected.label, "why": rejected.why, "reason": rejected.reason, **choice}
