"""The demo with both experts, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collm.demo.run import run_demo
from collm.demo.world import DemoWorld
from collm.evaluation.report import Report


class FewerQuestions(DemoWorld):
    """Every fact is learned, but a third of the questions that tell how well are asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.validation, self.test = self.validation[::3], self.test[::3]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """What it leaves, and its report."""
    out = tmp_path_factory.mktemp("demo") / "out"
    # Of the thresholds only the ends and 1/2, and not every question: they cost most of the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.demo.run.RATES", (0, 1))
        patch.setattr("collm.demo.run.DemoWorld", FewerQuestions)
        return out, run_demo(out, num_assistants=2, quiet=True)
