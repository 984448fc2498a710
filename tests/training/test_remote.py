"""Scores from a server equal those of the same model in memory, and every failure has one clear error."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from email.utils import formatdate
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from collm.errors import CollmError, ConfigError, LoadError, MismatchError, ModelFailure
from collm.models.language_model import LanguageModel
from collm.training.examples import Example, Examples
from collm.training.remote import RemoteModel
from collm.training.scoring import read_scores
from tests.fake_server import THREAD, Drop, FakeServer, Hang, Refuse, Trickle, error
from tests.training.conftest import random_examples

EXAMPLES = random_examples(23)
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def module(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(1)


@pytest.fixture
def server(module: PreTrainedModel) -> Iterator[FakeServer]:
    with FakeServer(module) as fake:
        yield fake


class Naps:
    """A sleep that takes no time and remembers how long it was to be."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def remote(server: FakeServer, **changes: Any) -> RemoteModel:
    return RemoteModel(server.url, "tiny", **{"vocab_size": 97, "sleep": Naps(), **changes})


def own_threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name != THREAD and "process_request" not in one.name}


def assert_local(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], module: PreTrainedModel, examples: Examples = EXAMPLES
) -> None:
    local = read_scores(LanguageModel(module, name="local"), examples)
    assert [len(logprob) for logprob, _ in pairs] == [example.num_targets for example in examples]
    torch.testing.assert_close(torch.cat([logprob for logprob, _ in pairs]), local["logprob"], rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([correct for _, correct in pairs]), local["correct"])


def greedy_examples(module: PreTrainedModel) -> Examples:
    """Examples whose target tokens are mostly the argmax."""
    examples = []
    for start in range(3, 9):
        ids = [start, start + 1]
        for _ in range(start):
            with torch.no_grad():
                ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
        ids[start] = 50
        examples.append(Example(ids, [False] * 2 + [True] * start))
    return Examples(examples)


@pytest.mark.slow
def test_scores_equal_those_of_the_model_in_memory(server: FakeServer, module: PreTrainedModel) -> None:
    model = remote(server)
    assert (model.name, model.vocab_size, model.max_length) == ("tiny", 97, None)
    assert_local(model.score(EXAMPLES), module)
    assert sorted(server.prompts) == sorted(list(one.token_ids) for one in EXAMPLES)
    right = greedy_examples(module)
    pairs = model.score(right)
    assert_local(pairs, module, right)
    assert 0.3 < torch.cat([correct for _, correct in pairs]).float().mean() < 1
    assert model.score([]) == []


def test_a_gold_token_alone_is_judged_by_its_rank(server: FakeServer, module: PreTrainedModel) -> None:
    right = greedy_examples(module)

    def gold_only(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        pairs = zip(choice["prompt_logprobs"][1:], choice["prompt_token_ids"][1:], strict=True)
        choice["prompt_logprobs"][1:] = [{str(token): entries[str(token)]} for entries, token in pairs]
        del choice["prompt_token_ids"]
        return answer

    server.alter = gold_only
    assert_local(remote(server).score(right), module, right)


def test_of_tied_tokens_the_lowest_id_is_the_argmax(server: FakeServer) -> None:
    example = Example([5, 6], [False, True])

    def tie(other: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def alter(answer: dict[str, Any]) -> dict[str, Any]:
            entries = {"6": {"logprob": -1.0, "rank": 2}, str(other): {"logprob": -1.0, "rank": 1}}
            answer["choices"][0]["prompt_logprobs"][1] = entries
            return answer

        return alter

    for other, expected in ((5, False), (7, True)):
        server.alter = tie(other)
        assert remote(server).score([example])[0][1].tolist() == [expected]


def test_rounding_above_0_is_accepted(server: FakeServer) -> None:
    def round_up(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["prompt_logprobs"][1] = {"6": {"logprob": 1e-6, "rank": 1}}
        return answer

    server.alter = round_up
    (logprob, correct), *_ = remote(server).score([Example([5, 6], [False, True])])
    assert logprob.tolist() == pytest.approx([1e-6])
    assert correct.tolist() == [True]


@pytest.mark.slow
def test_no_more_requests_are_in_flight_than_allowed(server: FakeServer, module: PreTrainedModel) -> None:
    server.before = lambda prompt: server.wait_until(lambda: server.most_in_flight >= 4)
    assert_local(remote(server, concurrency=4).score(EXAMPLES), module)
    assert server.most_in_flight == 4
    assert len(server.requests) == len(EXAMPLES)


@pytest.mark.slow
def test_order_is_kept_although_answers_come_in_another(server: FakeServer, module: PreTrainedModel) -> None:
    first, last = list(EXAMPLES[0].token_ids), len(EXAMPLES) - 1
    server.before = lambda prompt: server.wait_until(lambda: prompt != first or server.answered >= last)
    assert_local(remote(server).score(EXAMPLES), module)


@pytest.mark.slow
def test_passing_failures_are_survived(
    server: FakeServer, module: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    naps = Naps()
    server.fail(Refuse(500, "boom"), Drop(), Refuse(500, "boom"), Refuse(503, "loading"), Refuse(429, "slowly"))
    with caplog.at_level(logging.WARNING, logger="collm"):
        assert_local(remote(server, sleep=naps, concurrency=1).score(EXAMPLES), module)
    assert len(server.requests) == len(EXAMPLES) + 5
    for attempt, seconds in enumerate(naps.seconds):
        assert 0.25 * 2**attempt <= seconds <= 0.5 * 2**attempt
    assert [record.message.split(";")[0].split(": ", 1)[1] for record in caplog.records] == [
        "status 500 boom",
        "RemoteProtocolError Server disconnected without sending a response.",
        "status 500 boom",
        "status 503 loading",
        "status 429 slowly",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "least", "most"),
    [("7", 7, 7), (lambda: formatdate(time.time() + 60, usegmt=True), 50, 61), ("soon", 0, 0.5), ("-3", 0, 0.5)],
)
def test_the_server_says_how_long_to_wait(server: FakeServer, value: Any, least: float, most: float) -> None:
    naps = Naps()
    server.fail(Refuse(429, headers={"Retry-After": value if isinstance(value, str) else value()}))
    remote(server, sleep=naps).score(EXAMPLES[:1])
    assert len(naps.seconds) == 1
    assert least <= naps.seconds[0] <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Refuse(500, {"error": {"message": "out of memory"}}), "status 500 .*out of memory"),
        (Refuse(429), "status 429"),
        (Drop(), "RemoteProtocolError"),
        (Hang(), "no answer within 0.05 s"),
    ],
    ids=["500", "429", "drop", "hang"],
)
def test_retries_are_counted_and_the_last_reason_is_told(server: FakeServer, failure: Any, reason: str) -> None:
    naps = Naps()
    model = remote(server, retries=2, sleep=naps)
    model.timeout_s = 0.05 if isinstance(failure, Hang) else 5
    server.fail(Refuse(502, "another reason"), failure, failure)
    with pytest.raises(LoadError, match=rf"tiny at {server.url} .*3 times, .*the last time: {reason}"):
        model.score(EXAMPLES[:1])
    assert len(server.requests) == 3
    assert len(naps.seconds) == 2


@pytest.mark.slow
def test_an_answer_that_trickles_is_late_too(server: FakeServer) -> None:
    server.fail(Trickle())
    with pytest.raises(LoadError, match=r"no answer within 0\.15 s"):
        remote(server, retries=0, timeout_s=0.15).score(EXAMPLES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refusal", "kind", "complaint"),
    [
        (
            error("This model's maximum context length is 8 tokens."),
            MismatchError,
            r"^example 41 \(\d+ tokens\) was refused: .*lower max_length",
        ),
        (
            error("The decoder prompt (length 9) is longer than the maximum model length of 8."),
            MismatchError,
            "^example 41 .* was refused",
        ),
        (error("Token id 96 is out of vocabulary"), MismatchError, "another tokenizer"),
        (Refuse(413, "Request body too long"), MismatchError, "413"),
        (
            error("Requested prompt logprobs of 1, which is greater than max allowed: 0"),
            LoadError,
            "refuses a request: status 400",
        ),
        (error("The model `vocab` does not exist.", 404), LoadError, "404.*does not exist"),
        (Refuse(401, "no"), LoadError, "api_key_env"),
        (Refuse(302, "", {"Location": "http://elsewhere"}), LoadError, "refuses a request: status 302"),
    ],
    ids=["context", "longer", "vocabulary", "413", "logprobs", "404", "401", "302"],
)
def test_refusals_are_not_tried_again(server: FakeServer, refusal: Refuse, kind: type, complaint: str) -> None:
    naps = Naps()
    model = remote(server, sleep=naps)
    server.fail(refusal)
    with pytest.raises(kind, match=complaint) as caught:
        model.score(EXAMPLES[:1], numbers=[41])
    assert server.url in str(caught.value)
    assert naps.seconds == []
    assert len(server.requests) == 1


@pytest.mark.slow
def test_limits_of_the_server_are_said(module: PreTrainedModel) -> None:
    with FakeServer(module, max_model_len=12) as server:
        model = remote(server)
        assert model.max_length == 10
        fits, too_long = (Example([3] * n, [False] * (n - 1) + [True]) for n in (11, 12))
        assert len(model.score([fits])) == 1
        with pytest.raises(MismatchError, match=r"example 1 .*maximum context length is 12"):
            model.score([fits, too_long])
        with pytest.raises(MismatchError, match="Token id 97 is out of vocabulary"):
            model.score([Example([3, 97], [False, True])])


def position(answer: dict[str, Any], change: Callable[[dict[str, Any], str], Any]) -> dict[str, Any]:
    """Change what the answer says of the last token."""
    choice = answer["choices"][0]
    place = len(choice["prompt_logprobs"]) - 1
    gold = str(choice["prompt_token_ids"][place])
    choice["prompt_logprobs"][place] = change(choice["prompt_logprobs"][place], gold)
    return answer


def entry(changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: position(answer, lambda entries, gold: {**entries, gold: changed})


def choice(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: {**answer, "choices": [{**answer["choices"][0], **changes}]}


NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no JSON": (lambda answer: "<html>", "no choices: <html>"),
    "null": (lambda answer: "null", "no choices: null"),
    "a list": (lambda answer: [1], r"no choices: \[1\]"),
    "no choices": (lambda answer: {"choices": []}, "prompt_logprobs"),
    "no prompt_logprobs": (choice(prompt_logprobs=None), "which the server must support"),
    "one too few": (choice(prompt_logprobs=[None, {}]), r"2 positions for \d+ tokens"),
    "one too many": (choice(prompt_logprobs=[None] * 99), r"99 positions for \d+ tokens"),
    "other ids": (choice(prompt_token_ids=[1, 2, 3]), "not the token ids that were sent"),
    "no gold": (
        lambda answer: position(answer, lambda entries, gold: {"1": {"logprob": -1.0, "rank": 1}}),
        r"position \d+ \(token \d+\) has no entry for its token, but \{'1'",
    ),
    "no position": (lambda answer: position(answer, lambda entries, gold: None), r"position \d+ .* but None"),
    "an empty position": (lambda answer: position(answer, lambda entries, gold: {}), r"position \d+ .* but {}"),
    "NaN": (entry({"logprob": float("nan"), "rank": 1}), r"position \d+ .*expected finite log-probabilities.*nan"),
    "-inf": (entry({"logprob": -float("inf"), "rank": 9}), r"position \d+ .*expected finite log-probabilities.*-inf"),
    "null logprob": (entry({"logprob": None, "rank": 1}), r"position \d+ .*expected finite log-probabilities.*None"),
    "positive": (entry({"logprob": 3.5, "rank": 1}), r"position \d+ .*up to 0.*3.5"),
    "huge": (entry({"logprob": -(10**400), "rank": 9}), r"position \d+ .*expected finite log-probabilities"),
    "a bare number": (entry(-1.0), r"position \d+ .*expected finite log-probabilities"),
    "no rank": (
        lambda answer: position(answer, lambda entries, gold: {gold: {"logprob": -1.0}}),
        "neither a rank nor another token",
    ),
    "logits": (
        lambda answer: position(answer, lambda entries, gold: {gold: {"logprob": -30.5, "rank": 1}}),
        "-30.5 nats for its best token, less than a uniform distribution",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_names_the_example_and_what_came(server: FakeServer, case: str) -> None:
    alter, complaint = NONSENSE[case]
    model = remote(server)
    bad = list(EXAMPLES[3].token_ids)

    def of_one(answer: dict[str, Any]) -> Any:
        changed = alter(answer) if answer["choices"][0]["prompt_token_ids"] == bad else answer
        return Refuse(200, changed) if isinstance(changed, str) else changed

    server.alter = of_one
    with pytest.raises(ModelFailure, match=complaint) as caught:
        model.score(EXAMPLES[:5])
    assert f"tiny at {server.url} returned an invalid response for example 3 ({len(bad)} tokens)" in str(caught.value)
    assert len(server.requests) <= 5


def test_servers_that_do_not_serve_the_model_are_refused(server: FakeServer) -> None:
    with pytest.raises(LoadError, match=f"{server.url} does not serve 'other'; it serves: \\['tiny'\\]"):
        RemoteModel(server.url, "other", vocab_size=97)
    for refusal, complaint in (
        (error("Not Found", 404), "refuses a request: status 404 .*Not Found.*ends in /v1"),
        (Refuse(200, "<html>"), "no list of models"),
        (Refuse(200, {"data": None}), "no list of models"),
        (Refuse(200, {"data": []}), r"it serves: \[\]"),
    ):
        server.fail(refusal, path="/v1/models")
        with pytest.raises(LoadError, match=complaint):
            remote(server)
    server.fail(Refuse(503), Drop(), path="/v1/models")
    naps = Naps()
    remote(server, sleep=naps)
    assert len(naps.seconds) == 2


def test_a_server_that_is_not_there_is_named(server: FakeServer, module: PreTrainedModel) -> None:
    with FakeServer(module) as gone:
        url = gone.url
    naps = Naps()
    with pytest.raises(LoadError, match=f"tiny at {url} failed 4 times, the last time: ConnectError"):
        RemoteModel(url, "tiny", vocab_size=97, retries=3, sleep=naps)
    assert len(naps.seconds) == 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"retries": -1}, "retries is -1, expected at least 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"base_url": "localhost:8000"}, "base_url is not a URL"),
        ({"base_url": "ftp://localhost"}, "base_url is not a URL"),
        ({"base_url": "http://127.0.0.1:99x/v1"}, "base_url is not a URL"),
        ({"base_url": f"http://user:{KEY}@localhost/v1"}, "api_key_env"),
        ({"base_url": f"http://localhost/v1?key={KEY}"}, "api_key_env"),
        ({"api_key_env": "COLLM_UNSET"}, "COLLM_UNSET holds no key"),
        ({"api_key_env": "COLLM_BAD"}, "COLLM_BAD holds no key"),
    ],
)
def test_bad_options_are_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], complaint: str) -> None:
    monkeypatch.setenv("COLLM_BAD", f"{KEY}\nX-Header: 1")
    options = {"base_url": "http://127.0.0.1:1/v1", "name": "tiny", "vocab_size": 97, **changes}
    with pytest.raises(ConfigError, match=complaint) as caught:
        RemoteModel(**options)
    assert KEY not in str(caught.value)


@pytest.mark.slow
def test_the_key_is_sent_and_never_told(
    module: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COLLM_KEY", f" {KEY}\n")
    told = []
    with FakeServer(module, key=KEY) as server, caplog.at_level(logging.DEBUG):
        model = remote(server, api_key_env="COLLM_KEY", retries=1)
        assert_local(model.score(EXAMPLES[:4]), module, Examples(EXAMPLES[:4]))
        leaks = [
            (Refuse(500, f"header was {KEY}"),) * 2,
            (error(f"bad key {KEY}"),),
            (error(f"context length {KEY}"),),
            (Refuse(200, {"choices": [{"prompt_logprobs": [{KEY: 1}] * len(EXAMPLES[0].token_ids)}]}),),
        ]
        for failures in leaks:
            server.fail(*failures)
            with pytest.raises(CollmError) as caught:
                model.score(EXAMPLES[:1])
            told.append(caught.value)
        monkeypatch.setenv("COLLM_KEY", "sk-wrong")
        with pytest.raises(LoadError, match="check the key in COLLM_KEY") as wrong:
            remote(server, api_key_env="COLLM_KEY")
        with pytest.raises(LoadError, match="api_key_env"):
            remote(server)
    assert "sk-wrong" not in str(wrong.value)
    assert "***" in str(wrong.value)
    for one in told:
        assert KEY not in f"{one} {one.__cause__} {model!r}"
    assert caplog.records
    assert KEY not in caplog.text


def test_the_first_failure_ends_all_requests(server: FakeServer) -> None:
    model = remote(server, concurrency=2)
    server.fail(error("no"))
    server.before = lambda prompt: server.wait_until(lambda: server.answered >= 1)
    with pytest.raises(LoadError, match="status 400"):
        model.score(EXAMPLES)
    assert len(server.requests) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("in_a_notebook", [False, True])
def test_ctrl_c_leaves_nothing_behind(server: FakeServer, module: PreTrainedModel, in_a_notebook: bool) -> None:
    model = remote(server)
    server.fail(*[Hang()] * 16)
    before = own_threads()

    def press() -> None:
        server.wait_until(lambda: server.answered >= 16)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press, name=THREAD)
    presser.start()
    started = time.monotonic()
    with closing(asyncio.new_event_loop()) as loop, pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(scored_inside(model)) if in_a_notebook else model.score(EXAMPLES)
    presser.join()
    assert time.monotonic() - started < 4
    assert own_threads() <= before
    assert_local(model.score(EXAMPLES), module)


async def scored_inside(model: RemoteModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return model.score(EXAMPLES)


@pytest.mark.slow
def test_a_running_event_loop_is_no_obstacle(server: FakeServer, module: PreTrainedModel) -> None:
    model = remote(server)
    before = own_threads()
    assert_local(asyncio.run(scored_inside(model)), module)
    assert own_threads() <= before
    server.fail(error("no"))
    with pytest.raises(LoadError, match="status 400"):
        asyncio.run(scored_inside(model))


def test_what_is_asked_for(server: FakeServer) -> None:
    remote(server).score(EXAMPLES[:1])
    assert server.requests == [
        {
            "model": "tiny",
            "prompt": list(EXAMPLES[0].token_ids),
            "prompt_logprobs": 1,
            "max_tokens": 1,
            "return_token_ids": True,
        }
    ]
