"""The scores of documents under a run's models, computed once and kept.

Scores are [num_documents, num_classes] in nats: log p(x|c), or log p(c|x) where one model with a
classification head was trained.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import TypeAdapter

from accel_gpt2.classify.bayes import predict
from accel_gpt2.classify.run import Run
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.data.tokenizer import EncodedDocument
from accel_gpt2.recipe import Pll
from accel_gpt2.train.checkpoint import write_array
from accel_gpt2.train.manifest import MANIFEST
from accel_gpt2.train.masked import PllEstimator
from accel_gpt2.train.model import load_base, load_final, load_final_tokenizer
from accel_gpt2.train.objective import TransformersModel
from accel_gpt2.train.processes import on_first_process
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.scoring import score_documents
from accel_gpt2.train.shared_base import share_frozen

_FINGERPRINTS = b"accel_gpt2_fingerprints"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """[num_documents, num_classes] in nats, and the time that scoring took."""

    values: NDArray[np.float64]
    seconds: float


@dataclass(frozen=True, slots=True)
class InMemoryDocuments:
    """Encoded documents that are on no disk."""

    encoded: list[EncodedDocument]

    @property
    def lengths(self) -> NDArray[Any]:
        return np.array([len(document.token_ids) for document in self.encoded], dtype=np.int64)

    def document(self, index: int) -> NDArray[Any]:
        return self.encoded[index].token_ids


class Scorers:
    """A run's models, ready to score, each read when it is asked for.

    Adapters of several classes stand on one base, which is read with the first of them and is in
    memory once, wherever the last of them was put.
    """

    def __init__(self, run: Run, pll: Pll = "full") -> None:
        self._run = run
        self._pll = pll
        self.share_base = run.recipe.finetuning != "full" and len(run.finals) > 1
        self._base: Any = None

    def load(self, index: int) -> TransformersModel:
        """The model in `run.finals[index]`.

        Raises:
            UserError: when a file of it is missing or has changed, or the base cannot be had.
        """
        recipe = self._run.recipe
        if self.share_base and self._base is None:
            self._base = load_base(recipe)
        return load_final(
            self._run.finals[index],
            recipe,
            class_names=self._run.class_names,
            pll=PllEstimator(
                kind=self._pll,
                mask_fraction=recipe.mask_fraction,
                seed=recipe.seed,
                class_index=index,
            ),
            base=share_frozen(self._base) if self.share_base else None,
        )


def score_texts(
    run: Run, texts: list[str], accelerator: Any, progress: TrainProgress | None = None
) -> Scores:
    """Score texts that belong to no class here; one model is in memory at a time."""
    scorers = Scorers(run)
    tokenizer = load_final_tokenizer(run.finals[0])
    documents = InMemoryDocuments(tokenizer.encode(texts, run.recipe.max_length))
    started = time.monotonic()
    columns = []
    for index, name in enumerate(_model_names(run)):
        label = f"other texts under {name} ({index + 1}/{len(run.finals)})"
        columns.append(
            score_documents(
                scorers.load(index).to(accelerator.device),
                documents,
                micro_batch_tokens=run.recipe.micro_batch_tokens,
                accelerator=accelerator,
                on_batch=_shown(progress, label, len(texts)),
            )
        )
    return Scores(values=np.column_stack(columns), seconds=time.monotonic() - started)


def _shown(progress: TrainProgress | None, label: str, total: int) -> Callable[[int], None]:
    """What is called after each batch: the bar, with documents per second."""
    started = time.monotonic()
    done = 0
    if progress is not None:
        progress.start(label, total)

    def on_batch(num_documents: int) -> None:
        nonlocal done
        done += num_documents
        rate = done / max(1e-9, time.monotonic() - started)
        if progress is not None:
            progress.update(label, done, total, f"{rate:.0f} documents/s")

    return on_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScoreRecord:
    """What one model's kept scores were made from, and what they hold."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "allow_inf_nan": False}

    key: str
    digest: str
    token_digest: str | None  # of the file beside it, for a causal LM
    seconds: Annotated[float, Ge(0)]


_RECORDS = TypeAdapter(list[_ScoreRecord])
_Kept = tuple[_ScoreRecord, NDArray[np.float64]]


def score_run(
    run: Run,
    tokens: TokenizedDocuments,
    path: Path,
    accelerator: Any,
    progress: TrainProgress,
    *,
    pll: Pll = "full",
) -> Scores:
    """Score documents under one model at a time, and keep each model's scores in `path` (parquet).

    A causal LM's log-likelihoods of single tokens are kept beside them, float32, one document's
    after the other's (`token_scores_path`). What is there already and was made from the same models
    and documents is not computed again.
    """
    document_fingerprint = _fingerprint_documents(tokens)
    cached = _read_cached(path, run)
    scorers = Scorers(run, pll)
    kept: list[_Kept] = []
    for index, part_name in enumerate(_model_names(run)):
        manifest = (run.finals[index] / MANIFEST).read_bytes()
        way = pll if run.recipe.objective == "masked_lm" else ""
        key = hashlib.sha256(manifest + f"{document_fingerprint}{way}".encode()).hexdigest()
        known = cached.get(index)
        tokens_path = token_scores_path(path, index)
        if known is not None and known[0].key == key and _is_whole(tokens_path, known[0]):
            kept.append(known)
            continue
        label = f"scoring under {part_name} ({index + 1}/{len(run.finals)})"
        model = scorers.load(index).to(accelerator.device)
        is_causal = run.recipe.objective in {"generative", "hybrid"}
        num_targets = int(tokens.lengths.sum(dtype=np.int64)) - len(tokens)
        token_scores = np.zeros(num_targets, dtype=np.float32) if is_causal else None
        started = time.monotonic()
        scores = score_documents(
            model,
            tokens,
            micro_batch_tokens=run.recipe.micro_batch_tokens,
            accelerator=accelerator,
            on_batch=_shown(progress, label, len(tokens)),
            token_scores=token_scores,
        )
        record = _ScoreRecord(
            key=key,
            digest=_digest(scores),
            token_digest=None if token_scores is None else _digest(token_scores),
            seconds=time.monotonic() - started,
        )
        del model
        kept.append((record, scores))
        if token_scores is not None:
            on_first_process(accelerator, partial(write_array, tokens_path, token_scores))
        on_first_process(accelerator, partial(_write_scores, path, run, tokens, kept))
    on_first_process(accelerator, partial(_write_scores, path, run, tokens, kept))
    return Scores(
        values=np.column_stack([scores for _, scores in kept]),
        seconds=sum(record.seconds for record, _ in kept),
    )


def token_scores_path(scores_path: Path, index: int) -> Path:
    """Where the log-likelihoods of single tokens under `run.finals[index]` are."""
    return scores_path.with_name(f"token_log_likelihoods-{index}.npy")


def score_column(run: Run, class_index: int) -> str:
    """What a class's scores are called in the table."""
    kind = "log_probability" if run.recipe.objective == "classification" else "log_likelihood"
    return f"{kind}_{class_index}"


def _model_names(run: Run) -> list[str]:
    if len(run.finals) == len(run.class_names):
        return list(run.class_names)
    return [part.name for part in run.parts]


def _columns(run: Run, index: int) -> list[str]:
    """The columns of the scores of `run.finals[index]`."""
    classes = [index] if len(run.finals) == len(run.class_names) else range(len(run.class_names))
    return [score_column(run, class_index) for class_index in classes]


def _fingerprint_documents(tokens: TokenizedDocuments) -> str:
    digest = hashlib.sha256()
    for index in range(len(tokens)):
        digest.update(tokens.document(index).tobytes())
    digest.update(tokens.labels.astype(np.int64).tobytes())
    return digest.hexdigest()


def _write_scores(path: Path, run: Run, tokens: TokenizedDocuments, kept: list[_Kept]) -> None:
    table: dict[str, NDArray[Any]] = {
        "document": tokens.rows.astype(np.int64),
        "label": tokens.labels.astype(np.int64),
        "num_tokens": tokens.lengths.astype(np.int64) - 1,
        "num_bytes": tokens.num_bytes.astype(np.int64),
        "truncated": tokens.truncated,
    }
    if len(kept) == len(run.finals):
        scores = np.column_stack([scores for _, scores in kept])
        table["prediction"] = predict(scores, run.log_prior).astype(np.int64)
    for index, (_, scores) in enumerate(kept):
        columns = scores.reshape(len(scores), -1).T
        table.update(zip(_columns(run, index), columns, strict=True))
    records = _RECORDS.dump_json([record for record, _ in kept])
    arrow = pa.table(table).replace_schema_metadata({_FINGERPRINTS: records})
    staging = path.with_name(f".staging-{path.name}")
    pq.write_table(arrow, staging)
    staging.replace(path)


def _read_cached(path: Path, run: Run) -> dict[int, _Kept]:
    """Kept scores by model; what is not there or damaged is left out, and computed again."""
    try:
        table = pq.read_table(path)
        records = _RECORDS.validate_json((table.schema.metadata or {}).get(_FINGERPRINTS, b""))
        scores = [
            np.column_stack([table[name].to_numpy() for name in _columns(run, index)])
            for index in range(len(records))
        ]
    except (OSError, KeyError, IndexError, ValueError, pa.ArrowException):
        return {}
    return {
        index: (record, matrix)
        for index, (record, matrix) in enumerate(zip(records, scores, strict=True))
        if record.digest == _digest(matrix)
    }


def _is_whole(path: Path, record: _ScoreRecord) -> bool:
    if record.token_digest is None:
        return True
    try:
        return _digest(np.load(path, allow_pickle=False)) == record.token_digest
    except (OSError, ValueError):
        return False


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
