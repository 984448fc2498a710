"""One server: what it answers is read strictly, and asked for again within bounds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import aclosing
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from collm.errors import ConfigError, ModelFailure
from collm.http.client import COOLS_S, TRIPS_AFTER, CircuitBreaker, Unreachable
from collm.http.loop import LoopThread
from collm.vllm import endpoint as module
from collm.vllm.endpoint import Endpoint
from collm.vllm.servers import Servers
from tests.tiny_models import make_model, tiny_config
from tests.vllm.fake import DOWN, HANG, FakeVllm, Fault, Served, refusal

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def served(tokenizer: PreTrainedTokenizerFast) -> Served:
    return Served(make_model(tiny_config(), 1), tokenizer)


@pytest.fixture
def fake(served: Served) -> Iterator[FakeVllm]:
    with FakeVllm(served, pieces=(2, 1)) as running:
        yield running


class Asking:
    """An endpoint whose pauses are recorded, and whose breaker has a clock of the test's."""

    def __init__(self, fake: FakeVllm, **options: Any) -> None:
        self.pauses: list[float] = []
        self.now = 0.0
        self.endpoint = Endpoint("the assistant", fake.url, Servers([fake.url], **{"timeout_s": 20.0, **options}), 97)
        self.endpoint.model = fake.name
        self.endpoint.http.sleep = self._sleep
        self.endpoint.http.breaker = CircuitBreaker(clock=lambda: self.now)
        self.do = LoopThread([self.endpoint.http]).run

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def one(self, **body: Any) -> int:
        return self.do(self.endpoint.one(asked(**body))).token_id

    def stream(self, count: int, **body: Any) -> list[int]:
        async def go() -> list[int]:
            async with aclosing(self.endpoint.stream(asked(max_tokens=count, **body))) as tokens:
                return [one.token_id async for one in tokens]

        return self.do(go())


def asked(**body: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "temperature": 0, "logprobs": 0, "ignore_eos": True, **body}


def greedy(served: Served, count: int) -> list[int]:
    text = list(PROMPT)
    for _ in range(count):
        text.append(int(served.logits(text)[-1].argmax()))
    return text[len(PROMPT) :]


def test_tokens_and_their_log_probabilities_come_as_the_model_says(fake: FakeVllm, served: Served) -> None:
    asking = Asking(fake)
    assert asking.stream(7) == greedy(served, 7)
    written = asking.do(asking.endpoint.one(asked(logprob_token_ids=[3, 9])))
    logprobs = served.logits(PROMPT)[-1].log_softmax(-1)
    assert written.about.keys() == {3, 9, written.token_id}
    for token_id, value in written.about.items():
        assert value == pytest.approx(logprobs[token_id].item(), abs=1e-6)
    assert written.logprob == written.about[written.token_id]
    assert (asking.endpoint.usage.calls, asking.endpoint.usage.forward_passes) == (2, 8)


# Attempts

PASSING = {
    "no connection": DOWN,
    "status 429": refusal(429),
    "status 500": refusal(500),
    "status 503": refusal(503),
    "no JSON": Fault(status=200, text="<html>"),
    "no choices": Fault(status=200, text="{}"),
    "null": Fault(status=200, text="null"),
    "a number": Fault(status=200, text="7"),
    "nested": Fault(status=200, text="[" * 100_000),
    "an error": Fault(status=200, text='{"error": "overloaded"}'),
    "no token_ids": Fault(change=lambda choice: {"text": "w5", "finish_reason": "length"}),
    "no logprobs": Fault(change=lambda choice: {**choice, "logprobs": None}),
    "another prompt": Fault(change=lambda choice: {**choice, "prompt_token_ids": [1, 5, 6, 7]}),
    "an id as a string": Fault(change=lambda choice: {**choice, "token_ids": [str(choice["token_ids"][0])]}),
    "a fraction": Fault(change=lambda choice: {**choice, "token_ids": [1.5]}),
    "a negative id": Fault(change=lambda choice: {**choice, "token_ids": [-1]}),
    "true": Fault(change=lambda choice: {**choice, "token_ids": [True]}),
    "another model's id": Fault(change=lambda choice: {**choice, "token_ids": [97]}),
    "no number": Fault(change=lambda choice: {**choice, "logprobs": {"token_logprobs": [None]}}),
    "NaN": Fault(change=lambda choice: {**choice, "logprobs": {"token_logprobs": [float("nan")]}}),
    "a raw logit": Fault(change=lambda choice: {**choice, "logprobs": {"token_logprobs": [4.5]}}),
    "fewer values": Fault(change=lambda choice: {**choice, "logprobs": {"token_logprobs": []}}),
    "a token without an id": Fault(
        change=lambda choice: {**choice, "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{"w5": -1.0}]}}
    ),
    "no choice": Fault(change=lambda choice: "w5"),
    "aborted": Fault(change=lambda choice: {**choice, "finish_reason": "abort", "token_ids": [], "logprobs": None}),
    "no token": Fault(change=lambda choice: {**choice, "token_ids": [], "logprobs": None}),
}


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_what_may_pass_is_asked_for_again_and_given_up_in_the_end(
    fake: FakeVllm, served: Served, name: str, streaming: bool
) -> None:
    asking = Asking(fake, retries=2)
    count = 2 if streaming else 1
    fake.faults = [PASSING[name]] * 2
    assert asking.stream(count) == greedy(served, count)
    assert (len(fake.bodies), asking.endpoint.usage.calls, asking.endpoint.usage.forward_passes) == (3, 3, count)
    fake.faults = [PASSING[name]] * 9
    with pytest.raises(ModelFailure, match=rf"the assistant at {fake.url} .*3 times, .*the last time: .*; check"):
        asking.stream(count)
    assert len(fake.bodies) == 6


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (PASSING["no connection"], "RemoteProtocolError"),
        (PASSING["status 503"], 'status 503 .*"message": "no"'),
        (PASSING["an error"], "status 500 overloaded"),
        (PASSING["no JSON"], "the answer has no choices: <html>"),
        (PASSING["another model's id"], "got token id 97, expected ids below 97; the server has another model"),
        (PASSING["a raw logit"], "4.5 is not a log-probability; start vLLM with its default --logprobs-mode"),
        (PASSING["another prompt"], "the answer's prompt_token_ids are not the token ids that were sent"),
        (PASSING["aborted"], "the answer ended with finish_reason 'abort', expected 'stop' or 'length'"),
    ],
)
def test_the_error_says_what_came_at_last(fake: FakeVllm, fault: Fault, message: str) -> None:
    fake.faults = [fault]
    with pytest.raises(ModelFailure, match=message):
        Asking(fake, retries=0).stream(1)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_refusal_is_not_asked_again(fake: FakeVllm, status: int, streaming: bool) -> None:
    asking = Asking(fake, retries=5)
    fake.faults = [refusal(status, "too long")]
    if streaming:  # after some tokens, as an event
        fake.faults = [Fault(after=2, then={"error": {"message": "too long", "code": status}})]
    with pytest.raises(ModelFailure, match=rf"refuses a request: status {status} .*too long.*; (check|name)"):
        asking.stream(3) if streaming else asking.one()
    assert (len(fake.bodies), asking.pauses) == (1, [])


def test_pauses_double_with_jitter_up_to_a_limit(fake: FakeVllm) -> None:
    asking = Asking(fake, retries=8)
    fake.faults = [DOWN] * 9
    with pytest.raises(Unreachable):
        asking.one()
    longest = [0.25, 0.5, 1, 2, 4, 8, 10, 10]
    shares = [pause / limit for pause, limit in zip(asking.pauses, longest, strict=True)]
    assert all(0.5 <= share <= 1 for share in shares)
    assert len({*shares}) == 8


def test_retry_after_is_honoured_within_bounds(fake: FakeVllm, served: Served) -> None:
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=8), usegmt=True)
    said = ["3", "600", soon, "0", "nonsense", "-5"]
    asking = Asking(fake, retries=len(said))
    fake.faults = [refusal(503 if place % 2 else 429, Retry_After=value) for place, value in enumerate(said)]
    assert asking.one() == greedy(served, 1)[0]
    assert asking.pauses[:2] == [3.0, 10.0]
    assert 4 <= asking.pauses[2] <= 8
    assert asking.pauses[3] <= 2
    hasty = Asking(fake, timeout_s=1.5)
    fake.faults = [refusal(429, Retry_After="9")]
    hasty.one()
    assert hasty.pauses == [1.5]  # nobody waits longer for a server's leave than for its answer


def test_a_time_limit_holds_for_each_call(fake: FakeVllm, served: Served) -> None:
    asking = Asking(fake, timeout_s=0.5, retries=2)
    for fault in (HANG, *(Fault(after=3, then=then) for then in ("hang", "comments", "empties"))):
        fake.faults = [fault]
        assert asking.stream(5) == greedy(served, 5)
    fake.faults = [HANG] * 3
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"failed 3 times, the last time: (no answer within 0.5 s|ReadTimeout)"):
        asking.one()
    assert time.monotonic() - began < 10  # not the 20 that the server takes


# Streams


@pytest.mark.parametrize("then", ["drop", "end", {"error": {"message": "died", "code": 500}}])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_answer_that_breaks_off_goes_on_from_there(
    fake: FakeVllm, served: Served, after: int, then: str | dict[str, Any]
) -> None:
    asking = Asking(fake)
    fake.faults = [Fault(after=after, then=then)]
    assert asking.stream(7) == greedy(served, 7)
    assert [body["max_tokens"] for body in fake.bodies] == [7, 7 - after]
    assert fake.bodies[1]["prompt"] == PROMPT + greedy(served, after)
    assert asking.endpoint.usage.forward_passes == 7


def test_what_comes_twice_in_bits_is_counted_anew_after_each(fake: FakeVllm, served: Served) -> None:
    asking = Asking(fake, retries=1)
    fake.faults = [Fault(after=1)] * 5
    assert asking.stream(6) == greedy(served, 6)
    assert len(fake.bodies) == 6


def test_pieces_without_tokens_do_not_count_as_progress(fake: FakeVllm) -> None:
    asking = Asking(fake, retries=2)
    empty = {"index": 0, "text": "", "token_ids": [], "finish_reason": None}
    fake.always = lambda body: Fault(after=1, then="end", change=lambda choice: empty)
    with pytest.raises(Unreachable, match="failed 3 times, the last time: the answer broke off"):
        asking.stream(4)
    assert len(fake.bodies) == 3


def test_only_the_end_of_an_answer_may_be_missing(fake: FakeVllm, served: Served) -> None:
    asking = Asking(fake)
    fake.faults = [Fault(change=lambda choice: {**choice, "finish_reason": None})]
    assert asking.stream(4) == greedy(served, 4)
    assert len(fake.bodies) == 1


def test_more_tokens_than_asked_for_are_no_answer(fake: FakeVllm) -> None:
    asking = Asking(fake, retries=0)
    twice = {"token_ids": [5, 5, 5], "logprobs": {"token_logprobs": [-1.0] * 3}}
    fake.faults = [Fault(change=lambda choice: {**choice, **twice})]
    with pytest.raises(ModelFailure, match="more than the 2 tokens"):
        asking.stream(2)


def test_an_event_about_something_else_is_passed_over(fake: FakeVllm, served: Served) -> None:
    fake.faults = [Fault(after=2, then={"choices": [], "usage": {"total_tokens": 5}})]
    assert Asking(fake).stream(4) == greedy(served, 4)
    assert len(fake.bodies) == 2


def test_a_server_that_does_not_stream_is_understood(fake: FakeVllm, served: Served) -> None:
    whole = json.dumps({"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-1]}, "finish_reason": "stop"}]})
    fake.faults = [Fault(status=200, text=whole)]
    assert Asking(fake).stream(3) == [5]


def test_a_resumed_answer_draws_on_its_own(fake: FakeVllm) -> None:
    asking = Asking(fake)
    drawing = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 11}
    fake.faults = [DOWN, Fault(after=3)]
    first = asking.stream(6, **drawing)
    assert [body["seed"] for body in fake.bodies[:2]] == [11, 11]  # nothing was drawn yet
    assert fake.bodies[2]["seed"] != 11
    fake.faults = [Fault(after=3)]
    assert asking.stream(6, **drawing) == first


def test_a_whole_stream_leaves_its_connection_for_the_next(fake: FakeVllm) -> None:
    asking = Asking(fake)

    async def thrice() -> None:
        for _ in range(3):
            async with aclosing(asking.endpoint.stream(asked(max_tokens=4))) as tokens:
                for _ in range(4):  # the reader stops at the last token
                    await anext(tokens)

    asking.do(thrice())
    assert fake.connections == 1


# The breaker


def test_after_three_failed_calls_calls_fail_at_once_until_one_tries_again(fake: FakeVllm, served: Served) -> None:
    asking = Asking(fake, retries=1)
    fake.always = lambda body: DOWN
    for _ in range(TRIPS_AFTER):
        with pytest.raises(Unreachable, match="failed 2 times"):
            asking.one()
    assert len(fake.bodies) == 2 * TRIPS_AFTER
    for ask in (asking.one, lambda: asking.stream(2)):
        with pytest.raises(Unreachable, match="did not answer 3 calls in a row and is not called for 10 s"):
            ask()
    assert len(fake.bodies) == 2 * TRIPS_AFTER
    asking.now += COOLS_S
    with pytest.raises(Unreachable, match="failed 1 time, the last time"):
        asking.one()
    assert len(fake.bodies) == 2 * TRIPS_AFTER + 1  # a trial is made once
    with pytest.raises(Unreachable, match="is not called for"):
        asking.one()
    fake.always = lambda body: None
    asking.now += COOLS_S
    assert asking.one() == greedy(served, 1)[0]
    assert asking.stream(3) == greedy(served, 3)


def test_while_one_call_tries_again_the_others_still_fail_at_once() -> None:
    now = [0.0]
    breaker = CircuitBreaker(clock=lambda: now[0])
    for _ in range(TRIPS_AFTER):
        assert breaker.shut_s() == 0
        breaker.failed()
    now[0] += COOLS_S - 1
    assert breaker.shut_s() == pytest.approx(1)
    now[0] += 1
    assert [breaker.shut_s() for _ in range(3)] == [0, COOLS_S, COOLS_S]
    now[0] += COOLS_S  # the trial was dropped and never said how it went
    assert breaker.shut_s() == 0
    breaker.succeeded()
    assert [breaker.shut_s() for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("name", ["status 500", "no JSON", "another model's id", "refusal"])
def test_what_is_said_of_one_request_shuts_out_no_other(fake: FakeVllm, served: Served, name: str) -> None:
    asking = Asking(fake, retries=0)
    fault = PASSING.get(name, refusal(400))
    fake.always = lambda body: fault if body["prompt"] == [9] else None
    for _ in range(TRIPS_AFTER + 1):
        with pytest.raises(ModelFailure) as caught:
            asking.one(prompt=[9])
        assert not isinstance(caught.value, Unreachable)
    assert asking.one() == greedy(served, 1)[0]


# Finding it, its words, its key


def test_a_key_is_sent_and_never_repeated(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "tell-no-one")
    with FakeVllm(served, key="tell-no-one") as fake:
        assert Asking(fake, api_key_env="THE_KEY").one() == greedy(served, 1)[0]
        fake.key = "another"
        for ask in (lambda a: a.one(), lambda a: a.stream(2), lambda a: a.do(a.endpoint.find(0.0))):
            with pytest.raises(Exception, match=r"status 401 .*\*\*\*.*; check the key in THE_KEY") as caught:
                ask(Asking(fake, api_key_env="THE_KEY"))
            assert "tell-no-one" not in str(caught.value)
        with pytest.raises(ModelFailure, match=r"name the key's environment variable \(api_key_env\)"):
            Asking(fake).one()
        monkeypatch.setenv("THE_KEY", " ")
        with pytest.raises(ConfigError, match="THE_KEY holds no key"):
            Asking(fake, api_key_env="THE_KEY")


def test_likely_tokens_of_a_text(fake: FakeVllm, served: Served) -> None:
    asking = Asking(fake, retries=1)
    text = [*PROMPT, *greedy(served, 4)]
    fake.faults = [refusal(503)]
    likely = asking.do(asking.endpoint.likely(text, 4, 3))
    probs = served.logits(text).softmax(-1)
    assert len(likely) == 4
    for place, said in enumerate(likely, start=len(PROMPT) - 1):
        best = probs[place].topk(3)
        assert [token for token, _ in said[:3]] == best.indices.tolist()
        assert [prob for _, prob in said[:3]] == pytest.approx(best.values.tolist(), abs=1e-6)
    fake.always = lambda body: Fault(change=lambda choice: {**choice, "prompt_logprobs": None})
    with pytest.raises(ModelFailure, match=r"the assistant at .* gave no usable answer 2 times"):
        asking.do(asking.endpoint.likely(text, 4, 3))


def test_the_end_of_a_stream_is_not_waited_for_long(
    fake: FakeVllm, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENDING_S", 0.05)
    asking = Asking(fake)

    def ends(choice: dict[str, Any]) -> dict[str, Any]:
        return {**choice, "finish_reason": "length"}

    fake.faults = [Fault(after=2, then="hang", change=ends)]
    assert asking.stream(2) == greedy(served, 2)
    assert len(fake.bodies) == 1
