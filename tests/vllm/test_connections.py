"""Before the first token: are these the right servers, and do they run?"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.errors import CollmError, ConfigError, LoadError, MismatchError, ModelFailure
from collm.vllm import endpoint as module
from collm.vllm.separate import AuthorConnections
from collm.vllm.servers import Servers
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer
from tests.vllm.conftest import Cluster, Members
from tests.vllm.fake import DOWN, HANG, FakeVllm, Fault, Served, refusal

Clusters = Callable[..., Cluster]


def check(world: Cluster, error: type[CollmError], message: str, **options: Any) -> None:
    """Refused with that message, and no thread is left behind."""
    before = set(threading.enumerate())
    m = world.members
    with pytest.raises(error, match=message):
        AuthorConnections(world.servers(**{"retries": 0, **options}), m.head, m.tokenizer)
    assert set(threading.enumerate()) <= before


def test_the_right_servers_are_accepted_with_few_requests(cluster: Clusters) -> None:
    world = cluster(2)
    m = world.members
    with closing(AuthorConnections(world.servers(), m.head, m.tokenizer)) as connections:
        assert connections.defer_ids == [97, 98]
        assert connections.zero_id == 99
        assert [author.max_length for author in connections.authors] == [128] * 3
        assert [author.name for author in connections.authors] == ["base", "assistant", "assistant-2"]
    assert [len(fake.bodies) for fake in world.fakes] == [2, 1, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_servers_as_authors_are_needed(cluster: Clusters, count: int) -> None:
    world = cluster()
    world.fakes = (world.fakes * 2)[:count]
    check(world, ConfigError, f"got {count} servers for a base and 1 assistants; give one for each")


def test_a_base_without_the_head_is_refused(cluster: Clusters) -> None:
    world = cluster()
    world.fakes.reverse()
    check(world, MismatchError, "the base at http.* serves 'tiny', which is not an export of this collaboration's base")


def test_an_export_with_another_head_is_refused(cluster: Clusters) -> None:
    world = cluster()
    head = DeferralHead(32, 1)
    head.load_state_dict({name: value + 1e-3 for name, value in world.members.head.state_dict().items()})
    world.members = Members(**{**vars(world.members), "head": head})
    check(world, MismatchError, "export it again with 'collm export vllm' and serve the new export")


def test_a_base_without_the_plugin_is_refused(cluster: Clusters) -> None:
    world = cluster()
    m = world.members
    plain = Served(AutoModelForCausalLM.from_pretrained(m.exported), m.served[0].tokenizer)
    with FakeVllm(plain) as fake:
        world.fakes[0] = fake
        check(world, MismatchError, "does not defer, because its vLLM has no collm plug-in; install collm-vllm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda top: None, "its server must support logprob_token_ids, as vLLM does"),
        (lambda top: [{**top[0], "token_id:97": -9999.0, "token_id:98": -9999.0}], "start its vLLM with the default"),
    ],
)
def test_a_base_that_does_not_say_how_likely_it_defers_is_refused(
    cluster: Clusters, change: Callable[[Any], Any], message: str
) -> None:
    world = cluster()

    def changed(choice: dict[str, Any]) -> dict[str, Any]:
        return {
            **choice,
            "logprobs": {**choice["logprobs"], "top_logprobs": change(choice["logprobs"]["top_logprobs"])},
        }

    world.fakes[0].always = lambda body: Fault(change=changed)
    check(world, MismatchError, message)


def test_a_base_that_says_logits_is_refused(cluster: Clusters) -> None:
    check(cluster(of_base={"logprobs_mode": "raw_logits"}), CollmError, "--logprobs-mode")


def test_an_assistant_with_other_tokens_is_refused(cluster: Clusters, tokenizer: PreTrainedTokenizerFast) -> None:
    world = cluster()
    other = merging_tokenizer("The 3 quick-brown foxes")
    with FakeVllm(Served(make_model(tiny_config(vocab_size=len(other)), 1), other)) as fake:
        world.fakes[1] = fake
        check(world, MismatchError, "assistant at http.* serves 'tiny', which tokenizes text differently; serve")


def test_an_assistant_that_does_not_tokenize_is_accepted(cluster: Clusters) -> None:
    world = cluster()
    with FakeVllm(world.members.served[1], tokenizes=False, max_model_len=None) as fake:
        world.fakes[1] = fake
        model = world.connect()
        assert model.backend.connections.authors[1].max_length is None
        (out,) = model.generate([[5, 6]], SamplingParams(max_tokens=8), threshold=0.3)
        assert set(out.authors) == {0, 1}


def test_a_base_that_does_not_tokenize_is_refused(cluster: Clusters) -> None:
    check(cluster(of_base={"tokenizes": False}), MismatchError, "not an export of this collaboration's base")


def test_an_assistant_that_gives_no_token_ids_is_refused_at_the_start(cluster: Clusters) -> None:
    world = cluster()
    world.fakes[1].always = lambda body: Fault(change=lambda choice: {"text": "w5", "finish_reason": "length"})
    check(world, ModelFailure, "assistant at http.* gave no usable answer 1 time, expected token ids with log-prob")


@pytest.mark.parametrize("cards", [[{"name": "x"}], [7]])
def test_a_list_of_models_that_is_none_is_refused(cluster: Clusters, cards: list[Any]) -> None:
    world = cluster()
    world.fakes[1].cards = cards
    check(world, LoadError, "returned no list of models; check the address")


def test_a_server_of_several_models_is_refused(cluster: Clusters) -> None:
    world = cluster()
    world.fakes[1].cards = [{"id": "tiny"}, {"id": "adapter"}]
    check(world, LoadError, r"serves several models \(tiny, adapter\); expected only the assistant, or its model after")
    world.fakes[1].cards = []
    check(world, LoadError, "serves no model; expected only the assistant")


def test_a_wrong_address_is_refused_at_once(cluster: Clusters) -> None:
    world = cluster()
    servers = Servers([world.fakes[0].url, f"{world.fakes[1].url}/v2"], wait_s=60)
    with pytest.raises(LoadError, match=r"assistant at .*/v1/v2 refuses a request: status 404 .*; check the address"):
        AuthorConnections(servers, world.members.head, world.members.tokenizer)


def test_a_key_is_needed_where_servers_want_one(cluster: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    world = cluster(key="secret")
    check(world, LoadError, "status 401 .*; name the key's environment variable", wait_s=60)
    check(world, ConfigError, "the environment variable THE_KEY holds no key", api_key_env="THE_KEY")
    monkeypatch.setenv("THE_KEY", "secret")
    assert world.connect(api_key_env="THE_KEY").generate([[5]], SamplingParams(max_tokens=2), threshold=0.5)


def test_servers_may_listen_on_unix_sockets(
    members: Callable[[int], Members], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # is for other servers
    world, greedy = members(1), SamplingParams(max_tokens=4)
    with ExitStack() as stack:
        paths = [tmp_path / f"Author {author}.sock" for author in range(2)]
        pairs = zip(world.served, paths, strict=True)
        fakes = [stack.enter_context(FakeVllm(served, pieces=(1,), socket=path)) for served, path in pairs]
        servers = Servers([fake.url for fake in fakes])
        model = CoLLM(world.models[0], world.models[1:], world.head, world.tokenizer, servers=servers)
        with closing(model.backend.connections):
            (found,) = model.generate([[5, 6]], greedy, threshold=0.5)
    (expected,) = world.local.generate([[5, 6]], greedy, threshold=0.5)
    assert found.token_ids == expected.token_ids


# Waiting


def test_a_server_that_is_not_up_is_named(cluster: Clusters) -> None:
    world = cluster()
    world.fakes[1].down()
    check(world, LoadError, r"assistant at http.* is not up after 0 s: ConnectError.*; start it, or wait longer")


def test_servers_are_waited_for_and_named_meanwhile(
    cluster: Clusters, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOKS_EVERY_S", 0.02)
    caplog.set_level(logging.INFO, "collm.vllm")
    world = cluster()
    base, assistant = world.fakes
    base.of_path["/v1/models"] = [DOWN, refusal(503), refusal(429), refusal(500, "starting")]
    assistant.down()
    starter = threading.Timer(0.5, assistant.up)
    starter.start()
    model = world.connect(wait_s=60)
    starter.join()
    assert model.backend.connections.authors[1].model == "tiny"
    assert "waiting for base at" in caplog.text
    assert "status 503" in caplog.text


def test_the_wait_is_bounded_for_a_server_that_hangs(cluster: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOKS_EVERY_S", 0.02)
    monkeypatch.setattr(module, "_LEAST_LOOK_S", 0.1)
    world = cluster()
    world.fakes[1].of_path["/v1/models"] = [HANG] * 50
    began = time.monotonic()
    check(world, LoadError, "is not up after 0.3 s: no answer within", wait_s=0.3)
    assert time.monotonic() - began < 10  # not the 20 of the time limit


@pytest.mark.parametrize("fault", [HANG, DOWN, refusal(500), Fault(status=200, text="{}")])
def test_a_start_that_fails_later_is_an_error_of_ours(cluster: Clusters, fault: Fault) -> None:
    world = cluster()
    world.fakes[1].of_path["/tokenize"] = [fault]
    check(world, ModelFailure, "assistant at http", timeout_s=1.0)
