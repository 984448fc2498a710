"""The recipe's tokenizer, models and arithmetic, on a handful of problems and tiny sizes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from collm.errors import DataError, WriteError
from collm.training.data import Row
from recipes.gsm8k_calculator import models
from recipes.gsm8k_calculator.data import (
    MARK,
    TEMPLATE,
    Arithmetic,
    Problems,
    evaluate,
    format_exact,
    load_problems,
    text_of,
)
from recipes.gsm8k_calculator.models import (
    CONTEXT_TOKENS,
    SIZES,
    Size,
    Training,
    make_arithmetic,
    make_base,
    make_models,
    train_tokenizer,
)

QUESTIONS = {
    "Ann has 48 pens and gives half of them away. How many are left?": (
        "Ann gives away 48/2 = <<48/2=24>>24 pens.\nSo 48-24 = <<48-24=24>>24 pens are left.\n#### 24"
    ),
    "Tickets cost $12.50. How much do 3 tickets and a drink for $2 cost?": (
        "Tickets cost 3*12.50 = $<<3*12.50=37.50>>37.50.\nIn all it is $<<37.50+2=39.5>>39.5.\n#### 39.5"
    ),
    "20% of 1,500 birds are gray, and the rest? Ça: ½ of 7 €.": (
        "There are 1500*20/100=<<1500*20/100=300>>300 gray ones.\n(1500-300)*1 = <<(1500-300)*1=1200>>1,200\n#### 1200"
    ),
    "Bo owes 5 dollars and pays 3 of them. What is his balance?": "It is 3-5 = <<3-5=-2>>-2 dollars.\n#### -2",
}
ROWS = [Row(question, answer, None, f"here:{n}") for n, (question, answer) in enumerate(QUESTIONS.items(), start=1)]
TEXTS = [text_of(row) for row in ROWS]
TINY = Size(
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    initializer_range=0.1,
    base=Training(steps=30, batch_tokens=512, learning_rate=1e-2),
    arithmetic=Training(steps=30, batch_tokens=512, learning_rate=1e-2),
    window=64,
    threads=1,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with 40 rows of train and 4 of test."""
    for split, count in (("train", 40), ("test", 4)):
        lines = [
            json.dumps({"question": f"{n}: {row.prompt}", "answer": row.completion})
            for n in range(count)
            for row in ROWS[n % 4 : n % 4 + 1]
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"([\d.]+) nats/token", printed)]


# Data


def test_validation_rows_are_held_out_of_train_and_always_the_same(directory: Path) -> None:
    problems, again = (load_problems(directory, validation_rows=5) for _ in range(2))
    assert problems == again
    assert (len(problems.train), len(problems.validation), len(problems.test)) == (35, 5, 4)
    assert not {row.where for row in problems.train} & {row.where for row in problems.validation}


def test_more_rows_to_hold_out_than_there_are(directory: Path) -> None:
    with pytest.raises(DataError, match="40 training rows, expected more than the 300"):
        load_problems(directory)


def test_arithmetic_lines_are_right_and_have_the_form_of_marks() -> None:
    lines = list(Arithmetic(TEXTS).lines(0, 500))
    operands = set()
    for line in lines:
        match = re.fullmatch(r"<<([-+*/().\d]+)=(-?\d+(?:\.\d*[1-9])?)>>(.*)", line)
        assert match is not None, line
        expression, result, repeated = match.groups()
        exact = re.sub(r"\d+\.?\d*|\.\d+", lambda number: f"Fraction('{number[0]}')", expression)
        assert eval(exact, {"Fraction": Fraction}) == Fraction(result)
        assert repeated == result
        operands |= set(re.findall(r"[\d.]+", expression))
    forms = {re.sub(r"\d", "9", line.split("=")[0]) for line in lines}
    assert forms == {re.sub(r"\d", "9", f"<<{expression}") for text in TEXTS for expression, _ in MARK.findall(text)}
    assert len(operands) > 100


def test_arithmetic_is_seeded_and_endless() -> None:
    arithmetic = Arithmetic(TEXTS)
    assert list(arithmetic.lines(1, 20)) == list(islice(arithmetic.lines(1), 20)) != list(arithmetic.lines(2, 20))


def test_arithmetic_needs_marks() -> None:
    with pytest.raises(DataError, match="no calculator mark"):
        Arithmetic(["nothing here, << >>", "a wrong one: <<2+2=5>>5"])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", 24),
        ("+30+46.5", Fraction(153, 2)),
        (".1*3", Fraction(3, 10)),
        ("(1-3)*-2/3", Fraction(4, 3)),
        (" 5 ", 5),
        ("5/(2-2)", None),
        ("2**3", None),
        ("5 6", None),
        ("2(3)", None),
        ("1.2.3", None),
        ("u5", None),
        ("2*", None),
        ("", None),
    ],
)
def test_evaluate(expression: str, value: Fraction | None) -> None:
    assert evaluate(expression) == value


def test_exact_numbers_are_written_as_short_as_they_are() -> None:
    values = [Fraction(24), Fraction(-1, 2), Fraction(1, 8), Fraction(1200), Fraction(1, 3)]
    assert [format_exact(value, most_places=3) for value in values] == ["24", "-0.5", "0.125", "1200", None]
    assert format_exact(Fraction(1, 8), most_places=2) is None


# Tokenizer


@pytest.mark.parametrize("text", [*TEXTS, "a 1<<12=3>>4 5==6>= $7 x8y ½ 日本 9\n\n0"])
def test_digits_and_the_signs_of_marks_stand_alone(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    token_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(token_ids) == text
    pieces = [tokenizer.decode([token_id]) for token_id in token_ids]
    assert all(len(piece) == 1 for piece in pieces if re.search("[0-9]", piece))
    assert {piece for piece in pieces if re.search("[<>=]", piece)} <= {"<<", ">>", "=", " =", "<", ">"}


def test_a_mark_is_the_same_tokens_in_any_company(tokenizer: PreTrainedTokenizerFast) -> None:
    mark = tokenizer("<<48/2=24>>24")["input_ids"]
    text = tokenizer("so it is $<<48/2=24>>24.")["input_ids"]
    assert any(text[i : i + len(mark)] == mark for i in range(len(text)))
    assert [tokenizer.decode([token_id]) for token_id in mark] == ["<<", *"48/2=24", ">>", *"24"]


def test_prompts_have_the_same_tokens_in_training_and_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in ROWS:
        encoded = TEMPLATE.encode_completion(tokenizer, str(row.prompt), row.completion)
        assert encoded.token_ids == [*tokenizer(text_of(row))["input_ids"], tokenizer.eos_token_id]


# Models


def test_the_models_are_made_and_load(tmp_path: Path) -> None:
    problems = Problems(ROWS, ROWS[:1], ROWS[:1])
    short = replace(TINY, base=replace(TINY.base, steps=2), arithmetic=replace(TINY.arithmetic, steps=2))
    assert make_models(problems, short, tmp_path / "models", seed=0) == tmp_path / "models"
    tokenizers = []
    for name in ("base", "arithmetic"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / name)
        tokenizers.append(AutoTokenizer.from_pretrained(tmp_path / "models" / name))
        assert model.config.max_position_embeddings == CONTEXT_TOKENS
        assert model.config.eos_token_id == tokenizers[-1].eos_token_id is not None
        assert model.config.vocab_size == len(tokenizers[-1])
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


@pytest.mark.parametrize("make", [make_base, make_arithmetic])
def test_the_loss_falls_and_the_same_seed_gives_the_same_weights(
    make: object, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(make)
    state = torch.random.get_rng_state()
    first = make(ROWS, tokenizer, TINY, seed=3)
    seen = losses(capsys.readouterr().err)
    assert seen[-1] < seen[0] - 1
    second = make(ROWS, tokenizer, TINY, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = make(ROWS, tokenizer, replace(TINY, base=replace(TINY.base, steps=1)), seed=4)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_expert_learns_marks_and_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    marks = models._marks(Arithmetic(TEXTS).lines(0), tokenizer, rng)
    texts = tokenizer(TEXTS)["input_ids"]
    whole = 0
    for token_ids, labels in islice(models._marks_in_text(marks, texts, 64, rng), 100):
        assert len(token_ids) == len(labels) == 64
        assert all(label in (-100, token_id) for token_id, label in zip(token_ids, labels, strict=True))
        learned = tokenizer.decode([label for label in labels if label != -100])
        assert re.fullmatch(r"[-+*/().\d<>=]*", learned)
        whole += learned.count("<<")
    assert 0 < whole < 100


def test_lone_marks_begin_a_line_and_their_results_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    marks = models._marks(Arithmetic(TEXTS).lines(0), tokenizer, random.Random(0))
    for token_ids, labels in islice(models._lone_marks(marks, tokenizer), 20):
        text = tokenizer.decode(token_ids)
        assert re.fullmatch(r"\n<<[^=]+=([^=]+)>>\1", text)
        learned = tokenizer.decode([label for label in labels if label != -100])
        assert learned in (text, "\n" + text.partition("=")[2])


def test_batches_hold_every_example_once(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [random.Random(i).randint(2, 90) for i in range(512)]

    def examples() -> Iterator[models.Example]:
        while True:
            yield from (([i % 7 + 1] * length, [i] * length) for i, length in enumerate(lengths))

    seen: list[int] = []
    for token_ids, labels in models._batches(examples(), 200, random.Random(0)):
        assert token_ids.shape == labels.shape
        assert token_ids.numel() <= 200
        assert torch.equal(token_ids == 0, labels == -100)
        seen += labels[:, 0].tolist()
        if len(seen) >= 512:
            break
    assert sorted(seen) == list(range(512))


def test_a_text_longer_than_the_model_reads_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"here:7: the text has \d+ tokens, expected at most 1024"):
        make_base([Row("7" * 1100, "1", None, "here:7")], tokenizer, TINY, seed=0)


def test_failure_leaves_what_was_there(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models._new_model(TINY, tokenizer, seed=0)
    models.save(model, tokenizer, tmp_path / "base")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    for name in ("base", "new"):
        with pytest.raises(WriteError, match="No space left"):
            models.save(model, tokenizer, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_sizes() -> None:
    for size, least, most in ((SIZES["small"], 0.8e6, 1.0e6), (SIZES["gpu"], 60e6, 120e6)):
        with torch.device("meta"):
            model = models._new_model(size, train_tokenizer(TEXTS, vocab_size=400), seed=0)
        body = model.num_parameters() - model.get_input_embeddings().weight.numel()
        assert least <= body + models.VOCAB_SIZE * size.hidden_size <= most
