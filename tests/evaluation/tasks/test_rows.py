"""Any rows, with any metric."""

from __future__ import annotations

from pathlib import Path

import pytest

from collm.errors import ConfigError, DataError
from collm.evaluation.tasks.rows import RowsTask
from collm.text.template import PromptTemplate
from tests.evaluation.tasks.files import jsonl

CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Paris."}]


@pytest.mark.parametrize(("metric", "score"), [("exact_match", 0), ("contains", 1)])
def test_metric_fields_and_end_of_an_answer_can_be_chosen(tmp_path: Path, metric: str, score: float) -> None:
    task = RowsTask(metric, prompt_field="q", completion_field="a", max_tokens=7, stop=("\n",))
    (item,) = task.load(jsonl(tmp_path / "rows.jsonl", {"q": "Capital?", "a": "Paris"}))
    assert (item.prompt, item.reference, item.where) == ("Capital?", "Paris", f"{tmp_path}/rows.jsonl:1")
    assert task.score(item, "It is Paris.") == {metric: score}
    assert task.measure == metric
    assert (task.max_tokens, task.stop_for(item, PromptTemplate())) == (7, ("\n",))


def test_chats_are_asked_for_their_last_turn(tmp_path: Path) -> None:
    (item,) = RowsTask().load(jsonl(tmp_path / "rows.jsonl", {"messages": CHAT}))
    assert (item.prompt, item.reference) == (CHAT[:1], "Paris.")


def test_a_bad_row_and_an_unknown_metric_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: no field 'completion'"):
        RowsTask().load(jsonl(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"}, {"prompt": "p"}))
    with pytest.raises(ConfigError, match="metric is 'rouge'"):
        RowsTask("rouge")
