"""A chat template that does not end is interrupted, and nothing else is."""

from __future__ import annotations

import threading
import time

import pytest

from collm.errors import RequestError
from collm.models import template as templates
from collm.models.template import PromptTemplate
from collm.models.time_limit import INTERVAL_S, time_limit
from tests.models.test_template import BYTE_LEVEL, CHAT, CHATML

ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.slow
def test_a_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LONGEST_RENDERING_S", 0.2)
    with pytest.raises(RequestError, match=r"the chat template rejects .*: it took longer than 0.2 s"):
        PromptTemplate(chat=ENDLESS).encode_prompt(BYTE_LEVEL, CHAT)
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
        "{{ 'x' * 10 ** 12 }}",
        "{{ undefined.a.b }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10 ** 9) }}",
        "{% for",
    ],
)
def test_a_template_reaches_nothing_outside_of_itself(template: str) -> None:
    with pytest.raises(RequestError, match=r"the chat template rejects the messages|the prompt is empty"):
        PromptTemplate(chat=template).encode_prompt(BYTE_LEVEL, CHAT)


@pytest.mark.slow
def test_only_the_thread_whose_time_is_up_is_interrupted() -> None:
    outcomes = {}

    def work(name: str, seconds: float) -> None:
        try:
            with time_limit(seconds):
                ends = time.monotonic() + 4 * INTERVAL_S
                while time.monotonic() < ends:
                    pass
            outcomes[name] = "done"
        except TimeoutError:
            outcomes[name] = "interrupted"

    threads = [threading.Thread(target=work, args=one) for one in (("short", 0.01), ("long", 60.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {"short": "interrupted", "long": "done"}


@pytest.mark.slow
def test_no_interruption_comes_after_the_block() -> None:
    for seconds in (0.0, INTERVAL_S / 2, INTERVAL_S, 1.5 * INTERVAL_S):
        try:
            with time_limit(seconds):
                time.sleep(INTERVAL_S)
        except TimeoutError:
            pass
        ends = time.monotonic() + 2 * INTERVAL_S
        while time.monotonic() < ends:
            pass


def test_an_error_of_the_block_stays_what_it_is() -> None:
    with pytest.raises(KeyError), time_limit(60):
        raise KeyError("x")
