"""The demo from nothing to its files, and what it claims."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from collm.demo.run import clear, run_demo
from collm.demo.systems import FULL, HEAD_ONLY
from collm.errors import ConfigError
from collm.evaluation.report import Report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]


def test_the_collaboration_beats_every_single_model(demo: tuple[Path, Report], tmp_path: Path) -> None:
    out, report = demo
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert list(rows) == [row.name for row in report.rows]
    for name in ("base alone", "base fine-tuned", "geography expert alone", "chemistry expert alone"):
        assert rows[name]["accuracy"] <= 0.2
    for name in (HEAD_ONLY, FULL):
        assert rows[name]["accuracy"] >= 0.95
        assert rows[name]["low"] <= rows[name]["accuracy"] <= rows[name]["high"]
    fact_share = json.loads((out / "results.json").read_text())["fact_share"]
    assert abs(rows[FULL]["deferral_rate"] - fact_share) < 0.03
    assert rows["random, same rate"]["accuracy"] < 0.3
    shares = json.loads((out / "results.json").read_text())["calls_by_domain"]
    assert shares["geography"]["geography"] > 0.95
    assert shares["chemistry"]["chemistry"] > 0.95
    page = (out / "report.html").read_text()
    assert "collaboration (full)" in page
    copy = shutil.copytree(out, tmp_path / "copy")
    clear(copy)
    assert list(copy.iterdir()) == []


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which this demo did not write"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="no seed"):
        run_demo(tmp_path / "new", seeds=())
