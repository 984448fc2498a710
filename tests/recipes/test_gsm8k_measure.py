"""The recipe's measures on solutions small enough to count by hand, and the whole recipe in small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from collm import CoLLM, DeferralHead, SamplingParams, ToolSpec
from collm.core.policies import ThresholdPolicy
from collm.models.language_model import LanguageModel
from collm.models.tools import ToolModel
from collm.training.data import Row
from collm.training.examples import Examples, encode_rows
from recipes.gsm8k_calculator import run as recipe
from recipes.gsm8k_calculator.data import TEMPLATE, load_problems
from recipes.gsm8k_calculator.measure import (
    equations,
    final_answer,
    is_right,
    mark_score,
    read,
    results_in,
    written,
)
from recipes.gsm8k_calculator.models import train_tokenizer
from tests.tiny_models import make_model, tiny_config
from tests.training.conftest import score_examples

SOLUTIONS = [
    "She has 48/2 = <<48/2=24>>24 clips and 24+7=<<24+7=31>>31 in all.\n#### 31",
    "It is 3 = 3, no mark.\n#### 3",
    "He pays $<<2*4.5=9>>9.\n#### 9",
]
ROWS = [Row(f"How many, {i}?", solution, None, "here") for i, solution in enumerate(SOLUTIONS)]
TOKENIZER = train_tokenizer([str(row.prompt) + row.completion for row in ROWS], vocab_size=300)
EXAMPLES: Examples = encode_rows(ROWS, TEMPLATE, TOKENIZER, max_length=128)


def test_results_are_found_with_what_closes_them() -> None:
    spans = results_in(EXAMPLES, TOKENIZER)
    texts = []
    for example, of_one in zip(EXAMPLES, spans, strict=True):
        targets = [t for t, wanted in zip(example.token_ids[1:], example.is_target[1:], strict=True) if wanted]
        texts.append([TOKENIZER.decode(targets[span.start : span.stop]) for span in of_one])
    assert texts == [["24>>", "31>>"], [], ["9>>"]]


def test_the_calculator_completes_every_equation_and_a_base_without_it_none(tmp_path: Path) -> None:
    spec, size = ToolSpec("calculator", "marks"), len(TOKENIZER)
    scores = score_examples(
        ToolModel(spec, TOKENIZER, name="tool", vocab_size=size), EXAMPLES, tmp_path, spec=spec, max_batch_tokens=64
    )
    module = make_model(tiny_config(vocab_size=size), 0)
    seen = read(LanguageModel(module, name="base", vocab_size=size), DeferralHead(32, 1), EXAMPLES, [scores])
    spans, counts = results_in(EXAMPLES, TOKENIZER), [example.num_targets for example in EXAMPLES]
    assert equations(seen.right(-1), spans, counts).mean == 1
    assert equations(seen.right(1), spans, counts).mean == 0
    assert seen.deferred(-1).all()
    assert not seen.deferred(1).any()
    assert torch.equal(seen.asked_in_vain(-1), seen.silent[:, 1])
    assert not seen.asked_in_vain(1).any()
    assert 0 < seen.silent[:, 1].float().mean() < 1
    assert seen.rule_nll() < -seen.logprobs[:, 0].mean()
    # what one pass over the solution says is what decoding writes after its beginning
    model = CoLLM(module, [spec], DeferralHead(32, 1), TOKENIZER)
    start = SOLUTIONS[0].index("24>>")
    out = model.generate(
        ROWS[0].prompt + "\n" + SOLUTIONS[0][:start], SamplingParams(max_new_tokens=3), policy=ThresholdPolicy(-1)
    )
    assert out[0].text == "24>>"


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
        ("a+b", "3", False),
        ("1/0", "0", False),
    ],
)
def test_a_mark_is_right_if_its_result_is(expression: str, result: str, right: bool) -> None:
    assert is_right(expression, result) == right


def test_solutions_are_measured_by_their_marks_and_their_last_line() -> None:
    assert final_answer("so 5\n#### 1,200 clips", "#### 1200") == 1
    assert final_answer("so 5", "#### 5") == 0
    assert mark_score("<<1+1=2>>2 <<1+1=3>>3", "") == 0.5
    assert mark_score("nothing", "") == 0
    model = CoLLM(
        make_model(tiny_config(vocab_size=len(TOKENIZER)), 0), [ToolSpec("date")], DeferralHead(32, 1), TOKENIZER
    )
    out = model.generate(["x", "y"], SamplingParams(max_new_tokens=5), threshold=1)
    measured = written(out, ROWS[:2], calls=4, abstained=3)
    assert (measured.calls, measured.in_vain, measured.deferral_rate) == (0.4, 0.3, 0)
    assert (measured.equations, measured.num_equations, measured.answers.mean) == (None, 0, 0)


@pytest.fixture
def small_world(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 24), ("test", 4)):
        lines = []
        for i in range(count):
            answer = f"He has {i}+7 = <<{i}+7={i + 7}>>{i + 7} pens.\n#### {i + 7}"
            lines.append(json.dumps({"question": f"Tom had {i} pens and got 7.", "answer": answer}))
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return data


@pytest.mark.soak
def test_the_recipe_runs_and_goes_on_where_it_was(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = recipe.SIZES["small"]
    brief = {
        "base": replace(size.base, steps=2, batch_tokens=256),
        "arithmetic": replace(size.arithmetic, steps=60, batch_tokens=256, learning_rate=1e-2),  # must know something
    }
    tiny = replace(size, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, threads=1, window=64, **brief)
    plan = replace(recipe.PLANS["small"], size=tiny, batch_size=4, max_new_tokens=8, calibration_problems=2)
    monkeypatch.setitem(recipe.PLANS, "small", plan)
    problems = load_problems(small_world, validation_rows=4)
    monkeypatch.setattr(recipe, "load_problems", lambda source: problems)
    arguments = ["run", "--data", str(small_world), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    recipe.main()
    first = json.loads((tmp_path / "out/results.json").read_text())
    recipe.main()
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert again["rows"] == first["rows"]
    assert len(first["rows"]) == 8
    assert "| base and head with both |" in (tmp_path / "out/results.md").read_text()
    assert "<svg" in (tmp_path / "out/gsm8k.svg").read_text()
