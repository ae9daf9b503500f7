"""What a run trains one after another: a model per class, or one model of all classes."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accel_gpt2.data.batching import Indices
from accel_gpt2.data.tokenized import TokenizedDocuments
from accel_gpt2.recipe import Objective

ALL_CLASSES = "all classes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One training of a run.

    Its checkpoints are in `directory`; at the end it exports one model into each of `finals`.
    """

    index: int
    name: str  # of the class, or ALL_CLASSES
    directory: Path
    finals: tuple[Path, ...]

    def own(self, documents: TokenizedDocuments) -> Indices:
        """The indices of the documents that it is trained for."""
        if self.name == ALL_CLASSES:
            return np.arange(len(documents), dtype=np.int64)
        return documents.for_class(self.index)


def parts_of(
    run_directory: Path, objective: Objective, class_names: tuple[str, ...]
) -> tuple[Part, ...]:
    """The parts of a run, in the order in which they are trained.

    >>> [part.name for part in parts_of(Path("runs/a"), "masked_lm", ("ham", "spam"))]
    ['ham', 'spam']
    >>> (part,) = parts_of(Path("runs/a"), "hybrid", ("ham", "spam"))
    >>> part.directory.name, [path.parent.name for path in part.finals]
    ('class-all', ['class-0-ham', 'class-1-spam'])
    """
    by_class = [class_directory(run_directory, i, name) for i, name in enumerate(class_names)]
    if objective in {"generative", "masked_lm"}:
        return tuple(
            Part(index=index, name=name, directory=directory, finals=(directory / "final",))
            for index, (name, directory) in enumerate(zip(class_names, by_class, strict=True))
        )
    together = run_directory / "class-all"
    finals = [path / "final" for path in by_class] if objective == "hybrid" else []
    return (
        Part(
            index=0,
            name=ALL_CLASSES,
            directory=together,
            finals=tuple(finals) or (together / "final",),
        ),
    )


def class_directory(run_directory: Path, index: int, name: str) -> Path:
    """`class-<index>-<slug>`: readable, and safe on any file system.

    >>> class_directory(Path("runs/a"), 3, "Sci/Tech").name
    'class-3-sci-tech'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "unnamed"
    return run_directory / f"class-{index}-{slug}"
