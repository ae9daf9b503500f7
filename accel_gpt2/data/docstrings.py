"""The data set `docstrings`: text that every installation already has.

Its documents are the docstrings of four installed libraries, its labels the libraries. They are
read from the source files with `ast`; nothing is imported.
"""

import ast
import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.data.progress import document_progress
from accel_gpt2.data.raw import RawDocument, RawSplit, cached_raw_table
from accel_gpt2.errors import UserError

# Distribution -> module; the distributions are the class names, in their order.
_MODULES = MappingProxyType(
    {
        "torch": "torch",
        "transformers": "transformers",
        "pandas": "pandas",
        "scikit-learn": "sklearn",
    }
)

# Shorter ones ("Return the name.") say nothing about their library.
MIN_CHARACTERS = 60

# Equal classes, and a demo of minutes: torch alone has over 10,000. The smallest of the four,
# scikit-learn, has just under 2,600.
MAX_DOCUMENTS_PER_CLASS = 2500

_FORMAT_VERSION = 1
_SKIPPED_FOLDERS = frozenset({"test", "tests", "_internal", "_vendor"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_docstrings(*, progress: bool = False) -> RawSplit:
    """All documents, unsplit; the same for the same versions of the four libraries.

    Files are visited in the order of a hash of their path until a class has its number of different
    documents, so that not every file need be parsed and the choice follows no alphabet. A docstring
    that occurs again stands here again: removing and counting it is left to the common treatment.

    Raises:
        UserError: when a library is not installed.
    """
    assert tuple(_MODULES) == DATASETS["docstrings"].class_names
    versions = {distribution: _version(distribution) for distribution in _MODULES}
    key = f"docstrings {_FORMAT_VERSION} {MIN_CHARACTERS} {MAX_DOCUMENTS_PER_CLASS} {versions}"
    table = cached_raw_table(key, lambda: _documents(progress=progress))
    places = table["place"]
    return RawSplit(table=table.select(["text", "label"]), place=lambda row: str(places[row]))


def check_docstrings() -> None:
    """Raise a UserError unless the four libraries are installed."""
    for distribution in _MODULES:
        _version(distribution)
        _package_folder(distribution)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        raise UserError(
            f"The data set docstrings is made of four installed libraries, and {distribution} is "
            f"not installed; run `pip install {distribution}`."
        ) from None


def _package_folder(distribution: str) -> Path:
    spec = importlib.util.find_spec(
        _MODULES[distribution]
    )  # finds a top-level name, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The data set docstrings is made of four installed libraries, and {distribution} has "
            f"no folder of source files here; run `pip install {distribution}`."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _documents(*, progress: bool) -> Iterator[RawDocument]:
    total = MAX_DOCUMENTS_PER_CLASS * len(_MODULES)
    with document_progress("Reading docstrings", total, show=progress) as advance:
        for distribution in _MODULES:
            root = _package_folder(distribution)
            seen: set[str] = set()
            for file in _source_files(root):
                for line, text in _docstrings(file):
                    advance(text not in seen)
                    seen.add(text)
                    yield RawDocument(
                        text=text,
                        label=distribution,
                        place=f"{file.relative_to(root.parent).as_posix()}, line {line}",
                    )
                    if len(seen) == MAX_DOCUMENTS_PER_CLASS:
                        break
                if len(seen) == MAX_DOCUMENTS_PER_CLASS:
                    break


def _source_files(root: Path) -> list[Path]:
    """The Python files of a package without its tests, in the order of a hash of their path."""
    relative_paths = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])
    ]
    relative_paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    return [root / path for path in relative_paths]


def _docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """The docstrings of a file that are long enough, with the line of what they document."""
    source = file.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates that are not Python
            return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node, clean=False)):
            text = inspect.cleandoc(text)
            if len(text) >= MIN_CHARACTERS:
                yield getattr(node, "lineno", 1), text
