"""Every command in the README and the docs is one that the program takes."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from accel_gpt2.cli.verbs import application

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in {"accel-gpt2", "accelerate"}:
                    found.append((f"{page.name}: {line.strip()}", words))
    return found


def test_there_are_commands_to_check() -> None:
    """The extraction below really finds the README's commands."""
    assert sum(name.startswith("README.md") for name, _ in _commands()) >= 8


@pytest.mark.parametrize("words", [pytest.param(w, id=name) for name, w in _commands()])
def test_documented_command_parses(words: list[str]) -> None:
    """Its verb and options exist; an unknown option would be a usage error."""
    if words[:2] == ["accelerate", "launch"]:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).is_file()
        words = ["accel-gpt2", Path(words[script]).stem, *words[script + 1 :]]
    group = typer.main.get_command(application(words[1:2]))
    verb = group.commands[words[1]]
    verb.make_context(words[1], words[2:])


def test_links_between_pages_lead_somewhere() -> None:
    """Relative links in the docs point at files and folders that exist."""
    links = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                links += 1
                assert (page.parent / target).exists(), f"{page.name}: {target}"
    assert links >= 8


def test_python_on_the_pages_is_python() -> None:
    """Every block compiles, and whatever it imports from a library is there."""
    blocks = [
        (page.name, block)
        for page in PAGES
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert "pretrained.md" in {name for name, _ in blocks}
    for name, block in blocks:
        imports = [
            node for node in ast.walk(ast.parse(block, name)) if isinstance(node, ast.ImportFrom)
        ]
        assert imports, f"{name}: {block}"
        for node in imports:
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
