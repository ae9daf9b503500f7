"""Ask for a trace: the process that asks loads no torch, and what was traced once is remembered."""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accel_gpt2.data.cache import cached_file, content_key, find_cached
from accel_gpt2.data.weights import local_model
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.versions import installed_versions

# The phases of a step, in order, as `plan.memory` has them too.
PHASES = (
    "forward",
    "loss backward",
    "block backward",
    "embedding backward",
    "optimizer step",
    "evaluation",
    "checkpoint saving",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One training step to trace.

    A micro batch holds as many documents of `longest_tokens` (BOS and EOS included) as
    `micro_batch_tokens` (None: the recipe's) allow, and at least one. `num_micro_batches` make a
    step: with two or more there are gradients already while the next one goes through.

    `num_classes` are those of a classification head or a hybrid. `n_layer` and `vocab_size` replace
    the model's own. `stock_loss` is transformers' own loss under accelerate in place of ours.
    `device` "cpu" counts what a training on a CPU allocates. `whole` traces all blocks even where
    two shallow models would do.
    """

    recipe: TrainRecipe
    longest_tokens: int
    micro_batch_tokens: int | None = None
    num_micro_batches: int = 1
    num_classes: int = 2
    n_layer: int | None = None
    vocab_size: int | None = None
    stock_loss: bool = False
    device: Literal["gpu", "cpu"] = "gpu"
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedMemory:
    """What the step holds on its device at most, in bytes.

    On a GPU every tensor counts as what CUDA's allocator gives it, a multiple of 512 bytes, so
    `peak_bytes` is what `torch.cuda.max_memory_allocated` would say. `phases` are the peaks of
    those of `PHASES` that the training has.
    """

    phases: Mapping[str, int]
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    num_parameters: int
    num_trained_parameters: int

    @property
    def peak_bytes(self) -> int:
        """Of the fullest phase."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The fullest phase."""
        return max(self.phases, key=lambda name: self.phases[name])


def trace_memory(request: TraceRequest) -> TracedMemory:
    """The memory of one step: `trace_all` with one request."""
    return trace_all([request])[0]


def trace_all(
    requests: Sequence[TraceRequest], *, timeout_seconds: float = 600.0
) -> list[TracedMemory]:
    """The memory of several steps, traced in one process of their own, or earlier.

    That process takes about ten seconds to load torch, and then a few for each request. What was
    traced once, with these versions of the libraries and this code, comes from the cache.

    Raises:
        UserError: with the reason, when a step cannot be traced, or not in time.
    """
    requests = [normalized(request) for request in requests]
    keys = [_key(request) for request in requests]
    found = {key: find_cached(_KIND, key, _SUFFIX) for key in keys}
    missing = {k: r for k, r in zip(keys, requests, strict=True) if found[k] is None}
    if missing:
        answers = _ask(list(missing.values()), timeout_seconds)
        for key, answer in zip(missing, answers, strict=True):
            text = json.dumps(answer)
            found[key] = cached_file(_KIND, key, _SUFFIX, functools.partial(_write, text=text))
    return [_read(path) for key in keys if (path := found[key]) is not None]


_KIND, _SUFFIX = "traces", ".json"


def _write(path: Path, *, text: str) -> None:
    path.write_text(text, "utf-8")


def _read(path: Path) -> TracedMemory:
    return TracedMemory(**json.loads(path.read_text("utf-8")))


# What a step's memory does not depend on.
_UNRELATED = (
    "init", "tokenizer", "tokenizer_vocab_size", "dataset", "text_field", "label_field",
    "class_names", "train_split", "test_split", "validation_fraction", "validation_documents",
    "train_documents_per_class", "priors", "discriminative_weight", "lora_alpha", "epochs",
    "max_steps", "global_batch_tokens", "global_batch_size", "learning_rate",
    "min_learning_rate_fraction", "lr_schedule", "warmup_fraction", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "tf32", "seed", "evaluate_every_steps",
    "profile", "placement", "compile", "checkpoint_every_steps", "keep_checkpoints",
    "log_every_steps", "max_time_seconds", "price_usd_per_hour", "budget_usd", "trackers",
)  # fmt: skip


def normalized(request: TraceRequest) -> TraceRequest:
    """The request without what a step's memory does not depend on: equal steps, equal requests."""
    defaults = TrainRecipe()
    same = {name: getattr(defaults, name) for name in _UNRELATED}
    recipe = dataclasses.replace(
        request.recipe,
        **same,
        max_length=request.longest_tokens,
        micro_batch_tokens=request.micro_batch_tokens or request.recipe.micro_batch_tokens,
    )
    return dataclasses.replace(request, recipe=recipe, micro_batch_tokens=None)


def _key(request: TraceRequest) -> str:
    directory = local_model(request.recipe.model)
    config = None if directory is None else (directory / "config.json").read_text("utf-8")
    return content_key(dataclasses.asdict(request), config, installed_versions(), _code())


@functools.cache
def _code() -> str:
    """A digest of what a trace runs."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("catalog", "data", "trace", "train"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _ask(requests: Sequence[TraceRequest], timeout_seconds: float) -> list[dict[str, Any]]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "accel_gpt2.trace"],
            input=json.dumps([dataclasses.asdict(request) for request in requests]),
            # A GPU in the machine is left to those who compute.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{requests[0].recipe.model} could not be traced in {timeout_seconds:.0f} s; try again "
            "when the machine has less to do."
        ) from None
    if done.returncode != 0:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no reason is given")
        raise UserError(
            f"The trace of {requests[0].recipe.model} ended with exit code {done.returncode} "
            f"({last[:300]}); type `accel-gpt2 doctor` to see whether torch works here."
        )
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    for answer in answers:
        if "error" in answer:
            raise UserError(answer["error"])
    return answers
