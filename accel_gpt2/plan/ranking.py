"""Which of two options is better, and the one reason why the other is not recommended."""

import functools
import math
from collections.abc import Sequence

from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.plan.candidates import Preference
from accel_gpt2.plan.memory import ByteRange, MemoryPlan, Verdict
from accel_gpt2.plan.run_plan import Option, Rejected, Why
from accel_gpt2.units import format_bytes, format_seconds

FAITHFUL: frozenset[Preference] = frozenset({"faithful", "quality"})

_SAME_SECONDS = 1.01  # a plan of the time cannot tell less apart

# Who exchanges weights at every block wants to be this much faster: nothing is published of what
# that costs GPT-2 without NVLink, and a class for each GPU exchanges nothing.
_SHARDS_WANT = 1.15


def verdict_of(
    memory: MemoryPlan, device: ByteRange, host_bytes: int, profile: HardwareProfile
) -> Verdict:
    """Whether all that a device holds at once fits it, and the rest the host."""
    if lacks_host_memory(host_bytes, profile):
        return "does not fit"
    if memory.usable_bytes is None or device.high <= memory.usable_bytes:
        return "fits"
    return "tight" if device.expected <= memory.usable_bytes else "does not fit"


def lacks_host_memory(host_bytes: int, profile: HardwareProfile) -> bool:
    """Whether the machine has less RAM than a plan for its GPUs takes."""
    return profile.gpu is not None and host_bytes > profile.host_memory_bytes


def best_option(options: Sequence[Option], prefer: Preference) -> Option | None:
    """What is recommended of these; None where nothing fits."""
    possible = [x for x in options if x.verdict != "does not fit"]
    best = min(possible, key=functools.partial(_rank, prefer=prefer), default=None)
    if best is None or best.verdict == "tight" or prefer == "memory":
        return best
    # What is as fast as can be told leaves memory free, by steps of a twentieth of what there is.
    alike = [
        x
        for x in possible
        if x.group == best.group
        and x.verdict == "fits"
        and _slowness(x)[0] <= _SAME_SECONDS * _slowness(best)[0]
    ]
    step = max(1, (best.memory.usable_bytes or 0) // 20)
    return min(
        alike,
        key=lambda x: (x.device.expected // step, *_slowness(x)[1:]),
    )


def _rank(option: Option, prefer: Preference) -> tuple[float, ...]:
    """The smaller the better. Of tight ones the smallest, since they may not fit after all."""
    safety = option.device.high if option.verdict == "tight" else 0
    if prefer == "memory":
        return option.device.expected, option.level, *_slowness(option)
    if prefer == "speed":
        return safety, *_slowness(option), option.level
    strategy = option.strategy
    # Where both fit, ZeRO was slower and larger than DDP (DeepSpeed #2992), whatever is computed.
    zero = strategy.backend == "deepspeed"
    seconds, *others = _slowness(option)
    wanted = seconds * (_SHARDS_WANT if strategy.is_sharded else 1.0)
    return strategy.offloads_optimizer, option.level, safety, zero, wanted, *others


def _slowness(option: Option) -> tuple[float, ...]:
    """Where a GPU's speed is unknown, larger micro batches without recomputation are faster."""
    seconds = 0.0 if option.time is None else option.time.total.expected * option.time_share
    recomputes = 0.0
    if option.recipe.gradient_checkpointing:
        recomputes = option.recipe.checkpointed_layers or math.inf
    return seconds, recomputes, -option.recipe.micro_batch_tokens


def order_of_rejected(option: Option, prefer: Preference) -> tuple[float, ...]:
    """What fits, best first; then what does not, and of each level what needs least first."""
    if option.verdict != "does not fit":
        return (0, *_rank(option, prefer))
    return 1, option.level, option.device.expected


def rejection(
    option: Option, best: Option | None, *, prefer: Preference, profile: HardwareProfile
) -> Rejected:
    """Why an option is not recommended, when `best` is."""
    why, reason = _why_not(option, best, prefer, profile)
    return Rejected(label=option.label, why=why, reason=reason, option=option)


def _why_not(
    option: Option, best: Option | None, prefer: Preference, profile: HardwareProfile
) -> tuple[Why, str]:
    """The one reason why an option is not recommended: the first that holds."""
    if option.verdict == "does not fit":
        return "does not fit", shortage(option, profile)
    assert best is not None, "what fits would be recommended"
    if prefer == "memory" and option.device.expected > best.device.expected:
        more = format_bytes(option.device.expected)
        return "larger", f"needs {more}, and {format_bytes(best.device.expected)} is enough"
    if prefer in FAITHFUL and (
        option.strategy.offloads_optimizer and not best.strategy.offloads_optimizer
    ):
        return "not needed", "steps on the host, and something fits without"
    if prefer in FAITHFUL and option.level > best.level:
        return "less faithful", "less faithful than what fits"
    if option.verdict == "tight":
        return "tight", f"may need up to {format_bytes(option.device.high)}"
    if prefer in FAITHFUL:
        if option.strategy.backend == "deepspeed" != best.strategy.backend:
            return "not needed", "ZeRO is for what does not fit without it"
        if option.strategy.is_sharded and not best.strategy.is_sharded:
            return "not needed", f"exchanges weights, and is not {_SHARDS_WANT - 1:.0%} faster"
    return "slower", _slower(option, best)


def shortage(option: Option, profile: HardwareProfile) -> str:
    """What an option needs, and what there is."""
    memory = option.memory
    if lacks_host_memory(option.host_bytes, profile):
        needed, there, kind = option.host_bytes, profile.host_memory_bytes, "host memory"
    else:
        needed, there = option.device.expected, memory.usable_bytes or 0
        kind = "memory" if profile.gpu is None else "GPU memory"
    return f"needs {format_bytes(needed)} of {kind}, and {format_bytes(there)} can be used"


def _slower(option: Option, best: Option) -> str:
    if option.time is None or best.time is None:
        return "is slower"
    seconds = option.time.total.expected * option.time_share
    fastest = best.time.total.expected * best.time_share
    if seconds <= _SAME_SECONDS * fastest:
        return "is not faster by more than 1%"
    if option.seconds is None or best.seconds is None:
        return f"is {seconds / fastest:.2f} times slower"
    return f"takes {format_seconds(seconds)}, against {format_seconds(fastest)}"
