"""What comes over HTTP is what `CoLLM.generate` gives, whole or streamed, alone or in company."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams
from collm.core.policies import SingleAuthorPolicy
from collm.core.types import Completion
from collm.serving import app
from tests.engine.test_engine import prompts_of
from tests.serving.conftest import Running, Steps, make_pair
from tests.serving.test_faults import LONG, held, written

PROMPT = "w5 w6 w7"
CHAT = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 7}


def told(completion: Completion) -> tuple[Any, ...]:
    finish = "length" if completion.finish_reason == "length" else "stop"
    return completion.text, completion.token_ids, completion.authors, finish


def of_choice(choice: Any) -> tuple[Any, ...]:
    text = choice.text if hasattr(choice, "text") else choice.message.content
    return text, choice.collm["token_ids"], choice.collm["authors"], choice.finish_reason


def of_stream(chunks: Any) -> dict[int, tuple[Any, ...]]:
    found: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            assert text == "".join(choice.collm["texts"])
            assert len({len(column) for column in choice.collm.values()}) == 1
            one = found.setdefault(choice.index, ["", [], [], None])
            assert one[3] is None, "nothing follows the finish"
            one[0] += text
            one[1] += choice.collm["token_ids"]
            one[2] += choice.collm["authors"]
            one[3] = choice.finish_reason
    return {index: tuple(one) for index, one in found.items()}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_equals_whole_equals_generate(client: openai.OpenAI, pair: CoLLM, options: dict[str, Any]) -> None:
    params = SamplingParams(30, **options)
    (expected,) = pair.generate([PROMPT], params)
    asked: dict[str, Any] = {"model": "pair", "prompt": PROMPT, "max_tokens": 30, **options}
    whole = client.completions.create(**asked)
    assert of_choice(whole.choices[0]) == told(expected)
    assert whole.choices[0].collm["defer_probs"] == pytest.approx(expected.defer_probs, abs=1e-5)  # type: ignore[attr-defined]
    assert of_stream(client.completions.create(**asked, stream=True)) == {0: told(expected)}
    assert 0 < expected.deferral_rate < 1


def test_chats_are_rendered_by_the_template_of_the_collaboration(client: openai.OpenAI, pair: CoLLM) -> None:
    (expected,) = pair.generate([CHAT], SamplingParams(20))
    asked: dict[str, Any] = {"model": "pair", "messages": CHAT, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**asked)
    assert of_choice(whole.choices[0]) == told(expected)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert of_stream(chunks) == {0: told(expected)}
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", *[None] * (len(chunks) - 1)]
    parts = [{"type": "text", "text": "w2 "}, {"type": "text", "text": "w3"}]
    in_parts = client.chat.completions.create(**{**asked, "messages": [CHAT[0], {"role": "user", "content": parts}]})
    assert of_choice(in_parts.choices[0]) == told(expected)
    with client.chat.completions.stream(model="pair", messages=CHAT, max_tokens=20) as stream:  # type: ignore[arg-type]
        stream.until_done()
        assert stream.current_completion_snapshot.choices[0].message.content == expected.text


@pytest.mark.parametrize("prompt", ["w5 w6", ["w5 w6", "w8"], [8, 9], [[8, 9], [11]]])
def test_every_form_of_a_prompt_with_n(client: openai.OpenAI, pair: CoLLM, prompt: Any) -> None:
    several = prompt if isinstance(prompt[0], str) and isinstance(prompt, list) else [prompt]
    several = prompt if isinstance(prompt[0], list) else several
    expected = pair.generate([one for one in several for _ in range(2)], SamplingParams(8, 1.0, seed=3))
    asked: dict[str, Any] = {"model": "pair", "prompt": prompt, "n": 2, "best_of": 2, "max_tokens": 8, "seed": 3}
    whole = client.completions.create(**asked, temperature=1)
    assert [choice.index for choice in whole.choices] == list(range(2 * len(several)))
    assert [of_choice(choice) for choice in whole.choices] == [told(one) for one in expected]
    streamed = of_stream(client.completions.create(**asked, temperature=1, stream=True))
    assert [streamed[index] for index in range(len(streamed))] == [told(one) for one in expected]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(len(one.prompt_token_ids) for one in expected[::2])
    assert whole.usage.completion_tokens == sum(len(one.token_ids) for one in expected)


@pytest.mark.parametrize(("name", "author"), [("three/base", 0), ("three/assistant", 1), ("three/assistant-2", 2)])
def test_an_author_alone(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast, name: str, author: int) -> None:
    (alone,) = make_pair(tokenizer, 2).generate([PROMPT], SamplingParams(10), policy=SingleAuthorPolicy(author))
    reply = client.completions.create(model=name, prompt=PROMPT, max_tokens=10)
    assert of_choice(reply.choices[0]) == told(alone)
    assert reply.model == name
    by_author = {"base": 0, "assistant": 0, "assistant-2": 0, name.partition("/")[2]: 10}
    assert reply.usage.collm == {**by_author, "deferral_rate": float(author > 0)}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ({"threshold": 0.9}, {"threshold": 0.9}),
        ({"threshold": -1}, {"threshold": -1}),
        ({"budget": 0.2}, {"budget": 0.2}),
        ({"policy": "joint"}, {"policy": "joint"}),
        ({"policy": "mixture"}, {"policy": "mixture"}),
        ({"policy": "contrastive:beta=0.3"}, {"policy": "contrastive:beta=0.3"}),
        ({"policy": "threshold", "threshold": 0.2}, {"threshold": 0.2}),
    ],
    ids=str,
)
def test_who_writes_is_said_in_the_request(client: openai.OpenAI, pair: CoLLM, extra: Any, options: Any) -> None:
    (expected,) = pair.generate([PROMPT], SamplingParams(16), **options)
    body = {"collm": extra}
    reply = client.completions.create(model="pair", prompt=PROMPT, max_tokens=16, extra_body=body)
    assert of_choice(reply.choices[0]) == told(expected)
    usage = {"base": expected.authors.count(0), "assistant": expected.authors.count(1)}
    assert reply.usage.collm == {**usage, "deferral_rate": expected.deferral_rate}  # type: ignore[union-attr]
    assert reply.collm == {"author_names": ["base", "assistant"]}  # type: ignore[attr-defined]


def test_a_price_is_said_in_the_request_or_for_the_server(
    serve: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    gains = make_pair(tokenizer, 2)
    gains.head.predicts_gain = True
    wanted: list[list[float]] = [[0.3], [0.3, 1.5]]
    expected = [told(gains.generate([PROMPT], SamplingParams(16), price=price)[0]) for price in wanted]
    assert expected[0] != expected[1]
    with serve({"gains": gains}, price=wanted[1]) as server:
        for extra, answer in (
            ({"price": 0.3}, 0),
            ({"price": [0.3, 1.5]}, 1),
            ({"policy": "price:0.3,1.5"}, 1),
            ({}, 1),
        ):
            body = {"model": "gains", "prompt": PROMPT, "max_tokens": 16, "extra_body": {"collm": extra}}
            assert of_choice(server.openai().completions.create(**body).choices[0]) == expected[answer]


def test_a_random_policy_takes_a_seed_at_temperature_0(client: openai.OpenAI, pair: CoLLM) -> None:
    (expected,) = pair.generate([PROMPT], SamplingParams(16, seed=4), policy="random:rate=0.5")
    body = {"collm": {"policy": "random:rate=0.5"}}
    reply = client.completions.create(model="pair", prompt=PROMPT, max_tokens=16, seed=4, extra_body=body)
    assert of_choice(reply.choices[0]) == told(expected)


def test_stop_ends_the_text_before_it(client: openai.OpenAI, pair: CoLLM) -> None:
    (whole,) = pair.generate([PROMPT], SamplingParams(20))
    words = whole.text.split()
    stop = f"{words[5][-1]} {words[6]}"
    (expected,) = pair.generate([PROMPT], SamplingParams(20, stop=stop))
    for given in (stop, ["nothing", stop]):
        asked: dict[str, Any] = {"model": "pair", "prompt": PROMPT, "max_tokens": 20, "stop": given}
        reply = client.completions.create(**asked)
        assert of_choice(reply.choices[0]) == told(expected)
        assert reply.choices[0].finish_reason == "stop"
        assert of_stream(client.completions.create(**asked, stream=True)) == {0: told(expected)}
    assert len(expected.text) < len(whole.text)


def test_the_end_of_a_text_is_a_stop(tokenizer: PreTrainedTokenizerFast, serve: Any) -> None:
    pair = make_pair(tokenizer)
    (long,) = pair.generate([PROMPT], SamplingParams(9), threshold=0.5)
    for model in (pair.base, *pair.assistants):
        model.generation_config.eos_token_id = [1, long.token_ids[4]]  # type: ignore[union-attr]
    ending = CoLLM(pair.base, pair.assistants, pair.head, tokenizer)
    with serve({"pair": ending}) as server, server.openai() as client:
        body = {"collm": {"threshold": 0.5}}
        reply = client.completions.create(model="pair", prompt=PROMPT, max_tokens=9, extra_body=body)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == long.token_ids.index(long.token_ids[4]) + 1


def test_usage_in_a_stream_comes_last_and_only_if_asked(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "pair", "prompt": PROMPT, "max_tokens": 6, "stream": True}
    *chunks, last = client.completions.create(**asked, stream_options={"include_usage": True})
    whole = client.completions.create(**{**asked, "stream": False})
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)
    plain = list(client.completions.create(**asked))
    assert all("usage" not in chunk.model_fields_set and chunk.choices for chunk in plain)


def test_echo_puts_the_prompt_before_the_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "pair", "max_tokens": 4}
    text = client.completions.create(**asked, prompt=[8, 9]).choices[0].text
    for prompt in ("w5 w6", [8, 9]):
        reply = client.completions.create(**asked, prompt=prompt, echo=True)
        assert reply.choices[0].text == "w5 w6" + text
    chunks = list(client.completions.create(**asked, prompt="w5 w6", echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "w5 w6" + text


def test_log_probabilities_of_completions(client: openai.OpenAI, pair: CoLLM) -> None:
    (expected,) = pair.generate([PROMPT], SamplingParams(8, 1.0, seed=2, logprobs=3))
    asked: dict[str, Any] = {"model": "pair", "prompt": PROMPT, "max_tokens": 8, "temperature": 1, "seed": 2}
    choice = client.completions.create(**asked, logprobs=3).choices[0]
    found = choice.logprobs
    assert found is not None
    assert "".join(found.tokens or []) == choice.text
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert [
        choice.text[at:][: len(token)] for at, token in zip(found.text_offset or [], found.tokens or [], strict=True)
    ] == found.tokens
    for token, logprob, listed, top in zip(
        found.tokens or [], expected.logprobs, found.top_logprobs or [], expected.top_logprobs, strict=True
    ):
        names = [name.strip() for name in listed]
        likeliest = pair.tokenizer.convert_ids_to_tokens([token_id for token_id, _ in top])
        assert names[:3] == likeliest
        assert listed[token] == pytest.approx(logprob, abs=1e-4)
    chunks = list(client.completions.create(**asked, logprobs=3, stream=True))
    offsets = [at for chunk in chunks for at in chunk.choices[0].logprobs.text_offset]  # type: ignore[union-attr]
    assert offsets == found.text_offset
    none = client.completions.create(**asked, logprobs=0).choices[0].logprobs
    assert none is not None
    assert none.top_logprobs is None
    assert none.tokens == found.tokens
    assert client.completions.create(**asked).choices[0].logprobs is None


def test_log_probabilities_of_chats(client: openai.OpenAI, pair: CoLLM) -> None:
    (expected,) = pair.generate([CHAT], SamplingParams(8, logprobs=2))
    asked: dict[str, Any] = {"model": "pair", "messages": CHAT, "max_tokens": 8, "logprobs": True}
    choice = client.chat.completions.create(**asked, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert [one.logprob for one in content] == pytest.approx(expected.logprobs, abs=1e-4)
    assert bytes(byte for one in content for byte in one.bytes or []).decode() == choice.message.content
    for one, top in zip(content, expected.top_logprobs, strict=True):
        assert [each.logprob for each in one.top_logprobs] == pytest.approx([p for _, p in top], abs=1e-4)
        assert one.token == one.top_logprobs[0].token
    plain = client.chat.completions.create(**asked).choices[0].logprobs
    assert plain is not None
    assert plain.content is not None
    assert [one.top_logprobs for one in plain.content] == [[]] * 8


def test_company_changes_nothing(server: Running, client: openai.OpenAI) -> None:
    """Forty requests at once, of every kind, against each alone."""
    kinds: list[dict[str, Any]] = [
        {"model": "pair"},
        {"model": "pair", "extra_body": {"collm": {"threshold": 0.9}}},
        {"model": "pair", "extra_body": {"collm": {"policy": "mixture"}}, **SAMPLED},
        {"model": "pair/assistant"},
        {"model": "three", "extra_body": {"collm": {"threshold": 0.3}}, **SAMPLED},
        {"model": "three", "extra_body": {"collm": {"policy": "joint"}}, "logprobs": 2},
        {"model": "three/assistant-2", "temperature": 1, "seed": 1},
    ]
    asked = [{**kinds[i % len(kinds)], "prompt": prompt} for i, prompt in enumerate(prompts_of(8, 40))]

    def ask(one: dict[str, Any]) -> tuple[Any, ...]:
        return of_choice(client.completions.create(**one, max_tokens=15).choices[0])

    in_turn = [ask(one) for one in asked]
    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(ask, asked)) == in_turn
    server.until(server.idle)


def test_what_there_is(server: Running, client: openai.OpenAI) -> None:
    expected = ["pair", "three", "pair/base", "pair/assistant", "three/base", "three/assistant", "three/assistant-2"]
    assert [model.id for model in client.models.list()] == expected
    assert client.models.retrieve("pair/base").id == "pair/base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    pair, three = server.client.get("/v1/collm/info").json()["data"]
    assert (pair["author_names"], pair["alone"]) == (["base", "assistant"], ["pair/base", "pair/assistant"])
    assert pair["default_threshold"] == 0.5
    assert [point["threshold"] for point in pair["calibration"]["points"]] == [1.0, 0.5]
    assert (three["calibration"], three["default_threshold"], three["chat"]) == (None, None, True)
    assert server.client.get("/health").json() == server.client.get("/ready").json() == {"status": "ok"}


def test_candidates_are_those_of_the_collaboration(server: Running, client: openai.OpenAI, pair: CoLLM) -> None:
    reply = client.chat.completions.create(model="pair", messages=CHAT, max_tokens=6)  # type: ignore[arg-type]
    token_ids = reply.choices[0].collm["token_ids"]  # type: ignore[attr-defined]
    expected = pair.candidates(CHAT, token_ids, 3)
    found = server.post("/v1/collm/candidates", model="pair", messages=CHAT, token_ids=token_ids, most=3).json()
    assert found["author_names"] == ["base", "assistant"]
    texts = [[[text for text, _ in of_author] for of_author in at] for at in found["candidates"]]
    assert texts == [[[text for text, _ in of_author] for of_author in at] for at in expected]
    as_ids = pair.template.encode_prompt(pair.tokenizer, CHAT)
    again = server.post("/v1/collm/candidates", model="pair", prompt=as_ids, token_ids=token_ids, most=3).json()
    assert again == found


ASKED: dict[str, Any] = {"model": "pair", "prompt": "w5 w6", "max_tokens": 4}


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def written_ids(text: str) -> list[int]:
    """The tokens of a stream of any route."""
    parts = [event["choices"][0] if event.get("choices") else event for event in events(text)]
    kinds = None, "response.output_text.delta"
    deltas = [part["collm"] for part in parts if "collm" in part and part.get("type") in kinds]
    return [token_id for delta in deltas for token_id in delta["token_ids"]]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_stream_goes_on_while_nothing_is_written(path: str, serve_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_HEAD_S", 0.05)
    monkeypatch.setattr(app, "_COMMENT_S", 0.05)
    prompts = {"completions": {"prompt": "w5"}, "responses": {"input": "w5"}}
    messages = {"messages": [{"role": "user", "content": "w5"}]}
    body = {"model": "pair", "stream": True, **prompts.get(path.removeprefix("/v1/"), messages)}
    with serve_pair() as server:
        expected = written_ids(server.post(path, **body).text)
        with held(server.worker()), server.client.stream("POST", path, json=body) as reply:
            lines = reply.iter_lines()
            assert reply.status_code == 200
            found = [next(lines) for _ in range(12)]
        assert sum(line.startswith(": ") for line in found) >= 2
        server.until(server.idle)
        steps = Steps(server.worker())
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(server.post, path, **body)
            for _ in range(3):
                threading.Event().wait(0.1)
                steps.allow(1)
            steps.allow(1000)
            text = slow.result().text
        assert ": nothing new" in text
        assert written_ids(text) == expected


def test_a_failure_after_the_head_is_an_event(serve_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_HEAD_S", 0.02)
    with serve_pair(time_limit_s=0.3) as server:
        with held(server.worker()):
            reply = server.post("/v1/completions", **LONG, stream=True)
        assert reply.status_code == 200
        assert events(reply.text)[-1]["error"]["code"] == "time_limit"


def test_usage_is_in_every_chunk_if_asked(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(server.post("/v1/completions", **ASKED, stream=True, stream_options=options).text)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 4
    plain = server.post("/v1/completions", **ASKED, stream=True, stream_options={"continuous_usage_stats": True}).text
    assert not any("usage" in event for event in events(plain))


def test_tokens_are_named_by_their_ids_if_asked(server: Running) -> None:
    reply = server.post("/v1/completions", **ASKED, logprobs=2, return_tokens_as_token_ids=True).json()["choices"][0]
    names = [f"token_id:{token_id}" for token_id in reply["collm"]["token_ids"]]
    assert reply["logprobs"]["tokens"] == names
    assert all(name in top for name, top in zip(names, reply["logprobs"]["top_logprobs"], strict=True))
    chat = {"model": "pair", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 3}
    options = {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}
    reply = server.post("/v1/chat/completions", **chat, **options).json()["choices"][0]
    entries = reply["logprobs"]["content"]
    assert [one["token"] for one in entries] == [f"token_id:{token_id}" for token_id in reply["collm"]["token_ids"]]
    assert all(top["token"].startswith("token_id:") for one in entries for top in one["top_logprobs"])


@pytest.mark.parametrize("prompt", [[5] * 128, [5] * 3000, "w5 " * 200, "w5 " * 100_000])
def test_a_prompt_that_is_too_long_has_openais_code(prompt: Any, server: Running) -> None:
    for path, body in [
        ("/v1/completions", {"prompt": prompt}),
        ("/v1/collm/candidates", {"prompt": prompt, "token_ids": [5]}),
    ]:
        reply = server.post(path, model="pair", **body)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded", reply.text


def test_an_empty_prompt_gets_no_hint_of_another_route(server: Running) -> None:
    error = server.post("/v1/completions", model="pair", prompt="").json()["error"]
    assert "at least 1 character" in error["message"]
    assert "stored prompts" not in error["message"]
    stored = server.post("/v1/responses", model="pair", input="w5", prompt={"id": "x"}).json()["error"]
    assert "there are no stored prompts" in stored["message"]


def test_the_page_works_under_a_prefix(server: Running) -> None:
    page = server.client.get("/").text
    assert 'fetch("/' not in page
    assert "fetch(path.slice(1)" in page
    assert written(server.post("/v1/completions", **ASKED))
