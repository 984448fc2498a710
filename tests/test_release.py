"""What would be published: a wheel and an sdist, built from these sources and used as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from trove_classifiers import classifiers

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[1]


def build(source: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *options]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    build(ROOT, directory)
    return directory


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("collm-*-py3-none-any.whl")
    return path


@pytest.fixture
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def contents(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_all_files_of_the_package_and_no_others(wheel: Path) -> None:
    source = ROOT / "src"
    files = [path for path in (source / "collm").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert contents(wheel) == {path.relative_to(source).as_posix() for path in files}
    needed = {"collm/py.typed", "collm/serving/playground.html", "collm/evaluation/report.html"}
    assert needed <= contents(wheel)
    assert any(name.startswith("collm/demo/data/") for name in contents(wheel))


def test_the_sdist_builds_the_same_wheel(dist: Path, wheel: Path, tmp_path: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "again", "-t", "wheel")
    (again,) = (tmp_path / "again").iterdir()
    assert contents(again) == contents(wheel)


def test_the_metadata_is_complete(metadata: Message) -> None:
    for name in ("Summary", "Keywords", "License-Expression", "License-File", "Requires-Python", "Project-URL"):
        assert metadata[name], name
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Classifier", [])) <= classifiers
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_whoever_decodes_can_load_a_lora_adapter(metadata: Message) -> None:
    extras = [
        one.rpartition("extra ==")[2].strip(" '\"") for one in metadata.get_all("Requires-Dist", []) if "peft" in one
    ]
    assert {"train", "serve", "eval"} <= set(extras)


def test_pages_name_extras_that_exist(metadata: Message) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "recipes/serving/Dockerfile"]
    named = re.findall(r"'(?:\.|/src|collm)\[([\w,]+)\]'", "".join(page.read_text(encoding="utf-8") for page in pages))
    extras = {extra for names in named for extra in names.split(",")}
    assert {"train", "serve", "gguf"} <= extras <= set(metadata.get_all("Provides-Extra", []))


def test_the_wheel_installs_and_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    """Only its dependencies come from this environment, whose own collm is not seen."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}

    def output(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    where = output(python, "-c", "import collm; print(collm.CoLLM.__name__, collm.__file__)")
    assert where.startswith(f"CoLLM {tmp_path / 'venv'}")
    assert "train" in output(python.with_name("collm"), "--help")
