"""Runs requests: in company that fails or leaves, as streams, with a small cache, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from collm import CoLLM
from collm.core.named import name_of
from collm.core.policies import ThresholdPolicy
from collm.core.types import Completion, PromptLogprob
from collm.engine.runner import ModelRunner
from collm.errors import CollmError, ModelFailure
from collm.text.template import Prompt
from tests.crossings.cases import POISON, TOOLS, Case
from tests.serving.conftest import Running, open_slots


class Refused(Exception):  # noqa: N818
    """A combination was refused before work began."""


@contextmanager
def before_work() -> Iterator[None]:
    """What is refused here is refused in one sentence."""
    try:
        yield
    except ModelFailure:
        raise
    except CollmError as error:
        raise Refused(str(error)) from error


def fails_on_poison(model: CoLLM, patch: pytest.MonkeyPatch) -> None:
    """All models in memory raise where they read the poisoned token."""
    for runner, tokenizer in zip(model.runners, model.author_tokenizers, strict=True):
        if not isinstance(runner, ModelRunner):
            continue
        (poison,) = tokenizer(POISON)["input_ids"]
        plain = runner.model.hidden_states

        def raises(input_ids: torch.Tensor, plain: Any = plain, poison: int = poison, **inputs: Any) -> torch.Tensor:
            if (input_ids == poison).any():
                raise RuntimeError("device-side assert")
            return plain(input_ids, **inputs)

        patch.setattr(runner.model, "hidden_states", raises)


def prepare(model: CoLLM, case: Case, patch: pytest.MonkeyPatch) -> None:
    """What a way of running needs of the models."""
    if model.servers is not None:
        return
    if "failing neighbour" in case.ways:
        fails_on_poison(model, patch)
    if "preempt" in case.ways:
        for runner in model.runners:
            if isinstance(runner, ModelRunner):
                runner.set_capacity(160 if model.alignment is None else 320)


def decode(model: CoLLM, case: Case) -> list[Completion]:
    """The completions of all prompts, n for each, in company of what the ways add."""
    with before_work():
        requests = [model.request(prompt, params, case.policy) for prompt in case.prompts for params in case.params]
        loop = model.engine(max_batch=8, **({} if model.servers else {"lookahead": 4}))
        wanted = {loop.add(request): place for place, request in enumerate(requests)}
    others = {
        name: loop.add(model.request(prompt, case.params[0], case.policy))
        for name, prompt in {"failing neighbour": f"{POISON} it", "cancel": "it is what"}.items()
        if name in case.ways
    }
    came, texts, failed = dict[int, Completion](), dict[int, str](), list[int]()
    for round_ in range(3000):
        if round_ == 2 and "cancel" in others:
            loop.cancel(others["cancel"])
        if not loop.has_work:
            break
        for output in loop.step():
            if output.failure is not None:
                assert isinstance(output.failure, ModelFailure), output.failure
                failed.append(output.number)
            elif output.number in wanted:
                assert output.step is not None
                texts[output.number] = texts.get(output.number, "") + output.step.text
                if output.completion is not None:
                    came[output.number] = output.completion
    assert not loop.has_work
    assert failed == [number for name, number in others.items() if name == "failing neighbour"]
    assert {number: one.text for number, one in came.items()} == texts
    assert came.keys() == wanted.keys()
    for number, one in came.items():
        if (most := requests[wanted[number]].params.prompt_logprobs) is not None:
            one.prompt_logprobs = model.prompt_logprobs(one.prompt_token_ids, most, policy=case.policy)
    assert open_slots(model) == 0
    return [came[number] for number in wanted]


def stream(model: CoLLM, case: Case) -> list[Completion]:
    """The same from `CoLLM.stream`, one at a time, of which another may be left at its second token."""
    found = []
    for prompt in case.prompts:
        for params in case.params:
            with before_work():
                steps = model.stream(prompt, params, policy=case.policy)
            if "cancel" in case.ways:
                next(steps)
                steps.close()
                assert open_slots(model) == 0
                steps = model.stream(prompt, params, policy=case.policy)
            written = list(steps)
            found.append(
                Completion(
                    [one.token_id for one in written],
                    [one.text for one in written],
                    [one.author for one in written],
                    [one.defer_prob for one in written],
                    [one.logprob for one in written],
                    "length",
                    model.template.encode_prompt(model.tokenizer, prompt),
                )
            )
    assert open_slots(model) == 0
    return found


def body_of(case: Case, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request."""
    given = dict(case.options)
    body: dict[str, Any] = {"model": "m", "max_tokens": 12, "n": case.n, "temperature": 0.0}
    threshold = isinstance(case.policy, ThresholdPolicy)
    body["collm"] = {"threshold": case.policy.threshold} if threshold else {"policy": name_of(case.policy)}  # type: ignore[attr-defined]
    if structured := given.pop("structured_outputs", None):
        body["structured_outputs"] = {"regex": structured.regex}
    if (most := given.pop("prompt_logprobs", None)) is not None:
        body |= {"echo": True, "logprobs": most}
    body |= {**given, **({"stop": list(given["stop"])} if "stop" in given else {})}
    if case.offers_tools:
        return "/v1/chat/completions", {**body, "messages": list(prompt), "tools": TOOLS}
    return "/v1/completions", {**body, "prompt": prompt}


def ask_http(running: Running, case: Case, prompt: Prompt) -> list[Completion]:
    path, body = body_of(case, prompt)
    choices = dict[int, list[Any]]()
    if "stream" in case.ways:
        with running.client.stream("POST", path, json={**body, "stream": True}) as reply:
            lines = list(reply.iter_lines())
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")] if reply.is_success else []
            refused = "".join(lines)
    else:
        reply = running.client.post(path, json=body)
        events, refused = [reply.json()] if reply.is_success else [], reply.text
    if 400 <= reply.status_code < 500:
        error = json.loads(refused)["error"]
        assert error["param"] is None or error["param"] in body, error
        with before_work():
            raise CollmError(error["message"])
    assert reply.is_success, f"{reply.status_code}: {refused}"
    for event in events:
        for choice in event["choices"]:
            one = choices.setdefault(choice["index"], ["", [], [], []])
            message = choice.get("message") or choice.get("delta") or choice
            one[0] += message.get("content") or message.get("text") or ""
            one[1] += choice["collm"]["token_ids"]
            one[2] += choice["collm"]["authors"]
            if choice.get("logprobs"):
                one[3] += choice["logprobs"]["token_logprobs"]
    prompt_ids = running.models["m"].template.encode_prompt(running.models["m"].tokenizer, prompt)
    found = []
    for _, (text, token_ids, authors, logprobs) in sorted(choices.items()):
        if "prompt_logprobs" in case.options:
            assert text.startswith(str(prompt))
            text = text.removeprefix(str(prompt))
        one = Completion(token_ids, [text], authors, [], [], "length", prompt_ids)
        if logprobs:
            of_prompt = zip(prompt_ids, logprobs, strict=False)
            one.prompt_logprobs = [PromptLogprob(token_id, logprob, 1, ()) for token_id, logprob in of_prompt]
        found.append(one)
    return found


def leave_http(running: Running, case: Case) -> None:
    """Ask for a stream and leave after its first bytes."""
    path, body = body_of(case, case.prompts[0])
    with running.client.stream("POST", path, json={**body, "stream": True}) as reply:
        next(reply.iter_raw())
