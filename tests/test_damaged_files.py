"""A file of ours that is damaged, whatever it holds, is one error of ours that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collm import CoLLM, CoLLMConfig
from collm.errors import ArtefactError, CollmError
from collm.evaluation.run_report import report_of
from collm.run import RunConfig, train_collaboration
from collm.run.calibrate import PastRun
from collm.run.train import check_directory
from collm.tools.lookup import Lookup
from collm.training.inspection import stored_scores
from collm.vllm.export import Note
from collm.vllm.servers import Servers
from tests.processes import collm
from tests.tiny_models import make_model, tiny_config

pytestmark = pytest.mark.slow

CONTENTS = [
    "",
    "{}",
    "[]",
    "null",
    "3",
    '"x"',
    '{"format": 1}',
    "[" * 500,
    "{" * 9,
    "\x00",
    '{"rows": 3}',
    "[[[1]]]",
    '"\\ud800"',
]
HEADERS = [b"\xff" * 8, (1 << 60).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{}"]
"""Beginnings of safetensors files."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A run and its evaluation."""
    place = tmp_path_factory.mktemp("made")
    for name, seed in (("base", 0), ("assistant", 1)):
        make_model(tiny_config(), seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    rows = [{"prompt": f"w{i % 9}", "completion": f"w{i % 5}"} for i in range(20)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        data=str(place / "rows.jsonl"), base=str(place / "base"), assistant=[str(place / "assistant")], max_tokens=1
    )
    options = {"method": "head", "num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True, "warm_start": False}
    train_collaboration(config, CoLLMConfig(output_dir=str(place / "run"), **options), quiet=True)
    done = collm(
        "eval", "run/collaboration", "--task", "rows", "--data", "rows.jsonl", "--max-tokens", "1", "--out", "eval",
        "--compare", "base", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place


def resume(place: Path) -> None:
    config = RunConfig(data="d", base="b", assistant=["a"])
    check_directory(place / "run", config, CoLLMConfig(output_dir=str(place / "run"), use_cpu=True))


READERS: dict[str, Callable[[Path], object]] = {
    "run/run.yaml": lambda place: PastRun.read(place / "run"),
    "run/./run.yaml": resume,
    "run/validation.jsonl": lambda place: PastRun.read(place / "run").rows(),
    "run/collaboration/collm.json": lambda place: CoLLM.from_pretrained(place / "run/collaboration"),
    "run/collaboration/calibration.json": lambda place: CoLLM.from_pretrained(place / "run/collaboration"),
    "run/collaboration/head.safetensors": lambda place: CoLLM.from_pretrained(place / "run/collaboration"),
    "run/scores/base/scores.json": lambda place: stored_scores(place / "run/scores"),
    "run/scores/base/SHARD": lambda place: stored_scores(place / "run/scores"),
    "eval/results.json": lambda place: report_of(place / "eval"),
    "eval/items.json": lambda place: report_of(place / "eval"),
    "eval/candidates.json": lambda place: report_of(place / "eval"),
    "eval/answers/base.jsonl": lambda place: report_of(place / "eval"),
    "base/config.json": lambda place: CoLLM.from_pretrained(place / "run/collaboration").members,
    "base/tokenizer.json": lambda place: CoLLM.from_pretrained(place / "run/collaboration"),
    "base/tokenizer_config.json": lambda place: CoLLM.from_pretrained(place / "run/collaboration"),
    "base/generation_config.json": lambda place: CoLLM.from_pretrained(place / "run/collaboration").members,
    "base/model.safetensors": lambda place: CoLLM.from_pretrained(place / "run/collaboration").members,
    "table.json": lambda place: Lookup(place / "table.json"),
    "table.csv": lambda place: Lookup(place / "table.csv"),
    "collm_vllm.json": lambda place: Note.read(place),
    "servers.yaml": lambda place: Servers.named(str(place / "servers.yaml")),
}
MAY_BE_LACKING = {
    *("base/tokenizer_config.json", "base/generation_config.json", "eval/candidates.json", "run/validation.jsonl"),
}
"""Files that some of these contents leave usable: they hold defaults, fewer rows, or nothing."""


@pytest.fixture(params=READERS)
def damaged(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> tuple[Path, Path, str]:
    """The file to be damaged, the place it is in, and which it is."""
    file = str(request.param)
    place = tmp_path / "place"
    shutil.copytree(made, place)
    for config in place.glob("run/**/collm.json"):
        config.write_text(config.read_text().replace(str(made), str(place)))
    path = place / file
    if file.endswith("SHARD"):
        path = next(path.parent.glob("*.safetensors"))
    return path, place, file


def test_damage_is_one_error_that_names_the_place(damaged: tuple[Path, Path, str]) -> None:
    path, place, file = damaged
    given = [content.encode() for content in CONTENTS] + HEADERS
    if path.suffix != ".yaml":  # which takes a second to give up
        given += [b"[" * 100_000]
    if path.exists():
        if file != "run/./run.yaml":  # of another run
            READERS[file](place)
        whole = path.read_bytes()
        given += [whole[: len(whole) // 2], whole[::-1], b"\xff" + whole]
    usable, errors = list[bytes](), list[CollmError]()
    for content in given:
        path.write_bytes(content)
        try:
            READERS[file](place)
            usable.append(content[:30])
        except CollmError as error:
            errors.append(error)
    assert max(len(str(error)) for error in errors) < 5000, "an error is a sentence"
    assert file in MAY_BE_LACKING or not usable
    if file.startswith("run/collaboration/"):
        assert all(isinstance(error, ArtefactError) and path.name in str(error) for error in errors)
