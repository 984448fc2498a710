"""`collm chat`: turns, commands, and what earlier turns leave in the KV caches."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.cli.chat import Conversation, chat, converse
from collm.cli.terminal import Console
from collm.errors import RequestError
from collm.models.loading import ModelSpec
from collm.text.template import PromptTemplate

TEMPLATE = "{% for m in messages %} w0 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w1{% endif %}"


Typed = Callable[..., str]


@pytest.fixture
def talk(model: CoLLM) -> Conversation:
    return Conversation(model, SamplingParams(max_tokens=24), 0.5)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Makes what the terminal shows for lines of a conversation."""

    def shown(talk: Conversation, *lines: str) -> str:
        left, console = iter(lines), Console(file=io.StringIO(), width=1000)

        def read(prompt: str) -> str:
            assert prompt == "you: "  # readline has to know it, or editing and history would write over it
            if (line := next(left, None)) is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        converse(talk, console)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    return shown


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    head = DeferralHead(32, 1)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return CoLLM(
        tiny_model(0), [tiny_model(1, hidden_size=48)], head, tokenizer, template=PromptTemplate(chat=TEMPLATE)
    )


@pytest.mark.slow
def test_every_turn_is_what_generate_makes_of_the_messages(talk: Conversation, model: CoLLM, typed: Typed) -> None:
    talk.system = "w9"
    shown = typed(talk, "w2 w3", "w4", "/history")
    opening = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w2 w3"}]
    first = model.generate([opening], talk.params, threshold=0.5)[0]
    messages = talk.messages()
    assert messages[:3] == [
        {"role": "system", "content": "w9"},
        {"role": "user", "content": "w2 w3"},
        {"role": "assistant", "content": first.text},
    ]
    second = model.generate([messages[:4]], talk.params, threshold=0.5)[0]
    assert [step.token_id for step in talk.turns[1][1]] == second.token_ids
    assert shown.count(first.text) == 2  # as it came, and in the history
    assert f"{len(second.authors)} tokens, {second.deferral_rate:.1%} by assistants" in shown


@pytest.mark.slow
def test_commands_change_who_answers(talk: Conversation, typed: Typed) -> None:
    lines = ("/model assistant", "w2", "/clear", "/model base", "w2", "/clear", "/model collaboration")
    typed(talk, *lines)
    assert (talk.author, talk.turns, talk.threshold) == (None, [], 0.5)
    for command, author in (("/model assistant", 1), ("/model base", 0), ("/threshold -1", 1), ("/threshold 1", 0)):
        typed(talk, command, "w2")
        assert {step.author for step in talk.turns[-1][1]} == {author}, command
    typed(talk, "/undo")
    assert len(talk.turns) == 3


@pytest.mark.slow
def test_each_of_two_assistants_answers_to_its_name(
    talk: Conversation, tiny_model: Callable[..., PreTrainedModel], typed: Typed
) -> None:
    model, two = talk.model, [*talk.model.assistants, tiny_model(2)]
    talk.model = CoLLM(model.base, two, DeferralHead(32, 2), model.tokenizer, template=model.template)
    for author, name in enumerate(("base", "assistant", "assistant-2")):
        shown = typed(talk, f"/model {name}", "w2")
        assert {step.author for step in talk.turns[-1][1]} == {author}
        assert f"{name} alone" in shown
    assert "of collaboration, base, assistant, assistant-2" in typed(talk, "/model assistant-1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/threshold high", "expected a number, as /threshold 0.4"),
        ("/threshold 7", "expected a number from -1 to 1"),
        ("/budget 0.1", "a budget needs a calibration"),
        ("/price 0.7", "this head predicts no gains"),
        ("/model better", "expected one of collaboration, base, assistant"),
        ("/save", "/save needs a file"),
        ("/fly", "/fly is no command; /help lists them"),
        ("/help", "Ctrl-C stops an answer"),
    ],
)
def test_what_is_mistyped_is_said_and_the_talk_goes_on(
    talk: Conversation, typed: Typed, line: str, answer: str
) -> None:
    assert answer in typed(talk, line, "w2")
    assert len(talk.turns) == 1


@pytest.mark.slow
def test_a_conversation_is_saved_as_training_data(talk: Conversation, typed: Typed, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    shown = typed(talk, "w2", "w3", f"/save {path}", f"/save {path}")
    row = json.loads(path.read_text())
    assert row["messages"] == talk.messages()
    assert row["authors"] == [[step.author for step in steps] for _, steps in talk.turns]
    assert "exists; choose another name" in shown


@pytest.mark.slow
def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(talk: Conversation) -> None:
    answer = talk.ask("w2")
    came = [next(answer), next(answer)]
    answer.close()
    assert talk.turns == [("w2", came)]
    assert [runner.open_slots for runner in talk.model.runners] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "author"), [(1, 0), (-1, 1)])
def test_a_turn_reads_only_what_is_new(
    talk: Conversation, saved_model: Callable[..., Path], threshold: float, author: int
) -> None:
    base, assistant = (ModelSpec(str(saved_model(name, seed))) for seed, name in enumerate(("base", "assistant")))
    tokenizer, template = talk.model.tokenizer, talk.model.template
    talk.model = model = CoLLM(base, [assistant], DeferralHead(32, 1), tokenizer, template=template)
    talk.threshold = threshold
    list(talk.ask(" ".join(f"w{i}" for i in range(2, 42))))
    before = model.runners[author].usage.tokens_read
    steps = list(talk.ask("w7"))
    read = model.runners[author].usage.tokens_read - before
    assert {step.author for step in steps} == {author}
    assert read <= len(steps) + 24 + 8  # drafts aside: the new answer, what follows the first, the question


def test_a_collaboration_without_chats_is_refused(model: CoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model.template = PromptTemplate()
    monkeypatch.setattr(CoLLM, "from_pretrained", lambda *_, **__: model)
    with pytest.raises(RequestError, match="no chat template"):
        chat(collaboration="any", threshold=0.5)


@pytest.mark.soak
def test_in_a_terminal(saved_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    specs = [ModelSpec(str(saved_model(name, seed))) for seed, name in enumerate(("base", "assistant"))]
    model = CoLLM(specs[0], specs[1:], DeferralHead(32, 1), tokenizer, template=PromptTemplate(chat=TEMPLATE))
    model.save_pretrained(tmp_path / "pair")
    code = "from collm.cli.main import main; main()"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", str(tmp_path / "pair"), "--threshold", "-1", "--max-tokens", "4"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm-256color"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"w2 w3\n/quit\n")
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:
        pass  # the other end was closed
    finally:
        os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    assert b"4 tokens, 100.0% by assistants" in shown
    assert b"\x1b[1;32m" in shown  # the assistant's colour
