"""Chat templates render as in transformers, within limits of time and memory that hold in C code too."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from collm.errors import RequestError
from collm.text import isolated
from collm.text import template as templates
from collm.text.chats import Chat
from collm.text.template import PromptTemplate
from tests.text.test_template import BYTE_LEVEL, CHAT, CHATML

ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}"
DEEP = "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a | tojson }}"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"q": {"enum": ["<é>", 1.5, True, None]}}}}]


def workers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "isolated.py render" in " ".join(one.cmdline())]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDERING_S", 0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{{ (7 ** (10 ** 8)) > 1 }}",  # a constant, which is computed while the template is compiled
        "{{ ([[1] * 10 ** 4] * 10 ** 4) | sum(start=[]) }}",
        "{{ 1 }}" * 500_000,
    ],
)
def test_a_template_that_takes_long_is_refused(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"the chat template rejects .*: it took longer than 0.2 s"):
        PromptTemplate(chat=template).encode_prompt(BYTE_LEVEL, CHAT)
    assert time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ [0] * 10 ** 9 }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        DOUBLING,
    ],
)
def test_a_template_that_fills_the_memory_is_refused(template: str) -> None:
    with pytest.raises(RequestError, match=r"the chat template rejects .*: it needs more than 1024 MB of memory"):
        PromptTemplate(chat=template).encode_prompt(BYTE_LEVEL, CHAT)
    assert PromptTemplate(chat=CHATML).encode_prompt(BYTE_LEVEL, CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ ''.__class__.__base__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ undefined.a.b }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10 ** 9) }}",
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
        "{{ " + "not " * 100_000 + "1 }}",
        "{{ raise_exception(10 ** 5000) }}",
        "{% for",
        DEEP,
    ],
)
def test_a_template_reaches_nothing_outside_of_itself(template: str) -> None:
    with pytest.raises(RequestError, match=r"the chat template rejects the messages|the prompt is empty"):
        PromptTemplate(chat=template).encode_prompt(BYTE_LEVEL, CHAT)


def test_a_long_complaint_is_cut() -> None:
    with pytest.raises(RequestError) as caught:
        PromptTemplate(chat="{{ raise_exception('no ' * 10 ** 6) }}").encode_prompt(BYTE_LEVEL, CHAT)
    assert len(str(caught.value)) < 3000


@dataclasses.dataclass
class Dumped:
    name: str

    def model_dump(self) -> dict[str, str]:
        return {"name": self.name}


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML, CHAT),
        (CHATML, [{"role": "user", "content": "日本\n\u2028\x00 \U0001f600 <&>\"'"}]),
        ("{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ messages }}", Chat(CHAT, TOOLS)),
        ("{{ bos_token }}{{ eos_token }}{{ messages[0].name is defined }}", [{**CHAT[0], "name": None}]),
        (
            "{{ thoughts }}{{ seconds }}{{ task }}",
            Chat(CHAT, template_kwargs={"thoughts": True, "seconds": 5, "task": "a"}),
        ),
        ("{{ eos_token }}", Chat(CHAT, template_kwargs={"eos_token": "mine"})),
        ("{{ strftime_now('%Y') }}{% generation %}{{ messages[1].content }}{% endgeneration %}", CHAT),
        ("{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.content }}\n{% endfor %}", CHAT),
        ("{{ messages[0] }}", [{**CHAT[0], "when": date(2026, 1, 2), "calls": [Dumped("f")], "at": (1, 2.5, None)}]),
        ("{{ messages[0].reasoning_content }}", [{**CHAT[0], "thinking": "hm"}]),
        ("{{ raise_exception('Roles must alternate') }}", CHAT),
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", CHAT),
        ("{{ messages[0].absent.more }}", CHAT),
        ("{{ messages[0] | unknown }}", CHAT),
    ],
)
@pytest.mark.parametrize("open_turn", [False, True])
def test_a_chat_is_rendered_as_by_transformers(template: str, messages: list[dict[str, Any]], open_turn: bool) -> None:
    chat = messages if isinstance(messages, Chat) else Chat(messages)
    try:
        expected = apply(BYTE_LEVEL, template, chat, add_generation_prompt=open_turn)
    except Exception as error:
        expected = f"rejected: {error}"
    try:
        text = PromptTemplate(chat=template).render_chat(BYTE_LEVEL, chat, open_turn=open_turn)
    except RequestError as error:
        text = f"rejected: {error.__cause__}"
    assert text == expected.replace("(1, 2.5, None)", "[1, 2.5, None]")


def apply(tokenizer: PreTrainedTokenizerBase, template: str, chat: Chat, **options: Any) -> str:
    options |= chat.template_kwargs
    return str(
        tokenizer.apply_chat_template(list(chat), tools=chat.tools, chat_template=template, tokenize=False, **options)
    )


@pytest.mark.parametrize("content", ["the dog ", "the dog\n", ""])
def test_a_message_is_continued_as_by_transformers(content: str) -> None:
    last = {"role": "user", "content": content}
    chat = Chat([*CHAT, last], add_generation_prompt=False, continue_final_message=True)
    text = PromptTemplate(chat=CHATML).render_chat(BYTE_LEVEL, chat, open_turn=False)
    assert text == apply(BYTE_LEVEL, CHATML, chat, continue_final_message=True)


def test_a_chat_without_messages_is_refused() -> None:
    with pytest.raises(RequestError, match="no messages to render; expected at least one"):
        PromptTemplate(chat=CHATML).render_chat(BYTE_LEVEL, [], open_turn=True)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_one_that_takes_long_holds_up_no_other() -> None:
    outcomes: list[str] = []

    def work(template: str) -> None:
        try:
            outcomes.append(PromptTemplate(chat=template).render_chat(BYTE_LEVEL, CHAT, open_turn=True))
        except RequestError as error:
            outcomes.append(str(error.__cause__))

    threads = [threading.Thread(target=work, args=(one,)) for one in [ENDLESS] * 6 + ["{{ 1 }}"] * 40]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["1"] * 40 + ["it took longer than 0.2 s"] * 6
    assert len(workers()) <= isolated._PROCESSES


@pytest.mark.slow
def test_an_interrupt_leaves_no_reply_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "{% for i in range(99999) %}{% for j in range(30) %}{% endfor %}{% endfor %}slow"
    assert PromptTemplate(chat="{{ 1 }}").render_chat(BYTE_LEVEL, CHAT, open_turn=True) == "1"
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        PromptTemplate(chat=slow).render_chat(BYTE_LEVEL, CHAT, open_turn=True)
    assert PromptTemplate(chat="{{ 1 }}").render_chat(BYTE_LEVEL, CHAT, open_turn=True) == "1"


def forked(texts: Any) -> None:
    texts.put([PromptTemplate(chat="{{ 2 }}").render_chat(BYTE_LEVEL, CHAT, open_turn=True) for _ in range(20)])


@pytest.mark.slow
def test_a_forked_process_has_its_own() -> None:
    assert PromptTemplate(chat="{{ 1 }}").render_chat(BYTE_LEVEL, CHAT, open_turn=True) == "1"
    forks = multiprocessing.get_context("fork")
    theirs = forks.Queue()
    process = forks.Process(target=forked, args=(theirs,))
    process.start()
    ours = [PromptTemplate(chat="{{ 1 }}").render_chat(BYTE_LEVEL, CHAT, open_turn=True) for _ in range(20)]
    assert (ours, theirs.get(timeout=60)) == (["1"] * 20, ["2"] * 20)
    process.join()


@pytest.mark.slow
def test_its_modules_do_not_come_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("raise SystemExit('a module of a stranger')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    new: queue.LifoQueue[Any] = queue.LifoQueue()
    new.put(None)
    monkeypatch.setattr(isolated, "_workers", lambda *_: new)
    assert PromptTemplate(chat="{{ 1 }}").render_chat(BYTE_LEVEL, CHAT, open_turn=True) == "1"
    isolated._end_all(new, os.getpid())
