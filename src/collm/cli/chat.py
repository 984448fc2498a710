"""`collm chat`: a conversation in the terminal, each token in its author's colour."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.atomic import write_text
from collm.cli.options import CollaborationArgument, Decoding, Fields, Loading, with_options
from collm.core.calibration import threshold_text
from collm.core.params import SamplingParams
from collm.core.types import check_threshold, deferral_rate
from collm.errors import CollmError, ConfigError, WriteError

if TYPE_CHECKING:
    from collm.cli.terminal import Console
    from collm.collaboration import CoLLM
    from collm.core.types import TokenStep

HELP = """\
/threshold X   let the base keep a token while its defer prob is at most X
/budget X      use the best threshold whose deferral rate is within X with 95 %
/price X       defer where the head predicts a gain above this, in nats per token
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
    decoding: Annotated[Decoding, Fields("threshold budget price")],
    params: Annotated[
        SamplingParams,
        Fields(
            "max_tokens temperature",
            "top_p top_k min_p presence_penalty frequency_penalty repetition_penalty",
            "Sampling",
            {"max_tokens": 1024},
        ),
    ],
    loading: Annotated[Loading, Fields("device trust_code", "assistants dtype engine servers")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Chat with a collaboration in the terminal. /help lists the commands.

    Each model keeps earlier turns in its KV cache, so a turn reads only new tokens.
    """
    import transformers

    from collm.cli.terminal import Console, legend

    transformers.utils.logging.disable_progress_bar()
    model = loading.load(collaboration)
    threshold = model.threshold(decoding.threshold, decoding.budget, decoding.price)
    talk = Conversation(model, params, threshold, system)
    model.template.encode_prompt(model.tokenizer, talk.messages("hello"))  # raises if there is no chat template
    console = Console(soft_wrap=True)
    console.print(legend(model.author_names), "[dim]/help for more[/dim]")
    converse(talk, console)


@dataclass
class Conversation:
    """Turns with one collaboration, or with one author of it alone."""

    model: CoLLM
    params: SamplingParams
    threshold: float
    system: str | None = None
    author: int | None = None
    turns: list[tuple[str, list[TokenStep]]] = field(default_factory=list)

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

    def command(self, name: str, value: str) -> str:
        """Run a command, and return what to show."""
        match name:
            case "/threshold" | "/budget" | "/price":
                try:
                    limit = {name[1:]: float(value)}
                except ValueError:
                    raise ConfigError(f"{name} was given {value!r}, expected a number, as {name} 0.4") from None
                self.threshold, self.author = check_threshold(self.model.threshold(**limit)), None
            case "/model":
                names = ["collaboration", *self.model.author_names]
                if value not in names:
                    raise ConfigError(f"/model was given {value!r}, expected one of {', '.join(names)}")
                self.author = names.index(value) - 1 if value != "collaboration" else None
                if self.author is not None:
                    return f"{value} alone"
            case "/undo" | "/clear":
                del self.turns[-1 if name == "/undo" else 0 :]
                return f"{len(self.turns)} turns left"
            case "/save":
                if not value:
                    raise ConfigError("/save needs a file, as /save talk.jsonl")
                path = Path(value).expanduser()
                if path.exists():
                    raise WriteError(f"{path} exists; choose another name")
                authors = [[step.author for step in steps] for _, steps in self.turns]
                row = {"messages": self.messages(), "authors": authors, "author_names": self.model.author_names}
                write_text(path, json.dumps(row, ensure_ascii=False) + "\n")
                return f"written to {value}"
            case "/help":
                return HELP
            case _:
                return f"{name} is no command; /help lists them"
        return f"threshold {threshold_text(self.threshold)}"


def converse(talk: Conversation, console: Console) -> None:
    """Answer lines until there are no more."""
    from collm.cli.terminal import not_text

    with suppress(ImportError):  # lines can be typed without
        import readline  # noqa: F401 - gives input() its editing and its history
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt) as end:
            console.print()
            line = "/quit" if isinstance(end, EOFError) else ""
        except UnicodeDecodeError as error:
            raise not_text(error) from error
        if line == "/quit":
            return
        name, _, value = line.partition(" ")
        try:
            if name == "/history":
                for question, steps in talk.turns:
                    console.print("[bold]you:[/bold] ", end="")
                    console.print(question, markup=False)
                    console.show(steps)
                    console.print()
            elif line.startswith("/"):
                console.print(talk.command(name, value.strip()), style="dim", markup=False)
            elif line:
                _answer(talk, console, line)
        except CollmError as error:
            console.print(str(error), style="red", markup=False)


def _answer(talk: Conversation, console: Console, question: str) -> None:
    with closing(talk.ask(question)) as answer:
        try:
            for step in answer:
                console.show([step])
        except KeyboardInterrupt:
            console.print(" [dim](stopped)[/dim]", end="")
    authors = [step.author for step in talk.turns[-1][1]]
    console.print(f"\n[dim]{len(authors)} tokens, {deferral_rate(authors):.1%} by assistants[/dim]")
