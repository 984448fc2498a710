"""A tool as a next-token distribution: its limits, its answers however a text is cut into tokens, its failures."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from collm.errors import ToolFailure
from collm.models.tools import ToolModel, ToolRunner
from collm.text.token_text import TokenText
from collm.tools.calls import Answer, in_process
from collm.tools.spec import ToolFunction, ToolSpec
from collm.training.examples import Example
from collm.training.scores import find_scores
from tests.tokenizers import cut_anywhere, merging_tokenizer
from tests.training.conftest import score_examples

ANSWERS = {"48/2=": "24>>24", "capital:": " Улан-Батор 🦊", "x": "y"}
TOKENIZER = merging_tokenizer("<<48/2=24>>24 clips", "the capital: Улан-Батор 🦊, and so on", "=2 4>>2 24> xy")
V = len(TOKENIZER)


def answer(text: str) -> str | None:
    return next((rest for before, rest in ANSWERS.items() if text.endswith(before)), None)


def tool_model(
    function: ToolFunction = answer, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **options: float
) -> ToolModel:
    model = ToolModel(ToolSpec("calculator", **options), tokenizer, name="assistant", vocab_size=len(tokenizer))  # type: ignore[arg-type]
    model._tool = in_process(function)
    return model


def next_token(model: ToolModel, text: str, seed: int | None = None) -> int | None:
    rng = random.Random(seed)
    ids = TOKENIZER(text)["input_ids"] if seed is None else cut_anywhere(TOKENIZER, text, rng)
    return model.next_token(TokenText(TOKENIZER, ids), len(ids), {})


def test_the_distribution_sums_to_one_and_has_its_limits() -> None:
    known = next_token(tool_model(), "so 48/2=")
    assert known is not None
    for eps in (1e-6, 0.01, 0.5, 0.999):
        probs = tool_model(eps=eps).logits([known, None]).double().exp()
        assert probs.sum(-1).tolist() == pytest.approx([1, 1], abs=1e-5)
        assert probs[0, known].item() == pytest.approx(1 - eps, rel=1e-5)
        others = torch.cat([probs[0, :known], probs[0, known + 1 :]])
        assert others.tolist() == pytest.approx([eps / (V - 1)] * (V - 1), rel=1e-4)
        assert probs[1].tolist() == pytest.approx([1 / V] * V)


def test_the_calls_for_one_token_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("collm.models.tools.time.monotonic", lambda: now[0])

    def slow(text: str) -> str | None:
        now[0] += 0.5
        return answer(text)

    model = tool_model(slow, seconds=0.6)
    token_ids, answers = TOKENIZER("a long text that goes on")["input_ids"], dict[int, Answer]()
    read = TokenText(TOKENIZER, token_ids)
    with pytest.raises(ToolFailure, match=r"took longer than 2\.4 s for one token; make it faster"):
        model.next_token(read, len(token_ids), answers)
    assert len(answers) == 5
    for _ in range(3):  # it gets further each time
        with pytest.raises(ToolFailure):
            model.next_token(read, len(token_ids), answers)
    assert model.next_token(read, len(token_ids), answers) is None


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(ANSWERS)),
    st.text("ab 4=日", max_size=10),
    st.integers(0, 10**6),
    st.integers(0, 20),
)
def test_an_answer_is_continued_from_wherever_the_text_stands(before: str, head: str, seed: int, spelled: int) -> None:
    text, rng = head + before, random.Random(seed)
    whole = text + ANSWERS[before]
    if any(one in whole[:end] for one in ANSWERS if one != before for end in range(len(whole))):
        return  # two answers at once: another test
    start = len(text) + min(spelled, len(ANSWERS[before]))
    token_ids = cut_anywhere(TOKENIZER, whole[:start], rng)
    read, model = TokenText(TOKENIZER, token_ids), tool_model()
    asked: dict[int, Answer] = {}
    while (token_id := model.next_token(read, len(read), asked)) is not None:
        read.push(token_id)
        assert whole.startswith(read.text)
    assert read.text == whole


def test_a_token_that_spells_the_end_of_the_answer_and_more_ends_it() -> None:
    assert next_token(tool_model(), "48/2=24>>24 clips") is None
    assert next_token(tool_model(), "48/2=24>>25") is None
    assert next_token(tool_model(), "48/2=3") is None


def test_of_two_answers_the_one_begun_last_counts() -> None:
    model = tool_model(lambda text: {"a": "bcde", "b": "xy"}.get(text[-1:]))
    assert model.remainder("a", {}) == "bcde"
    assert model.remainder("ab", {}) == "xy"
    assert model.remainder("abx", {}) == "y"
    assert model.remainder("abc", {}) == "de"


def test_a_long_answer_is_cut() -> None:
    model = tool_model(lambda text: "z" * 100 if text == "a" else None, max_answer=5)
    assert [model.remainder("a" + "z" * n, {}) for n in range(7)] == ["zzzzz", "zzzz", "zzz", "zz", "z", None, None]


def test_what_the_vocabulary_cannot_spell_is_not_said(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tool_model(lambda text: "w7", tokenizer).next_token(TokenText(tokenizer, [5]), 1, {}) == 10
    assert tool_model(lambda text: "no such word", tokenizer).next_token(TokenText(tokenizer, [5]), 1, {}) is None


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6))
def test_scores_do_not_depend_on_how_the_text_is_cut(seed: int) -> None:
    text = "<<48/2=24>>24 clips and 48/2=25, the capital: Улан-Батор 🦊, and so on"
    answered = [text.index("24>>"), text.index("24>>") + 6], [text.index(" Улан"), text.index(" Улан") + 13]
    wrong = text.index("25")
    token_ids = cut_anywhere(TOKENIZER, text, random.Random(seed))
    model, read = tool_model(), TokenText(TOKENIZER, token_ids)
    hit, miss, unknown = model.logprobs
    logprobs, correct, abstained = model.score(token_ids, [True] * len(token_ids))
    for t in range(1, len(token_ids)):
        if not (read.whole(t) and read.whole(t + 1)):
            continue
        start, end = read.end(t), read.end(t + 1)
        if any(first <= start < last for first, last in answered):
            expected = hit
        elif start <= wrong < end:  # spells "2" rightly, "5" wrongly
            expected = {wrong: hit if end == wrong + 1 else miss}.get(start, unknown)
        elif start == wrong + 1:
            expected = miss
        else:
            expected = unknown
        assert logprobs[t - 1].item() == pytest.approx(expected), (t, text[start:end])
        assert bool(correct[t - 1]) == (expected == hit)
        assert bool(abstained[t - 1]) == (expected == unknown)


def test_scores_are_those_of_the_one_hot_model() -> None:
    """On the tokenizer's own tokens, scoring is reading the gold entry of the distributions."""
    model = tool_model(eps=0.03)
    text = "so 48/2=24>>24 clips x y, capital: Улан-Батор"
    ids = TOKENIZER("so 48/2=")["input_ids"] + TOKENIZER("24>>24")["input_ids"] + TOKENIZER(" clips x y")["input_ids"]
    assert TOKENIZER.decode(ids) == text[: text.index(",")]
    rows = model.logits(model.next_tokens(ids, range(1, len(ids))))
    logprobs, correct, _ = model.score(ids, [True] * len(ids))
    gold = torch.tensor(ids[1:])
    assert torch.equal(logprobs, rows.gather(1, gold[:, None])[:, 0])
    is_one_hot = rows.max(-1).values > math.log(0.5)
    assert torch.equal(correct, is_one_hot & (rows.argmax(-1) == gold))


def test_scores_on_disk_are_found_again_and_belong_to_the_tool(tmp_path: Path) -> None:
    ids = TOKENIZER("so <<90/3=30>>30 pens")["input_ids"]
    examples = [Example(ids, [False, *[True] * (len(ids) - 1)])]
    spec = ToolSpec("calculator")
    model = ToolModel(spec, TOKENIZER, name="calculator", vocab_size=V)
    scores = score_examples(model, examples, tmp_path, spec=spec)
    said = "".join(TOKENIZER.decode(ids[t + 1]) for t in scores.correct(0).nonzero()[:, 0].tolist())
    assert said == "30>>30"
    found = find_scores(tmp_path, examples, spec)
    assert found is not None
    assert torch.equal(found.logprobs, scores.logprobs)
    assert found.abstained is not None
    assert torch.equal(found.abstained, torch.isclose(found.logprobs, torch.tensor(model.logprobs[2])))
    with pytest.raises(Exception, match="has scores of another model: path is 'tool:calculator"):
        find_scores(tmp_path, examples, ToolSpec("calculator", eps=0.2))


def test_a_failure_stops_scoring_and_names_the_text() -> None:
    model = ToolModel(ToolSpec("tests.tools.functions:moody"), TOKENIZER, name="assistant", vocab_size=V)
    ids = TOKENIZER("we raise it")["input_ids"]
    with pytest.raises(ToolFailure, match=r"raised ValueError: no good; the text so far ends with 'we raise"):
        model.score(ids, [True] * len(ids))


@pytest.mark.slow
def test_a_failure_while_decoding_abstains_and_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = ToolModel(ToolSpec("tests.tools.functions:moody", seconds=0.5), TOKENIZER, name="tool", vocab_size=V)
    runner = ToolRunner(model)
    texts = ["we raise", "so it may go", "to sleep", "nothing"]
    slots = {runner.open(): TOKENIZER(text)["input_ids"] for text in texts}
    with caplog.at_level(logging.WARNING):
        reading = runner.extend(slots)
    assert list(reading.abstained) == [True, False, True, True]
    assert (runner.usage.calls, runner.usage.failed, runner.usage.abstained) == (4, 2, 1)
    assert "ends with 'we raise'" in caplog.text
    assert "did not answer within 0.5 s; the text so far ends with 'to sleep'" in caplog.text
    assert (runner.usage.forward_passes, runner.usage.tokens_read) == (0, 0)


def test_a_slot_answers_after_each_token_asked_for_and_rolls_back() -> None:
    runner = ToolRunner(tool_model())
    ids = TOKENIZER("so 48/2=")["input_ids"]
    answer_ids = TOKENIZER("24>>24")["input_ids"]
    slot = runner.open()
    reading = runner.extend({slot: ids + answer_ids[:2]}, {slot: 3})
    assert [bool(abstained) for abstained in reading.abstained] == [False, False, len(answer_ids) == 2]
    assert reading.logits[:2].argmax(-1).tolist() == answer_ids[:2]
    runner.rollback(slot, len(ids))
    assert runner.length(slot) == len(ids)
    wrong = TOKENIZER("31")["input_ids"]
    assert list(runner.extend({slot: wrong}).abstained) == [True]
    runner.rollback(slot, len(ids))
    assert runner.extend({slot: answer_ids[:1]}).logits.argmax().item() == answer_ids[1]
