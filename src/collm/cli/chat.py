"""`collm chat`: a conversation in the terminal, each token in its author's colour."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.cli.options import CollaborationArgument, Fields, Loading, OperatingPoint, with_options
from collm.core.params import SamplingParams

if TYPE_CHECKING:
    from collm.cli.terminal import Console
    from collm.collaboration import CoLLM
    from collm.core.types import TokenStep

HELP = """\
/threshold X   let the base keep a token while its defer prob is at most X
/budget X      use the best threshold within this deferral rate
/model NAME    choose who answers: collaboration, base, assistant, assistant-2, ..
/history       show the conversation
/undo          remove the last question and its answer
/clear         begin a new conversation
/save FILE     write the conversation as a row of training data, with the author of each token
/help          show this help
/quit          quit, like Ctrl-D. Ctrl-C stops an answer"""


@with_options
def chat(
    collaboration: CollaborationArgument,
    operating: OperatingPoint,
    params: Annotated[
        SamplingParams,
        Fields(
            "max_new_tokens temperature",
            "top_p top_k min_p presence_penalty frequency_penalty repetition_penalty",
            "Sampling",
            {"max_new_tokens": 1024},
        ),
    ],
    loading: Annotated[Loading, Fields("device trust_code", "dtype engine servers")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Chat with a collaboration in the terminal. /help lists the commands.

    Each model keeps earlier turns in its KV cache, so a turn reads only new tokens.
    """
    import transformers

    from collm.cli.terminal import Console, legend

    transformers.utils.logging.disable_progress_bar()
    model = loading.load(collaboration)
    threshold = model.threshold(operating.threshold, operating.budget)
    talk = Conversation(model, params, threshold, system)
    talk.check()
    console = Console(soft_wrap=True)
    console.print(legend(model.author_names), "[dim]/help for more[/dim]")
    _converse(talk, console)


@dataclass
class Conversation:
    """Turns with one collaboration.

    Attributes:
        threshold: of the collaboration.
        system: the system message, if any.
        author: who answers alone; None for the collaboration.
        turns: question and answer of each.
    """

    model: CoLLM
    params: SamplingParams
    threshold: float
    system: str | None = None
    author: int | None = None
    turns: list[tuple[str, list[TokenStep]]] = field(default_factory=list)

    def check(self) -> None:
        """Raise a RequestError where the collaboration takes no chats."""
        self.model.template.encode_prompt(self.model.tokenizer, self.messages("hello"))

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """The turns so far, and an open question."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, steps in self.turns:
            found.append({"role": "user", "content": asked})
            found.append({"role": "assistant", "content": "".join(step.text for step in steps)})
        return found if question is None else [*found, {"role": "user", "content": question}]

    def ask(self, question: str) -> Generator[TokenStep, None, None]:
        """Stream the answer token by token. What has been generated is kept even if the consumer stops early."""
        from collm.core.policies import SingleAuthorPolicy, ThresholdPolicy

        policy = ThresholdPolicy(self.threshold) if self.author is None else SingleAuthorPolicy(self.author)
        steps: list[TokenStep] = []
        stream = self.model.stream(self.messages(question), self.params, policy=policy)
        try:
            for step in stream:
                steps.append(step)
                yield step
        finally:
            stream.close()
            self.turns.append((question, steps))

    def save(self, path: Path) -> None:
        """Write one row of training data, and beside its messages who wrote each token of the answers."""
        from collm.atomic import write_text
        from collm.errors import WriteError

        if path.exists():
            raise WriteError(f"{path} exists; choose another name")
        authors = [[step.author for step in steps] for _, steps in self.turns]
        row = {"messages": self.messages(), "authors": authors, "author_names": self.model.author_names}
        write_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def _converse(talk: Conversation, console: Console) -> None:
    """Read lines until there are no more."""
    from collm.cli.terminal import not_text
    from collm.errors import CollmError

    with suppress(ImportError):  # lines can be typed without
        import readline  # noqa: F401 - gives input() its editing and its history
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        except UnicodeDecodeError as error:
            raise not_text(error) from error
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _obey(talk, console, line)
            elif line:
                _answer(talk, console, line)
        except CollmError as error:
            console.print(str(error), style="red", markup=False)


def _answer(talk: Conversation, console: Console, question: str) -> None:
    from collm.core.types import deferral_rate

    answer = talk.ask(question)
    try:
        for step in answer:
            console.show([step])
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    finally:
        answer.close()
    authors = [step.author for step in talk.turns[-1][1]]
    console.print(f"\n[dim]{len(authors)} tokens, {deferral_rate(authors):.1%} by assistants[/dim]")


def _obey(talk: Conversation, console: Console, line: str) -> None:
    name, _, rest = line.partition(" ")
    commands: dict[str, Callable[[str], str]] = {
        "/threshold": lambda value: _set(talk, threshold=_number(name, value)),
        "/budget": lambda value: _set(talk, budget=_number(name, value)),
        "/model": lambda value: _choose(talk, value),
        "/undo": lambda _: _forget(talk, 1),
        "/clear": lambda _: _forget(talk, len(talk.turns)),
        "/save": lambda value: _save(talk, value),
        "/help": lambda _: HELP,
    }
    if name == "/history":
        _show(talk, console)
    elif name in commands:
        console.print(commands[name](rest.strip()), style="dim", markup=False)
    else:
        console.print(f"{name} is no command; /help lists them", style="dim", markup=False)


def _number(name: str, value: str) -> float:
    from collm.errors import ConfigError

    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{name} was given {value!r}, expected a number, as {name} 0.4") from None


def _set(talk: Conversation, **limits: float) -> str:
    from collm.core.calibration import threshold_text
    from collm.core.types import check_threshold

    talk.threshold, talk.author = check_threshold(talk.model.threshold(**limits)), None
    return f"threshold {threshold_text(talk.threshold)}"


def _choose(talk: Conversation, name: str) -> str:
    from collm.errors import ConfigError

    names = talk.model.author_names
    if name == "collaboration":
        return _set(talk, threshold=talk.threshold)
    if name not in names:
        raise ConfigError(f"/model was given {name!r}, expected one of collaboration, {', '.join(names)}")
    talk.author = names.index(name)
    return f"{name} alone"


def _forget(talk: Conversation, count: int) -> str:
    del talk.turns[len(talk.turns) - count :]
    return f"{len(talk.turns)} turns left"


def _save(talk: Conversation, name: str) -> str:
    from collm.errors import ConfigError

    if not name:
        raise ConfigError("/save needs a file, as /save talk.jsonl")
    talk.save(Path(name).expanduser())
    return f"written to {name}"


def _show(talk: Conversation, console: Console) -> None:
    for question, steps in talk.turns:
        console.print("[bold]you:[/bold] ", end="")
        console.print(question, markup=False)
        console.show(steps)
        console.print()
