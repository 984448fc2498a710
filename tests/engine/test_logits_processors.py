"""Penalties, biases and constraints act on whoever writes; what is drafted ahead stays exact with each of them."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams, StructuredOutputs, ToolSpec
from collm.core.combinations import ContrastivePolicy, MixturePolicy, ProductPolicy
from collm.core.policies import (
    BudgetPolicy,
    ConfidencePolicy,
    JointPolicy,
    Policy,
    SingleAuthorPolicy,
    ThresholdPolicy,
)
from collm.engine.request import Request
from collm.errors import ConfigError, RequestError
from collm.models.tools import ToolModel
from collm.tools.calls import in_process
from tests.engine.slow import slow_decode
from tests.engine.test_engine import random_head
from tests.engine.test_exactness import Plans, relative_of
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer

TEXTS = ('{"name": "Ada", "age": 36}', "the cat sat on the mat and the dog sat on the log")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


BYTES = merging_tokenizer(*TEXTS)
EOS = int(BYTES.eos_token_id)


@pytest.fixture(scope="module")
def trio() -> list[PreTrainedModel]:
    config = tiny_config(vocab_size=len(BYTES), max_position_embeddings=256, eos_token_id=EOS)
    base = make_model(config, 0)
    return [base, relative_of(base, config, 1, 0.15), relative_of(base, config, 2, 0.3)]


@pytest.fixture(scope="module")
def model(trio: list[PreTrainedModel]) -> CoLLM:
    return CoLLM(trio[0], trio[1:], random_head(32, 2), BYTES)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    return Plans(monkeypatch, random.Random(0))


def prompts_of(seed: int, count: int, vocab_size: int = 290) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


POLICIES: list[Policy] = [
    ThresholdPolicy(0.5),
    BudgetPolicy(0.3, 0.4, burst=2),
    JointPolicy(),
    SingleAuthorPolicy(2),
    ConfidencePolicy(),
    MixturePolicy(),
    ProductPolicy(0.4),
    ContrastivePolicy(0.1, 0.5),
]

CHANGES: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "repetition": {"repetition_penalty": 1.4},
    "encouraged": {"presence_penalty": -2.0, "frequency_penalty": -0.5, "repetition_penalty": 0.8},
    "bias": {"logit_bias": {7: 4.0, 80: 3.5, 100: -100.0}},
    "allowed": {"allowed_token_ids": list(range(30, 60))},
    "bad words": {"bad_words": ["the", "cat sat", "a"]},
    "min tokens": {"min_tokens": 9, "logit_bias": {EOS: 8.0}},
    "stop token": {"stop_token_ids": [80, 33, 64], "logit_bias": {80: 2.0}, "min_tokens": 4},
    "ignored end": {"ignore_eos": True, "logit_bias": {EOS: 5.0}},
    "regex": {"structured_outputs": StructuredOutputs(regex=r"[a-d]{2,9}( [x-z]+)*\.?")},
    "json": {"structured_outputs": StructuredOutputs(json=SCHEMA)},
    "grammar": {
        "structured_outputs": StructuredOutputs(grammar='start: ("the " word)+\nword: "cat" | "dog" | /[0-9]+/')
    },
    "all": {
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "logit_bias": {64: 2.0, 65: 1.0},
        "bad_words": ["dd"],
        "min_tokens": 5,
        "structured_outputs": StructuredOutputs(regex="[a-f ]{3,}"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.9, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", CHANGES)
def test_every_rule_equals_the_slow_loop_with_every_processor(
    name: str, temperature: float, model: CoLLM, trio: list[PreTrainedModel], plans: Plans
) -> None:
    prompts = prompts_of(5, len(POLICIES))
    params = [
        SamplingParams(14, temperature, seed=i if temperature or policy.draws else None, **CHANGES[name])
        for i, policy in enumerate(POLICIES)
    ]
    out = model.generate(prompts, params, policy=POLICIES, max_batch=3)
    for prompt, each, policy, completion in zip(prompts, params, POLICIES, out, strict=True):
        expected = slow_decode(trio, model.head, prompt, policy, each, EOS, BYTES, guess=completion.token_ids)
        assert (completion.token_ids, completion.authors) == expected, policy


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 6))])
def test_mixed_requests_leave_each_other_alone(
    seed: int, model: CoLLM, trio: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with and without processors, joining and leaving at random."""
    rng = random.Random(seed)
    Plans(monkeypatch, rng)
    engine = model.engine(4)
    requests, came = {}, {}
    todo = [*CHANGES.values(), {}, {}, {}]
    rng.shuffle(todo)
    try:
        while engine.has_work or todo:
            while todo and rng.random() < 0.5:
                policy = rng.choice(POLICIES)
                params = SamplingParams(rng.randint(9, 16), 0.7, top_p=0.9, seed=rng.randrange(99), **todo.pop())
                (prompt,) = prompts_of(rng.randrange(99), 1)
                requests[engine.add(Request(prompt, params, policy))] = prompt, params, policy
            for output in engine.step():
                assert output.failure is None
                if output.completion is not None:
                    came[output.number] = output.completion.token_ids, output.completion.authors
    finally:
        engine.close()
    for number, (prompt, params, policy) in requests.items():
        expected = slow_decode(trio, model.head, prompt, policy, params, EOS, BYTES, guess=came[number][0])
        assert came[number] == expected


def test_reported_log_probabilities_are_those_of_the_models(model: CoLLM) -> None:
    (prompt,) = prompts_of(3, 1)
    plain = model.generate([prompt], SamplingParams(1, logprobs=3), threshold=0.5)[0]
    best = plain.token_ids[0]
    other = model.generate([prompt], SamplingParams(1, logprobs=3, logit_bias={best: -50.0}), threshold=0.5)[0]
    assert other.token_ids[0] == plain.top_logprobs[0][1][0]
    assert other.top_logprobs == plain.top_logprobs
    assert other.logprobs[0] == pytest.approx(plain.top_logprobs[0][1][1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.0])
def test_texts_have_the_form_that_was_asked_for_whoever_writes(model: CoLLM, threshold: float) -> None:
    def text(**form: Any) -> str:
        params = SamplingParams(120, 1.0, seed=1, structured_outputs=StructuredOutputs(**form))
        completion = model.generate(["x"], params, threshold=threshold)[0]
        assert completion.finish_reason in ("stop", "eos")
        return completion.text

    found = json.loads(text(json=SCHEMA))
    assert set(found) == {"name", "age"}
    assert isinstance(found["age"], int)
    assert json.loads(text(json=json.dumps(SCHEMA))).keys() == {"name", "age"}
    assert re.fullmatch(r"\d{3}-\d{4}", text(regex=r"\d{3}-\d{4}"))
    assert text(choice=["yes", 'no "\n', "maybe\\"]) in ("yes", 'no "\n', "maybe\\")
    assert re.fullmatch("(ab)+c", text(grammar='start: "ab"+ "c"'))
    assert re.fullmatch("(ab)+c", text(grammar='root ::= ("ab")+ "c"'))


def test_any_object_is_an_object(model: CoLLM) -> None:
    form = StructuredOutputs(json_object=True)
    params = SamplingParams(200, structured_outputs=form, logit_bias={model.tokenizer.encode("}")[0]: 6.0})
    assert isinstance(json.loads(model.generate(["x"], params, threshold=0.5)[0].text), dict)


def test_stop_strings_wait_for_the_least_length_and_may_be_kept(model: CoLLM) -> None:
    whole = model.generate(["the cat"], SamplingParams(20, ignore_eos=True), threshold=0.5)[0]
    place = next(n for n in range(6, 20) if whole.token_texts[n].strip() and whole.token_texts[n].isascii())
    stop = whole.token_texts[place]
    first = whole.text.find(stop)
    cut = model.generate(["the cat"], SamplingParams(20, ignore_eos=True, stop=stop), threshold=0.5)[0]
    assert cut.text == whole.text[:first]
    kept = SamplingParams(20, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert model.generate(["the cat"], kept, threshold=0.5)[0].text == whole.text[: first + len(stop)]
    later = replace(kept, min_tokens=place)
    found = model.generate(["the cat"], later, threshold=0.5)[0]
    assert found.token_ids == whole.token_ids[: place + 1]
    assert found.text == whole.text[: len(found.text)]
    assert found.text.endswith(stop)


def test_a_stop_token_ends_the_text_and_may_be_kept(model: CoLLM) -> None:
    whole = model.generate(["the cat"], SamplingParams(12, ignore_eos=True), threshold=0.5)[0]
    token = whole.token_ids[5]
    place = whole.token_ids.index(token)
    params = SamplingParams(12, stop_token_ids=[token], ignore_eos=True)
    cut = model.generate(["the cat"], params, threshold=0.5)[0]
    assert (cut.finish_reason, cut.token_ids) == ("stop", whole.token_ids[: place + 1])
    assert cut.token_texts[-1] == ""
    kept = model.generate(["the cat"], replace(params, include_stop_str_in_output=True), threshold=0.5)[0]
    assert kept.text == "".join(whole.token_texts[: place + 1])


def knows(text: str) -> str | None:
    return "cat y" if text.endswith("y") else None


@pytest.mark.slow
def test_a_tool_whose_token_is_forbidden_abstains(trio: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows))
    spec, head = ToolSpec("calculator", eps=0.05), random_head(32, 1)
    model = CoLLM(trio[0], [spec], head, BYTES)
    tool = ToolModel(spec, BYTES, name="", vocab_size=len(BYTES))
    says = BYTES.encode("cat")
    for changes in (
        {},
        {"bad_words": ["cat y"]},
        {"structured_outputs": StructuredOutputs(regex="[xyz]+")},
        {"frequency_penalty": 2.0},
        {"logit_bias": dict.fromkeys(says, -100.0)},
    ):
        for temperature in (0.0, 0.8):
            params = SamplingParams(16, temperature, seed=1 if temperature else None, **changes)
            for policy in (SingleAuthorPolicy(1), ThresholdPolicy(0.4), ConfidencePolicy(), MixturePolicy()):
                out = model.generate(["xy"], params, policy=policy)[0]
                prompt = BYTES.encode("xy")
                expected = slow_decode([trio[0], tool], head, prompt, policy, params, EOS, BYTES, guess=out.token_ids)
                assert (out.token_ids, out.authors) == expected, (changes, policy)
    banned = model.generate(["xy"], SamplingParams(8, bad_words=["cat y"]), policy=SingleAuthorPolicy(1))[0]
    assert "cat y" not in banned.text
    assert 0 in banned.authors


def test_constraints_that_contradict_each_other_end_their_own_request(model: CoLLM) -> None:
    bad = SamplingParams(8, structured_outputs=StructuredOutputs(regex="[ab]+"), allowed_token_ids=[70, 71])
    engine = model.engine(2)
    try:
        numbers = [engine.add(Request([5, 6], params, ThresholdPolicy(0.5))) for params in (bad, SamplingParams(8))]
        failures, done = {}, {}
        while engine.has_work:
            for output in engine.step():
                failures |= {output.number: output.failure} if output.failure else {}
                done |= {output.number: output.completion} if output.completion else {}
    finally:
        engine.close()
    assert list(failures) == numbers[:1]
    assert "allow no next token" in str(failures[numbers[0]])
    plain = model.generate([[5, 6]], SamplingParams(8), threshold=0.5)[0]
    assert done[numbers[1]].token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "[ab"}, "unclosed character class"),
        ({"json": {"type": "foo"}}, "foo"),
        ({"json": "{"}, "expected a JSON schema"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "root ::= ("}, "GBNF"),
    ],
)
def test_what_cannot_be_followed_is_refused(form: dict[str, Any], message: str, model: CoLLM) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate(["x"], SamplingParams(structured_outputs=StructuredOutputs(**form)), threshold=0.5)


def test_other_tokenizers_are_refused_for_structured_outputs(tokenizer: PreTrainedTokenizerFast) -> None:
    base = make_model(tiny_config(), 0)
    model = CoLLM(base, [make_model(tiny_config(), 1)], random_head(32, 1), tokenizer)
    with pytest.raises(ConfigError, match="byte-level"):
        model.generate(["w1"], SamplingParams(structured_outputs=StructuredOutputs(regex="a")), threshold=0.5)


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_unknown_tokens_are_refused(name: str, model: CoLLM) -> None:
    tokens: Any = {5000: 1.0} if name == "logit_bias" else [5000]
    with pytest.raises(RequestError, match=f"{name} has token id 5000"):
        model.generate(["x"], SamplingParams(**{name: tokens}), threshold=0.5)


def test_drafts_hold_under_a_grammar(trio: list[PreTrainedModel]) -> None:
    """Lookahead is in use and right: fewer passes of the base than tokens, the same tokens as without."""
    model = CoLLM(trio[0], trio[:1], random_head(32, 1), BYTES)
    params = SamplingParams(60, structured_outputs=StructuredOutputs(regex="(abc|abd)+"))
    out = model.generate(["abcabcabc"], params, threshold=0.5)
    plain = model.generate(["abcabcabc"], params, threshold=0.5, lookahead=0)
    assert out[0].token_ids == plain[0].token_ids
    assert out.usage["base"].forward_passes < plain.usage["base"].forward_passes


def test_nothing_is_copied_without_processors(model: CoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collm.engine.reader.Edits.apply", lambda *_: pytest.fail("logits were processed"))
    assert model.generate([[5, 6]], SamplingParams(5), threshold=0.5)[0].token_ids


@pytest.mark.slow
def test_penalties_of_a_long_text_are_those_of_its_tokens(model: CoLLM) -> None:
    """Counts grow by doubling and are taken back with drafts; at the end they are those of the text."""
    params = SamplingParams(100, 1.2, seed=4, frequency_penalty=0.5, ignore_eos=True)
    completion = model.generate(["the cat"], params, threshold=0.5)[0]
    again = model.generate(["the cat"], params, threshold=0.5, lookahead=0)[0]
    assert completion.token_ids == again.token_ids
    assert torch.tensor(completion.token_ids).unique().numel() > 40
