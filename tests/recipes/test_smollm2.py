"""The recipe with a real model, on a tiny one: every stage, what an interrupted run keeps, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from collm.errors import ConfigError, DataError
from recipes.smollm2 import measure, plans, rules, run, stages, tables, two_models
from recipes.smollm2.from_scratch import make_base
from recipes.smollm2.gsm8k import is_right, mark_score
from tests.tokenizers import merging_tokenizer

CHAT = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n"
    "{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TINY = replace(
    plans.PLANS["cpu"],
    train_rows=16,
    validation_rows=4,
    test_rows=4,
    written_rows=3,
    max_tokens=8,
    batch_size=4,
    max_length=256,
)
TINY_PAIR = replace(
    plans.PAIR_PLANS["cpu"],
    train_rows=8,
    validation_rows=4,
    test_rows=4,
    written_rows=2,
    max_tokens=8,
    batch_size=4,
    layers=1,
    heal_rows=2,
    heal_texts=2,
    expert_rows=20,
    learning_rate=1e-2,
)


def problem(number: int) -> dict[str, str]:
    answer = f"She has {number} * 2 = <<{number}*2={2 * number}>>{2 * number} eggs.\n#### {2 * number}"
    return {"question": f"Ann has {number} boxes of 2 eggs. How many eggs?", "answer": answer}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "gsm8k"
    place.mkdir()
    for split, count in (("train", 40), ("test", 6)):
        rows = (json.dumps(problem(number)) + "\n" for number in range(3, 3 + count))
        (place / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return place


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> list[Path]:
    """A tiny model in the place of SmolLM2; where it was asked for."""
    asked: list[Path] = []
    tokenizer = merging_tokenizer(problem(3)["answer"], across_words=False)
    tokenizer.chat_template = CHAT

    def fetched(directory: Path) -> Path:
        asked.append(directory)
        model: PreTrainedModel = tiny_model(0, vocab_size=len(tokenizer), max_position_embeddings=2048)
        model.config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    for recipe in (run, two_models):
        monkeypatch.setattr(recipe, "smollm2", fetched)
        monkeypatch.setattr(recipe, "load_problems", lambda source: load(source, validation_rows=8))
    monkeypatch.setitem(plans.PLANS, "cpu", TINY)
    monkeypatch.setitem(plans.PAIR_PLANS, "cpu", TINY_PAIR)
    return asked


load = run.load_problems


def test_a_run_is_whole_and_goes_on_where_it_was(
    data: Path, small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out)]
    solved = run.solve
    monkeypatch.setattr(run, "solve", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.main(arguments)
    monkeypatch.setattr(run, "solve", solved)
    monkeypatch.setattr(stages, "train_collaboration", lambda *args, **options: pytest.fail("trained again"))
    (tmp_path / "results.md").write_text("# Results\n", encoding="utf-8")
    run.main([*arguments, "--docs", str(tmp_path)])
    assert "| tuned as long without the tool |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert small == [out / "model"]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"]}
    assert len(rows) == 11
    assert rows[run.ORACLE]["given"]["equations"]["mean"] >= rows[run.ALWAYS]["given"]["equations"]["mean"] > 0
    assert rows[run.UNTUNED]["calls"] == 0
    assert rows[run.ALWAYS]["calls"] == 1
    assert (out / "report.html").exists()
    assert "training: calculator" in results["seconds"]
    table = (out / "results.md").read_text(encoding="utf-8")
    assert all(name in table for name in rows)


@pytest.mark.soak
def test_two_models_are_cut_healed_tuned_and_compared_under_every_rule(
    data: Path, small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_models.Gsm8k, "max_tokens", 8)
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out), "--docs", str(tmp_path)]
    two_models.main(arguments)
    first = (tmp_path / "results.md").read_text(encoding="utf-8")
    monkeypatch.setattr(stages, "train_collaboration", lambda *args, **options: pytest.fail("trained again"))
    two_models.main(arguments)
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == first
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert len(results["given"]) == 4
    given, *others = results["given"].values()
    for with_cost in others[::2]:
        assert set(with_cost["rules"]) == set(given["rules"])
    for name, cost in (("together", 0.0), ("together-with-cost", 1.0), ("frozen-with-cost", 1.0)):
        assert yaml.safe_load((out / name / "run.yaml").read_text(encoding="utf-8"))["deferral_cost"] == cost
    base, assistant = (given["alone"][name]["nll"]["mean"] for name in ("base", "assistant"))
    assert set(given["rules"]) == {rules.LEARNED, rules.DOUBT, rules.SURER, rules.RANDOM, rules.ORACLE}
    for at, rate in enumerate(two_models.RATES):
        at_rate = {name: of[at]["nll"]["mean"] for name, of in given["rules"].items()}
        assert at_rate[rules.ORACLE] == min(at_rate.values())
        assert at_rate[rules.RANDOM] == pytest.approx(rate * assistant + (1 - rate) * base)
    assert json.loads((out / "cut" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 1
    assert sum(kind["share"] for kind in given["kinds"].values()) == pytest.approx(1)
    assert len(results["written"]["rows"]) == 8
    del results["written"]  # a plan may write nothing
    assert "".join(tables.pair_lines(results)) in first.replace("\n", "")
    picture = (tmp_path / "two-models-1.svg").read_text(encoding="utf-8")
    assert all(f">{rule}<" in picture for rule in given["rules"])


def test_a_run_with_another_plan_is_refused(data: Path, small: list[Path], tmp_path: Path) -> None:
    problems = load(data, validation_rows=8)
    run.Run(TINY, problems, tmp_path / "out", seed=0)
    with pytest.raises(ConfigError, match="another plan or seed; choose another directory"):
        run.Run(TINY, problems, tmp_path / "out", seed=1)


def test_results_of_marks_are_found_to_the_closing_signs(tokenizer: PreTrainedTokenizerFast) -> None:
    merging = merging_tokenizer(problem(3)["answer"], across_words=False)
    text = "a <<3*2=6>>6 b <<12/4=3>>3"
    ids = merging(text)["input_ids"]
    example = measure.Example([ids[0], *ids], [False] + [True] * len(ids))
    (places,) = measure.results_in([example], measure.TextTokenizer(merging))
    assert [merging.decode(ids[place.start : place.stop]) for place in places] == ["6>>", "3>>"]


def test_validation_rows_are_held_out_of_train_and_always_the_same(data: Path) -> None:
    problems, again = (load(data, validation_rows=5) for _ in range(2))
    assert problems == again
    assert (len(problems.train), len(problems.validation), len(problems.test)) == (35, 5, 6)
    assert not {row.where for row in problems.train} & {row.where for row in problems.validation}
    with pytest.raises(DataError, match="40 training rows, expected more than the 300"):
        load(data)


@pytest.mark.parametrize(
    ("expression", "result", "right"),
    [
        ("48/2", "24", True),
        ("48/2", "24.0", True),
        ("48/2", "25", False),
        ("1/3", "0.33", True),
        ("2/3", "0.66", True),
        ("2/3", "0.67", True),
        ("2/3", "0.7", False),
        ("1,000*2", "2,000", True),
        ("(1-3)*-2/.5", "8", True),
        ("+30+46.5", "76.5", True),
        ("a+b", "3", False),
        ("2**3", "8", False),
        ("2(3)", "6", False),
        ("1.2.3", "0", False),
        ("1/0", "0", False),
    ],
)
def test_a_mark_is_right_if_its_result_is(expression: str, result: str, right: bool) -> None:
    assert is_right(expression, result) == right


def test_a_solution_is_scored_by_its_marks() -> None:
    assert mark_score("<<1+1=2>>2 <<1+1=3>>3", "") == 0.5
    assert mark_score("nothing", "") == 0


def test_a_base_from_scratch_learns_its_texts_and_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    texts = [problem(number)["answer"] for number in range(3, 9)]
    tokenizer = merging_tokenizer(*texts, across_words=False)
    state = torch.random.get_rng_state()
    for name, steps in (("one", 10), ("two", 10), ("begun", 1)):
        make_base(texts, tokenizer, tmp_path / name, steps=steps, seed=3)
    one, two, begun = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two", "begun"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
    assert one(input_ids=ids, labels=ids).loss < begun(input_ids=ids, labels=ids).loss - 1
