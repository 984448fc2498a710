"""What all tasks share: which items are asked, what stands before them, where their answers end, what is averaged."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from collm.errors import ConfigError, DataError, RequestError
from collm.evaluation.intervals import bootstrap_interval
from collm.evaluation.tasks import TASKS, task_named
from collm.evaluation.tasks.gsm8k import Gsm8k
from collm.evaluation.tasks.rows import RowsTask
from collm.evaluation.tasks.task import TaskItem
from collm.text.template import PromptTemplate
from tests.evaluation.tasks.files import jsonl
from tests.tokenizers import merging_tokenizer

TRAIN = [{"prompt": f"train {n}", "completion": f"yes {n}"} for n in range(30)]
TEST = [{"prompt": f"test {n}", "completion": f"no {n}"} for n in range(20)]
ASKED = TaskItem("1", "How many?", "5", "here", shots=(("How few?", " 3"), ("How so?", " 4")))


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    parts = {"train": datasets.Dataset.from_list(TRAIN), "test": datasets.Dataset.from_list(TEST)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def prompts(items: list[TaskItem]) -> list[object]:
    return [item.prompt for item in items]


def test_the_test_split_is_asked_whole_unless_told_otherwise(splits: Path, tmp_path: Path) -> None:
    task = RowsTask()
    datasets.Dataset.from_list(TEST).save_to_disk(tmp_path / "table")
    assert len(task.load(tmp_path / "table")) == 20  # a table without splits
    assert prompts(task.load(splits)) == [row["prompt"] for row in TEST]
    assert prompts(task.load(splits, split="train")) == [row["prompt"] for row in TRAIN]
    assert len({item.id for item in task.load(splits)}) == 20


def test_data_come_from_the_publishers_or_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, object]] = []
    item = TaskItem("1", "How many?", "5", "here")
    monkeypatch.setattr(Gsm8k, "read", lambda self, source, split: asked.append((source, split)) or [item])
    assert Gsm8k().load() == [item]
    assert asked == [("openai/gsm8k", "test")]
    with pytest.raises(ConfigError, match="task 'rows' has no default data"):
        RowsTask().load()


def test_a_limit_draws_items_in_order(splits: Path) -> None:
    task = RowsTask()
    whole = task.load(splits)
    drawn = task.load(splits, limit=5)
    assert drawn == task.load(splits, limit=5, seed=0)
    assert drawn != task.load(splits, limit=5, seed=1) != task.load(splits, limit=5, seed=-1)
    assert drawn == [item for item in whole if item in drawn]
    assert len(drawn) == 5
    assert task.load(splits, limit=5, seed=None) == whole[:5]
    assert task.load(splits, limit=100) == whole


def test_shots_come_from_the_train_split_and_are_the_same_for_all(splits: Path) -> None:
    task = RowsTask()
    items = task.load(splits, shots=8)
    (shots,) = {item.shots for item in items}
    assert len(set(shots)) == 8
    assert set(shots) <= {(row["prompt"], row["completion"]) for row in TRAIN}
    assert shots != task.load(splits, shots=8, seed=1)[0].shots
    first = task.load(splits, shots=8, seed=None)[0].shots
    assert first == tuple((row["prompt"], row["completion"]) for row in TRAIN[:8])


def test_what_is_asked_is_not_shown(splits: Path) -> None:
    items = RowsTask().load(splits, split="train", limit=28, shots=2)
    assert not {question for question, _ in items[0].shots} & set(prompts(items))
    with pytest.raises(DataError, match="has 2 plain rows that are no items, expected at least 3 few-shot examples"):
        RowsTask().load(splits, split="train", limit=28, shots=3)


def test_a_file_has_no_train_split(tmp_path: Path) -> None:
    test, train = jsonl(tmp_path / "test.jsonl", *TEST), jsonl(tmp_path / "train.jsonl", *TRAIN)
    with pytest.raises(ConfigError, match=r"test.jsonl has no train split for few-shot examples; give a source"):
        RowsTask().load(test, shots=1)
    (shot,) = RowsTask().load(test, shots=1, shots_source=train)[0].shots
    assert shot[0].startswith("train")


def test_chats_take_no_shots(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    source = jsonl(tmp_path / "test.jsonl", {"messages": chat})
    with pytest.raises(ConfigError, match=r"test.jsonl:1 is a chat; leave shots out"):
        RowsTask().load(source, shots=1, shots_source=source)


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("shots", -1)])
def test_impossible_numbers_are_refused(splits: Path, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        RowsTask().load(splits, **{name: value})


@pytest.mark.parametrize("prompt", ["How many?", [{"role": "user", "content": "How many?"}]])
def test_without_shots_the_prompt_is_passed_as_it_is(prompt: object) -> None:
    item = TaskItem("1", prompt, "5", "here")
    assert Gsm8k().render(item, PromptTemplate("Q: {prompt}\nA:"), merging_tokenizer("Q: A:")) == prompt


def test_shots_are_wrapped_as_training_wrapped_them() -> None:
    tokenizer = merging_tokenizer("Q: How many? A: 5")
    template = PromptTemplate("Q: {prompt}\nA:")
    token_ids = Gsm8k().render(ASKED, template, tokenizer)
    assert tokenizer.decode(token_ids) == "Q: How few?\nA: 3\n\nQ: How so?\nA: 4\n\nQ: How many?\nA:"
    assert template.encode_prompt(tokenizer, token_ids) == token_ids
    shown = template.encode_completion(tokenizer, *ASKED.shots[0]).token_ids[:-1]  # without EOS
    assert tokenizer.decode(token_ids).startswith(tokenizer.decode(shown) + "\n\n")


def test_in_a_chat_shots_are_earlier_turns() -> None:
    tokenizer = merging_tokenizer("x")
    messages = Gsm8k().render(ASKED, PromptTemplate(chat="x"), tokenizer, chat=True)
    assert [turn["role"] for turn in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in messages] == ["How few?", " 3", "How so?", " 4", "How many?"]
    with pytest.raises(RequestError, match="no chat template"):
        PromptTemplate().encode_prompt(tokenizer, messages)


def test_after_shots_an_answer_ends_where_another_would_begin() -> None:
    task, alone = Gsm8k(), TaskItem("1", "?", "5", "here")
    template = PromptTemplate("Exercise: {prompt}\nSolution: ")
    assert task.stop_for(alone, template) == task.stop
    assert task.stop_for(ASKED, template) == (*task.stop, "\n\nExercise:")
    assert task.stop_for(ASKED, PromptTemplate()) == (*task.stop, "\n\n")
    assert task.stop_for(ASKED, template, chat=True) == task.stop


def test_each_measure_is_averaged_over_the_items_that_have_it() -> None:
    scored = [(ASKED, "", {"a": 1.0, "b": 0.5}), (ASKED, "", {"a": 0.0}), (ASKED, "", {})]
    assert RowsTask().aggregate(scored) == {"a": bootstrap_interval([1, 0]), "b": bootstrap_interval([0.5])}
    assert RowsTask().aggregate([]) == {}


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("gsm", {}, r"task is 'gsm', expected one of gsm8k, rows, or package.module:Class"),
        ("gsm8k", {"metric": "contains"}, "task 'gsm8k' has no option 'metric', expected format"),
        ("recipes.paper.alpaca_eval:AlpacaEval", {"metric": "contains"}, "has no option 'metric', expected none"),
        ("builtins:dict", {}, "is <class 'dict'>, expected a subclass of"),
        ("none:Task", {}, r"task 'none:Task' cannot be imported .* PYTHONPATH"),
    ],
)
def test_a_task_has_a_name_and_options_of_its_own(name: str, options: dict[str, str], complaint: str) -> None:
    assert [task_named(known).name for known in TASKS] == list(TASKS)
    with pytest.raises(ConfigError, match=complaint):
        task_named(name, **options)
