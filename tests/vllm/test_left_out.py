"""What only a report shows comes last: where it cannot be computed, the results are there and the reason too."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, ToolSpec
from collm.core.policies import ThresholdPolicy
from collm.errors import ConfigError, ToolFailure
from collm.evaluation.compare import Evaluation, compare
from collm.evaluation.report import render_page
from collm.evaluation.run_report import report_of
from collm.evaluation.systems import systems_named
from collm.evaluation.tasks import task_named
from collm.evaluation.tasks.task import TaskItem
from collm.models.tools import ToolModel
from collm.text.text_tokenizer import TextTokenizer
from collm.training.data import Row
from tests.engine.test_engine import random_head
from tests.tiny_models import make_model, tiny_config
from tests.tools.functions import miles
from tests.two_tokenizers import two_tokenizers, writing_model
from tests.vllm.conftest import Cluster
from tests.vllm.fake import DOWN
from tests.vllm.test_one_engine import FakeEngine, connect


def evaluate(model: CoLLM, out: Path, prompts: list[str], names: str = "base", *, solutions: bool = True) -> Any:
    """The content of results.json, whose reasons the report shows."""
    rows = [Row(prompt, "w7 w8", None, f"line {i}") for i, prompt in enumerate(prompts)]
    items = [TaskItem(str(i), row.prompt, "w7", row.where, row if solutions else None) for i, row in enumerate(rows)]
    task = task_named("rows", metric="token_f1", max_tokens=5)
    systems = systems_named(model, names.split(","), ThresholdPolicy(0.5))
    compare(systems, Evaluation(task, items, max_batch=2), out)
    read = json.loads((out / "results.json").read_text())
    page = render_page(report_of(out))
    assert [row["num_items"] for row in read["rows"]] == [len(items)] * len(systems)
    assert all(str(escape(reason)) in page for reason in read["left_out"].values())
    return read


PROMPTS = ["w5 w6", "w9 w10 w11", "w12"]


def test_one_engine_gives_no_candidates(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    head = random_head(32, 1)
    pair = CoLLM(make_model(tiny_config(), 0), [make_model(tiny_config(hidden_size=48), 1)], head, tokenizer)
    with FakeEngine(pair) as engine, ExitStack() as stack:
        left_out = evaluate(connect(pair, engine, stack), tmp_path, PROMPTS)["left_out"]
    assert set(left_out) == {"token measures", *(f"candidates of item {i}" for i in range(3))}
    assert "not available in one engine" in left_out["candidates of item 0"]
    assert "on servers" in left_out["token measures"]


def test_an_answer_cut_inside_a_character_is_shown(tmp_path: Path) -> None:
    base, assistant = two_tokenizers()
    cut = writing_model(base, 1)
    euro = next(n for n, spelled in enumerate(TextTokenizer(base).token_bytes) if spelled == b"\xe2")
    cut.lm_head.bias.data[euro] = 50.0
    pair = CoLLM(cut, [writing_model(assistant, 2)], DeferralHead(32, 1), base, tokenizers=[assistant])
    assert evaluate(pair, tmp_path, ["the capital", "a river"], "assistant", solutions=False)["left_out"] == {}
    assert set(json.loads((tmp_path / "candidates.json").read_text())) == {"0", "1"}


def test_a_server_that_goes_down_after_the_answers_costs_the_candidates_only(
    cluster: Callable[..., Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = cluster(2)
    model = served.connect()
    plain = type(model).candidates

    def candidates(self: CoLLM, *arguments: Any) -> Any:
        served.fakes[2].always = lambda body: DOWN
        return plain(self, *arguments)

    monkeypatch.setattr(CoLLM, "candidates", candidates)
    left_out = evaluate(model, tmp_path, PROMPTS, "base,assistant-2")["left_out"]
    assert {f"candidates of item {i}" for i in range(3)} <= set(left_out)


def test_a_tool_that_fails_on_a_solution_costs_the_token_measures_only(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = CoLLM(make_model(tiny_config(), 0), [ToolSpec.of(miles)], random_head(32, 1), tokenizer)

    def fails(*_: object) -> Any:
        raise ToolFailure("miles raised ValueError")

    monkeypatch.setattr(ToolModel, "next_tokens", fails)
    read = evaluate(pair, tmp_path, PROMPTS)
    assert read["left_out"] == {"token measures": "miles raised ValueError"}
    assert read["tokens"] is None
    assert set(json.loads((tmp_path / "candidates.json").read_text())) == {"0", "1", "2"}


def test_systems_that_cannot_run_are_refused_before_anything_is_answered(
    tokenizer: PreTrainedTokenizerFast,
    cluster: Callable[..., Cluster],
    saved_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base, assistant = two_tokenizers()
    two = CoLLM(
        writing_model(base, 1), [writing_model(assistant, 2)], DeferralHead(32, 1), base, tokenizers=[assistant]
    )
    one = CoLLM(make_model(tiny_config(), 0), [make_model(tiny_config(), 1)], random_head(32, 1), tokenizer)
    with_tool = CoLLM(make_model(tiny_config(), 0), [ToolSpec.of(miles)], random_head(32, 1), tokenizer)
    for model, names in (
        (two, "base,confidence"),
        (cluster(1).connect(), "base,mixture"),
        (one, "base,single:writer=2"),
        (one, "random,contrastive:expert=3"),
        (cluster(1).connect(), f"base,proxy={saved_model('untuned')}"),
        (with_tool, f"base,proxy={saved_model('untuned')}"),
    ):
        with pytest.raises(ConfigError):
            evaluate(model, tmp_path / "out", PROMPTS, names)
    assert not (tmp_path / "out").exists()
