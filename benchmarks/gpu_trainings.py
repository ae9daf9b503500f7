"""Trainings of ours, of transformers' Trainer and of nanoGPT on one device, timed alike."""

import dataclasses
import gc
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from one_training import optimizer_steps

from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.catalog.gpus import GpuSpec, find_gpu
from accel_gpt2.catalog.models import MODELS, ModelSpec
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.plan.flops import peak_flops_per_second, train_flops_per_token
from accel_gpt2.recipe import Finetuning, TrainRecipe
from accel_gpt2.trace.step import autocast
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.schedule import BatchSchedule
from accel_gpt2.units import GIB

Side = Literal["ours", "Trainer padded", "Trainer grouped", "Trainer flattened", "nanoGPT"]

WARM_UP_STEPS = 4
_ALL_STEPS = 200  # documents for so many: grouping by length wants a pool of them
_SEED = 0
_LENGTHS = {"AG News": "ag_news", "IMDB": "imdb"}  # and a number: all of that length


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large trainings are: those of the benchmark, or of its rehearsal."""

    step_tokens: int
    timed_seconds: float
    vocab_size: int
    longest: int

    @classmethod
    def of(cls, sizes: str) -> "Scale":
        """By the name of `--sizes`."""
        if sizes == "tiny":
            return cls(step_tokens=256, timed_seconds=0.2, vocab_size=512, longest=64)
        return cls(step_tokens=8192, timed_seconds=4.0, vocab_size=50257, longest=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training."""

    side: Side
    model: str
    lengths: str
    finetuning: Finetuning = "full"
    compiled: bool = False
    packed: bool = True

    @property
    def label(self) -> str:
        """One line for a table."""
        lora = ", LoRA" if self.finetuning == "lora" else ""
        compiled = ", compiled" if self.compiled else ""
        padded = "" if self.packed else ", padded"
        return f"{self.model}, {self.lengths}{lora}: {self.side}{compiled}{padded}"

    @property
    def accumulation(self) -> int:
        """Micro batches of a step, the same on all sides: large models leave less memory."""
        return {"gpt2-large": 2, "gpt2-xl": 4}.get(self.model, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a training measured; `note` says why there is nothing where there is nothing."""

    case: Case
    tokens_per_second: float | None
    mfu: float | None
    peak_bytes: int | None
    warm_up_seconds: float
    num_steps: int
    note: str = ""


class Clock:
    """Tokens and seconds of the steps after the warm-up, with the device's work done at both ends.

    Args:
        wanted_seconds: a training is long enough after so many, and eight steps.
    """

    def __init__(self, device: torch.device, wanted_seconds: float) -> None:
        self._device = device
        self._wanted_seconds = wanted_seconds
        self._created = time.monotonic()
        self._started = 0.0
        self.num_steps = -WARM_UP_STEPS
        self.seconds = 0.0
        self.warm_up_seconds = 0.0

    def step_is_queued(self) -> bool:
        """Whether that was the last one that is wanted."""
        self.num_steps += 1
        if self.num_steps == 0:
            synchronize(self._device)
            self._started = time.monotonic()
            self.warm_up_seconds = self._started - self._created
        if self.num_steps < 8:
            return False
        if time.monotonic() - self._started < self._wanted_seconds and self.num_steps < 150:
            return False
        synchronize(self._device)
        self.seconds = time.monotonic() - self._started
        return True


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """The device, and the sides that train on it."""

    def __init__(self, device: torch.device, scale: Scale, nanogpt: Path | None) -> None:
        self.device = device
        self.scale = scale
        self.nanogpt = nanogpt
        self.gpu: GpuSpec | None = None
        self.name = f"{platform.machine()} CPU"
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.gpu = find_gpu(properties.name, properties.total_memory)
            self.name = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
        self.precision: Literal["no", "bf16"] = "bf16" if device.type == "cuda" else "no"

    def recipe(self, case: Case) -> TrainRecipe:
        """The recipe's defaults but for what the comparison fixes."""
        return TrainRecipe(
            model=case.model,
            init="scratch",
            dropout=0.0,
            max_length=self.scale.longest + 1,
            finetuning=case.finetuning,
            global_batch_tokens=self.scale.step_tokens,
            # Padded, few of a step are alike in length: several micro batches waste less.
            micro_batch_tokens=max(
                self.scale.longest,
                self.scale.step_tokens // (case.accumulation if case.packed else 4),
            ),
            packing="on" if case.packed else "off",
            mixed_precision=self.precision,
            compile="on" if case.compiled else "off",
            evaluate_every_steps=10**6,
            trackers=(),
        )

    def documents(self, lengths: str) -> TokenizedDocuments:
        """Random tokens in documents of a data set's lengths, or all of one length, which counts
        predicted tokens."""
        random = np.random.default_rng(_SEED)
        wanted = _ALL_STEPS * self.scale.step_tokens
        if lengths.isdigit():
            sizes = np.full(wanted // int(lengths), int(lengths) + 1)
        else:
            tokens, counts = map(
                np.array, zip(*DATASETS[_LENGTHS[lengths]].token_lengths, strict=True)
            )
            kept = np.minimum(tokens, self.scale.longest) + 1
            weights = counts / counts.sum()
            number = math.ceil(wanted / float((kept - 1) @ weights))
            sizes = random.choice(kept, size=number, p=weights)
        offsets = np.concatenate(([0], np.cumsum(sizes[:-1]))).astype(np.int64)
        number = len(sizes)
        return TokenizedDocuments(
            tokens=random.integers(0, self.scale.vocab_size, sizes.sum()).astype(np.uint16),
            offsets=offsets,
            lengths=sizes.astype(np.int32),
            labels=np.zeros(number, dtype=np.int64),
            num_bytes=4 * sizes.astype(np.int64),
            rows=np.arange(number),
            truncated=np.zeros(number, dtype=np.bool_),
        )

    def model(self, case: Case) -> LanguageModel:
        """Ours, with the weights of the seed."""
        with self.device:  # random numbers are drawn there: a CPU takes a minute for the largest
            model = build_model(
                self.recipe(case),
                vocab_size=self.scale.vocab_size,
                eos_token_id=self.scale.vocab_size - 1,
            )
        assert isinstance(model, LanguageModel)
        return model.to(self.device)

    def stock_model(self, case: Case) -> Any:
        """transformers' own, as its examples build it, with LoRA where that is trained."""
        from transformers import GPT2Config, GPT2LMHeadModel

        spec = self.spec(case.model)
        config = GPT2Config(
            vocab_size=spec.vocab_size, n_positions=spec.n_positions, n_embd=spec.n_embd,
            n_layer=spec.n_layer, n_head=spec.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        torch.manual_seed(_SEED)
        with self.device:
            model: Any = GPT2LMHeadModel(config)
        if case.finetuning == "lora":
            from peft import LoraConfig, get_peft_model

            recipe = self.recipe(case)
            lora = LoraConfig(
                r=recipe.lora_rank, lora_alpha=int(recipe.lora_alpha), fan_in_fan_out=True,
                target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM",
            )  # fmt: skip
            model = get_peft_model(model, lora)
        return model.to(self.device)

    def spec(self, model: str) -> ModelSpec:
        """The catalog's row, with the vocabulary of this benchmark."""
        return dataclasses.replace(MODELS[model], vocab_size=self.scale.vocab_size)

    def losses(self, model: str) -> tuple[float, float]:
        """The mean loss of a token of the same documents, ours and transformers', same weights."""
        case = Case(side="ours", model=model, lengths="AG News")
        ours, stock = self.model(case), self.stock_model(case)
        stock.load_state_dict(ours.model.state_dict())
        documents = self.documents("AG News")
        ours.pack_rows(self.recipe(case), self.device)
        batch = [documents.document(i) for i in range(16)]
        labels = np.zeros(len(batch), dtype=np.int64)
        num_targets = sum(len(x) - 1 for x in batch)
        theirs = 0.0
        with torch.no_grad(), autocast(self.recipe(case), self.device):
            arrays = to_device(ours.collate(batch, labels, epoch=0), self.device)
            own = float(ours(*arrays)) / num_targets
            for document in batch:
                ids = torch.from_numpy(document.astype(np.int64))[None].to(self.device)
                theirs += float(stock(input_ids=ids, labels=ids).loss) * (len(document) - 1)
        return own, theirs / num_targets

    def measure(self, case: Case) -> Measured:
        """Train for some seconds, with nothing left of what was trained before."""
        self._forget()
        clock = Clock(self.device, self.scale.timed_seconds)
        documents = self.documents(case.lengths)
        run: Callable[[Case, TokenizedDocuments, Clock], int] = {
            "ours": self._ours,
            "nanoGPT": self._nanogpt,
        }.get(case.side, self._trainer)
        try:
            tokens = run(case, documents, clock)
        except torch.OutOfMemoryError:
            return Measured(
                case=case, tokens_per_second=None, mfu=None, peak_bytes=None,
                warm_up_seconds=0.0, num_steps=0, note="out of memory",
            )  # fmt: skip
        finally:
            if case.compiled:
                torch._dynamo.reset()
            self._forget()
        rate = tokens / clock.seconds
        return Measured(
            case=case,
            tokens_per_second=rate,
            mfu=self._mfu(case, documents, rate),
            peak_bytes=self._peak,
            warm_up_seconds=clock.warm_up_seconds,
            num_steps=clock.num_steps,
        )

    def _mfu(self, case: Case, documents: TokenizedDocuments, rate: float) -> float | None:
        peak = peak_flops_per_second(self.gpu, self.precision)
        if peak is None:
            return None
        spec = self.spec(case.model)
        tokens = documents.lengths.astype(np.float64) - 1
        flops = train_flops_per_token(
            n_layer=spec.n_layer,
            n_embd=spec.n_embd,
            vocab_size=spec.vocab_size,
            context_tokens=float((tokens**2).sum() / tokens.sum()),
            frozen_base=case.finetuning != "full",
        )
        return rate * flops / peak

    def _forget(self) -> None:
        self._peak: int | None = None
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _steps(
        self, case: Case, documents: TokenizedDocuments
    ) -> AbstractContextManager[Iterator[int]]:
        """Our loop, about to train."""
        recipe = self.recipe(case)
        schedule = BatchSchedule(documents.lengths, recipe, total_steps=10**6)
        return optimizer_steps(self.model(case), documents, recipe, schedule=schedule, gpu=self.gpu)

    def _ours(self, case: Case, documents: TokenizedDocuments, clock: Clock) -> int:
        tokens = 0
        with self._steps(case, documents) as steps:
            while True:
                measured = clock.num_steps >= 0
                num_targets = next(steps)
                if measured:
                    tokens += num_targets
                if clock.step_is_queued():
                    return tokens

    def _trainer(self, case: Case, documents: TokenizedDocuments, clock: Clock) -> int:
        from transformers import (
            DataCollatorWithFlattening,
            Trainer,
            TrainerCallback,
            TrainingArguments,
        )

        tokens_of_batches: list[int] = []
        flattened = DataCollatorWithFlattening()

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
            sizes = [len(row["input_ids"]) for row in rows]
            tokens_of_batches.append(sum(sizes) - len(sizes))
            if case.side == "Trainer flattened":
                return dict(flattened(rows))
            ids = torch.zeros(len(rows), max(sizes), dtype=torch.int64)
            labels = torch.full_like(ids, -100)
            for i, row_of_ids in enumerate(rows):
                ids[i, : sizes[i]] = labels[i, : sizes[i]] = torch.tensor(row_of_ids["input_ids"])
            mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
            return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}

        class Timing(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                control.should_training_stop = clock.step_is_queued()

        mean = float((documents.lengths - 1).mean())
        recipe = self.recipe(case)
        rows = [{"input_ids": documents.document(i).tolist()} for i in range(len(documents))]
        grouped = "group_by_length" if case.side == "Trainer grouped" else "random"
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=self.stock_model(case),
                args=TrainingArguments(
                    output_dir=folder,
                    use_cpu=self.device.type == "cpu",
                    bf16=self.precision == "bf16",
                    max_steps=10**6,
                    per_device_train_batch_size=max(
                        1, round(self.scale.step_tokens / mean / case.accumulation)
                    ),
                    gradient_accumulation_steps=case.accumulation,
                    train_sampling_strategy=grouped,
                    learning_rate=recipe.learning_rate,
                    lr_scheduler_type="constant",
                    weight_decay=recipe.weight_decay,
                    adam_beta2=recipe.adam_beta2,
                    max_grad_norm=recipe.max_grad_norm,
                    torch_compile=case.compiled,
                    logging_steps=10,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=rows,
                data_collator=collate,
                callbacks=[Timing()],
            )
            trainer.log = lambda *args, **others: None
            trainer.train()
        # One batch is asked for ahead, so they are counted from the front.
        first = WARM_UP_STEPS * case.accumulation
        return sum(tokens_of_batches[first : first + clock.num_steps * case.accumulation])

    def _nanogpt(self, case: Case, documents: TokenizedDocuments, clock: Clock) -> int:
        """The steps of its train.py, whose rows are cut anywhere from one stream: another
        objective, all of whose tokens count."""
        assert self.nanogpt is not None
        sys.path.insert(0, str(self.nanogpt))
        from model import GPT, GPTConfig  # type: ignore[import-not-found]

        spec = self.spec(case.model)
        recipe = self.recipe(case)
        torch.manual_seed(_SEED)
        vocab_size = 64 * math.ceil(spec.vocab_size / 64)
        with self.device:
            model: Any = GPT(
                GPTConfig(
                    n_layer=spec.n_layer,
                    n_head=spec.n_head,
                    n_embd=spec.n_embd,
                    block_size=spec.n_positions,
                    bias=True,
                    vocab_size=vocab_size,
                    dropout=0.0,
                )
            )
        betas = (recipe.adam_beta1, recipe.adam_beta2)
        optimizer = model.configure_optimizers(
            recipe.weight_decay, recipe.learning_rate, betas, self.device.type
        )
        forward = torch.compile(model) if case.compiled else model
        length = int(case.lengths)
        num_rows = max(1, self.scale.step_tokens // length // case.accumulation)
        stream = torch.from_numpy(documents.tokens.astype(np.int64))

        def batch() -> tuple[torch.Tensor, torch.Tensor]:
            starts = torch.randint(len(stream) - length, (num_rows,))
            both = (
                torch.stack([stream[s + shift : s + shift + length] for s in starts])
                for shift in (0, 1)
            )
            if self.device.type == "cuda":
                both = (x.pin_memory().to(self.device, non_blocking=True) for x in both)
            inputs, targets = both
            return inputs, targets

        inputs, targets = batch()
        while True:
            for _ in range(case.accumulation):
                with autocast(recipe, self.device):
                    _, loss = forward(inputs, targets)
                inputs, targets = batch()
                (loss / case.accumulation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if clock.step_is_queued():
                return clock.num_steps * num_rows * length * case.accumulation

    def breakdown(self, case: Case) -> dict[str, float]:
        """Shares of a step's time by what it is spent on, from torch.profiler; "host gaps" are
        when a GPU has nothing to do."""
        from torch.profiler import ProfilerActivity, profile

        self._forget()
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with self._steps(case, self.documents(case.lengths)) as steps:
            for _ in range(WARM_UP_STEPS):
                next(steps)
            synchronize(self.device)
            started = time.monotonic()
            for _ in range(5):
                next(steps)
            synchronize(self.device)
            # Without the profiler, under which the host is several times slower.
            wall_seconds = (time.monotonic() - started) / 5
            with profile(activities=activities) as profiler:
                for _ in range(3):
                    next(steps)
                synchronize(self.device)
        seconds: dict[str, float] = {}
        for event in profiler.events():
            own = event.self_cpu_time_total
            if on_gpu:
                own = sum(kernel.duration for kernel in event.kernels)
            if own:
                part = part_of_step(event)
                seconds[part] = seconds.get(part, 0.0) + own / 1e6 / 3
        total = sum(seconds.values())
        if on_gpu:
            seconds["host gaps"] = max(0.0, wall_seconds - total)
            total += seconds["host gaps"]
        self._forget()
        return {part: seconds[part] / total for part in sorted(seconds, key=lambda x: -seconds[x])}


# What an event's name, or that of one it lies within, holds; the first that fits.
_PARTS = (
    ("loss", ("ChunkedCrossEntropy",)),
    ("optimizer", ("Optimizer.", "_fused_adam", "clip_grad", "_foreach_")),
    ("attention", ("attention", "flash", "varlen")),
    ("matmul", ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear")),
    ("copies and casts", ("aten::copy_", "Memcpy", "aten::_to_copy")),
)


def part_of_step(event: Any) -> str:
    """The part of a step that a profiler's event belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for part, words in _PARTS:
        if any(word in name for name in names for word in words):
            return part
    return "elementwise"
