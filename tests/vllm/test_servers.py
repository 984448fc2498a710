"""On real vLLM servers; `make test-vllm` makes their environment and runs these."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil
import pytest
import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, ModelSpec, SamplingParams
from collm.core.policies import BudgetPolicy, Policy, RandomPolicy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.sampling import token_probs
from collm.errors import MismatchError, ModelFailure
from collm.vllm import THRESHOLD
from collm.vllm.export import Note
from collm.vllm.launch import ServerProcess, launched
from collm.vllm.servers import Servers
from tests.engine.test_engine import prompts_of, random_head
from tests.tiny_models import make_model, tiny_config
from tests.vllm.test_engine import check_all_equal, check_drawn

pytestmark = pytest.mark.vllm

PYTHON = os.environ.get("COLLM_VLLM_PYTHON", "")
QUIET = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else a process spins for each model, and there are few cores
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
"""vLLM's attention on a CPU wants heads of 32 or wider."""
FLAGS = [
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 26)),
    *("--enforce-eager", "--block-size", "32", "--distributed-executor-backend", "uni"),
    *("--max-logprobs", "-1", "--enable-prompt-tokens-details"),
]
GREEDY = SamplingParams(max_tokens=40)


@dataclass
class World:
    """Collaborations of one and of two assistants, whose base differs in its head alone, with their servers."""

    artefacts: dict[int, Path]
    exports: dict[int, Path]
    bases: dict[int, ServerProcess]
    assistants: list[ServerProcess]

    def servers(self, k: int, **options: object) -> Servers:
        urls = [self.bases[k].url, *(one.url for one in self.assistants[:k])]
        return Servers(urls, **options)  # type: ignore[arg-type]

    def served(self, k: int, **options: object) -> CoLLM:
        return CoLLM.from_pretrained(self.artefacts[k], servers=self.servers(k, **options))

    def local(self, k: int) -> CoLLM:
        return CoLLM.from_pretrained(self.artefacts[k])


@pytest.fixture(scope="module")
def world(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if not PYTHON:
        pytest.fail("COLLM_VLLM_PYTHON names no interpreter with vLLM; run these tests with 'make test-vllm'")
    root = tmp_path_factory.mktemp("vllm")
    for seed, name in enumerate(("base", "one", "two")):
        make_model(tiny_config(**SHAPE), seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    artefacts, exports = {}, {}
    for k, names in {1: ["one"], 2: ["one", "two"]}.items():
        head = random_head(64, k, scale=1.0)
        head.bias.data += 0.5
        assistants = [ModelSpec(str(root / name)) for name in names]
        model = CoLLM(ModelSpec(str(root / "base")), assistants, head, tokenizer)
        artefacts[k], exports[k] = root / f"artefact-{k}", root / f"export-{k}"
        model.save_pretrained(artefacts[k])
        model.export_vllm(exports[k])
    models = {"base-1": exports[1], "base-2": exports[2], "one": root / "one", "two": root / "two"}
    plans = [ServerProcess(name, str(path), FLAGS, QUIET) for name, path in models.items()]
    with launched(plans, PYTHON, root / "logs", wait_s=400) as running:
        yield World(artefacts, exports, {1: running[0], 2: running[1]}, list(running[2:]))


@pytest.mark.parametrize("k", [1, 2])
def test_greedy_equals_the_models_in_memory_for_mixed_rules_at_once(world: World, k: int) -> None:
    policies: list[Policy] = [ThresholdPolicy(eta) for eta in (-1.0, 0.0, 0.2, 0.5, 0.8, 0.95, 1.0)]
    policies += [SingleAuthorPolicy(0), BudgetPolicy(0.2, 0.3), RandomPolicy(0.3)]
    policies = policies * 4
    prompts = prompts_of(11, len(policies))  # ragged
    params = [replace(GREEDY, seed=place if policy.draws else None) for place, policy in enumerate(policies)]
    expected = world.local(k).generate(prompts, params, policy=policies)
    check_all_equal(world.served(k).generate(prompts, params, policy=policies), expected)
    assert {author for one in expected for author in one.authors} == set(range(k + 1))


def test_stop_strings_and_ends_cut_the_same_text(world: World) -> None:
    prompts = prompts_of(5, 8)
    local, served = world.local(1), world.served(1)
    whole = local.generate(prompts, GREEDY, threshold=0.5)
    params = [SamplingParams(max_tokens=40, stop=[one.text[place : place + 7]]) for place, one in enumerate(whole, 20)]
    expected = local.generate(prompts, params, threshold=0.5)
    assert {one.finish_reason for one in expected} == {"stop"}
    check_all_equal(served.generate(prompts, params, threshold=0.5), expected)


def test_forty_requests_at_once_stream_the_same_steps(world: World) -> None:
    prompts = prompts_of(3, 40)
    policies = [ThresholdPolicy(place / 40) for place in range(40)]
    served = world.served(2)
    out = served.generate(prompts, GREEDY, policy=policies, max_batch=40)
    expected = world.local(2).generate(prompts, GREEDY, policy=policies)
    check_all_equal(out, expected)
    steps = list(served.stream(prompts[7], GREEDY, policy=policies[7]))
    assert [step.token_id for step in steps] == out[7].token_ids
    assert "".join(step.text for step in steps) == out[7].text


def test_two_requests_a_deferral_and_one_more(world: World) -> None:
    out = world.served(2).generate(prompts_of(2, 12), GREEDY, threshold=0.4)
    deferrals = sum(author > 0 for one in out for author in one.authors)
    requests = sum(used.calls for used in out.usage.values())
    tokens = sum(len(one.token_ids) for one in out)
    assert 0 < deferrals < tokens
    assert requests <= 2 * deferrals + len(out)
    assert sum(out.usage[name].calls for name in ("assistant", "assistant-2")) == deferrals


def test_prefixes_are_not_read_again(world: World) -> None:
    """All but the last block, of 32 tokens, comes from the cache at each deferral after the first."""
    prompt = [*range(3, 93)] * 4
    before = _counter(world.assistants[0].url, "vllm:prefix_cache_hits_total")
    (out,) = world.served(1).generate([prompt], GREEDY, threshold=0.5)
    hits = _counter(world.assistants[0].url, "vllm:prefix_cache_hits_total") - before
    assert sum(out.authors) > 5
    assert hits >= (sum(out.authors) - 1) * (len(prompt) - 32)


def ask(url: str, json: Any = None, **options: Any) -> httpx.Response:
    """The answer of a server that listens on a Unix socket."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=unquote(url.split("/")[2])), **options) as client:
        return client.request("GET" if json is None else "POST", url, json=json)


def _counter(url: str, name: str) -> float:
    lines = ask(url.replace("/v1", "/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_sampling_follows_the_stated_law(world: World) -> None:
    """The first token: the threshold rule's author, and that author's distribution at this temperature and top-p."""
    served, local = world.served(1), world.local(1)
    for prompt, threshold in (("w4 w9", -1.0), ("w4 w9", 1.0)):
        ids = served.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        member = local.members[1 if threshold < 0 else 0]
        with torch.no_grad():
            logits = member.module(torch.tensor([ids])).logits[0, -1]  # type: ignore[union-attr]
        params = [SamplingParams(max_tokens=1, temperature=1.3, top_p=0.9, seed=seed) for seed in range(400)]
        law = token_probs(logits, 1.3, 0.9, 0)
        out = served.generate([prompt] * 400, params, threshold=threshold, max_batch=64)
        check_drawn(torch.tensor([one.token_ids[0] for one in out]), law)
        assert [one.token_ids for one in out[:20]] == [
            one.token_ids for one in served.generate([prompt] * 20, params[:20], threshold=threshold)
        ]


def test_rows_are_never_text_and_wrong_values_are_refused(world: World) -> None:
    note = Note.read(world.exports[2])
    url = f"{world.bases[2].url}/completions"
    body = {"prompt": [5, 6], "max_tokens": 200, "temperature": 2.0, "ignore_eos": True, "return_token_ids": True}
    written = ask(url, json=body, timeout=60).json()["choices"][0]["token_ids"]
    assert len(written) == 200
    assert max(written) < note.vocab_size
    for value in (2, "much"):
        refused = ask(url, json={**body, "vllm_xargs": {THRESHOLD: value}})
        assert refused.status_code == 400
        assert THRESHOLD in refused.text
    assert ask(url, json={**body, "vllm_xargs": {"defer_treshold": 0.5}}).status_code == 400


def test_candidates_are_those_of_the_models(world: World) -> None:
    """But for the share of the row of zeros."""
    served, local = world.served(2), world.local(2)
    ids = local.generate("w5 w6", GREEDY, threshold=0.5)[0].token_ids[:6]
    for ours, theirs in zip(served.candidates("w5 w6", ids), local.candidates("w5 w6", ids), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert [text for text, _ in mine] == [text for text, _ in other]
            assert [prob for _, prob in mine] == pytest.approx([prob for _, prob in other], rel=0.02)


def test_servers_of_something_else_are_refused(world: World) -> None:
    one, two = world.assistants
    for urls in ([one.url, two.url, two.url], [world.bases[1].url, one.url, two.url]):  # no export, and another
        model = CoLLM.from_pretrained(world.artefacts[2], servers=Servers(urls))
        with pytest.raises(MismatchError, match="not an export of this collaboration's base and head"):
            model.generate("w1", threshold=0.5)


def test_an_openai_client_sees_the_servers_through_collm_serve(world: World, tmp_path: Path) -> None:
    world.servers(1, on_failure="base").write(tmp_path / "servers.yaml")
    with serving("serve", str(world.artefacts[1]), "--servers", str(tmp_path / "servers.yaml")) as (asked, _):
        chunks = list(asked(stream=True))
        whole = check_authors(asked(), world.local(1))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[Callable[..., Any], list[psutil.Process]]]:
    """Run a command that serves a collaboration: a function that asks for a completion, and the command's children.
    It ends without an error and leaves no process.
    """
    command = [sys.executable, "-m", "collm", *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **QUIET}) as process:
        try:
            assert process.stderr is not None
            logged = (json.loads(line).get("message", "") for line in process.stderr if line.startswith("{"))
            url = next(
                f"http://{message.partition('http://')[2].split()[0]}" for message in logged if "http:" in message
            )
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            options = {"model": Path(arguments[1]).name, "prompt": "w5 w6", "max_tokens": 20, "temperature": 0}
            children = psutil.Process(process.pid).children(recursive=True)
            extra = {"extra_body": {"collm": {"threshold": 0.5}}}
            yield partial(client.completions.create, **options, **extra), children  # type: ignore[arg-type]
        finally:
            process.send_signal(signal.SIGTERM)
            _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, rest
    assert not psutil.wait_procs(children, timeout=10)[1]


def check_authors(reply: Any, local: CoLLM) -> str:
    """The text of a completion, which is that of the models in memory, by both authors."""
    (expected,) = local.generate("w5 w6", SamplingParams(max_tokens=20), threshold=0.5)
    assert (reply.choices[0].text, reply.choices[0].collm["authors"]) == (expected.text, expected.authors)
    assert 1 in expected.authors
    return expected.text


def test_commands_take_servers(world: World, tmp_path: Path) -> None:
    servers = ",".join(world.servers(1).urls)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w5 w6", "completion": "w7"}\n')
    rows = ["--task", "rows", "--data", str(tmp_path / "rows.jsonl"), "--metric", "token_f1", "--threshold", "0.5"]
    compared = ["--compare", "base,assistant,random,threshold=0.9", "--out", str(tmp_path / "run")]
    for arguments in (
        ["generate", str(world.artefacts[1]), "w5 w6", "--threshold", "0.5"],
        ["eval", str(world.artefacts[1]), *rows, *compared],
    ):
        command = [sys.executable, "-m", "collm", *arguments]
        served = subprocess.run([*command, "--servers", servers], capture_output=True, text=True, check=True)
        if arguments[0] == "generate":
            local = subprocess.run(command, capture_output=True, text=True, check=True)
            assert served.stdout == local.stdout
    found = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["name"] for row in found] == ["collaboration", "base", "assistant", "random", "threshold=0.9"]
    assert all(row["flops"] > 0 for row in found)


def test_launch_starts_all_serves_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    arguments = ["launch", str(world.artefacts[1]), "--vllm-python", PYTHON, "--work", str(tmp_path / "work")]
    with serving(*arguments, "--max-batch", "2", "--wait", "400", "--separate") as (asked, children):
        assert sum("api_server" in " ".join(child.cmdline()) for child in children) == 2
        check_authors(asked(), world.local(1))


def test_an_assistant_that_dies_is_stood_in_for_and_a_base_that_dies_fails(world: World) -> None:
    """Last, as it ends the servers of two."""
    lenient, strict = (world.served(2, on_failure=choice, retries=1, timeout_s=5.0) for choice in ("base", "fail"))
    prompts = prompts_of(4, 4)
    for model in (lenient, strict):  # all is well at the start
        assert not any(one.stood_in for one in model.generate(prompts, GREEDY, threshold=0.4))
    world.assistants[1].stop()
    with pytest.raises(ModelFailure, match=r"assistant-2 at .*check that the server runs"):
        strict.generate(prompts, GREEDY, threshold=0.4)
    after = lenient.generate(prompts, GREEDY, threshold=0.4)
    places = [place for one in after for place in one.stood_in]
    assert len(places) == after.usage["assistant-2"].failed > 0
    assert all(one.authors[place] == 0 for one in after for place in one.stood_in)
    assert all(2 not in one.authors for one in after)
    world.bases[2].stop()
    with pytest.raises(ModelFailure, match=r"base at .*check that the server runs"):
        lenient.generate(prompts, GREEDY, threshold=0.4)
