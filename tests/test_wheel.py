"""What `python -m build` makes works where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from accel_gpt2.render.accelerate import config_files

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_installs_elsewhere_and_works(tmp_path: Path) -> None:
    """The wheel carries the vocabulary, the prices, the templates of reports, the launch scripts
    and files and the licences, and its commands run from another directory."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("accel_gpt2-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for end in (
        "accel_gpt2/data/gpt2_vocabulary/vocab.json",
        "accel_gpt2/data/gpt2_vocabulary/merges.txt",
        "accel_gpt2/catalog/prices.csv",
        "accel_gpt2/catalog/prices_seed_2025.csv",
        *(f"accel_gpt2/report/{name}.html.j2" for name in ("base", "parts", "run", "comparison")),
        "accel_gpt2/_launch/train.py",
        "accel_gpt2/_launch/evaluate.py",
        *(f"accel_gpt2/_{name}" for name in config_files()),
        "licenses/LICENSE",
        "licenses/NOTICE",
    ):
        assert any(name.endswith(end) for name in names), end
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), wheel],
        check=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(*arguments: str) -> str:
        code = "from accel_gpt2.cli.app import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout + result.stderr

    planned = call("train", "--dry-run", "--model", "gpt2-tiny", "--dataset", "docstrings")
    assert str(site / "accel_gpt2" / "_launch" / "train.py") in planned
    assert f"--config_file={site}/accel_gpt2/_accelerate_configs/single.yaml" in planned
    assert str(site / "accel_gpt2" / "_launch" / "train.py") in call("configs", "copy", "mine")
    assert all((elsewhere / "mine" / name).is_file() for name in config_files())
    check = (
        "from accel_gpt2.data.tokenizer import load_gpt2_tokenizer as t; import accel_gpt2;"
        "print(accel_gpt2.__file__, t().encode(['Hello world'], 9)[0].token_ids.tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", check],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(site) in printed
    assert "[50256, 15496, 995, 50256]" in printed
