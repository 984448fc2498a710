"""`collm generate`: continue prompts, showing who wrote each token."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli.options import CollaborationArgument, Decoding, Fields, Loading, with_options
from collm.core.params import SamplingParams, StructuredOutputs
from collm.core.types import deferral_rate

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.text.template import Prompt


@with_options
def generate(
    collaboration: CollaborationArgument,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue. '-' reads one from stdin.")
    ],
    decoding: Annotated[Decoding, Fields("threshold budget price", "policy judge lookahead", "Who writes")],
    params: Annotated[
        SamplingParams,
        Fields(
            "max_tokens temperature seed stop",
            "top_p top_k min_p include_stop_str_in_output stop_token_ids ignore_eos min_tokens presence_penalty "
            "frequency_penalty repetition_penalty logit_bias bad_words",
            "Sampling",
        ),
    ],
    constraint: Annotated[
        StructuredOutputs | None, Fields(rare="json json_object regex choice grammar", title="Structured outputs")
    ],
    loading: Annotated[Loading, Fields("device trust_code", "assistants dtype engine servers eager cache_memory")],
    chat: Annotated[bool, typer.Option("--chat", help="Send each prompt as a chat message of the user.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Continue prompts. In a terminal, each token has the colour of its author."""
    import transformers

    from collm.cli.terminal import not_text

    transformers.utils.logging.disable_progress_bar()
    try:
        texts = [
            typer.get_binary_stream("stdin").read().decode("utf-8-sig") if prompt == "-" else prompt
            for prompt in prompts
        ]
    except UnicodeDecodeError as error:
        raise not_text(error) from error
    model = loading.load(collaboration)
    if not chat and model.training.get("rows") == "chats":
        typer.echo("this collaboration was trained on chats; --chat sends the prompt as a user's message", err=True)
    inputs: list[Prompt] = [[{"role": "user", "content": text}] if chat else text for text in texts]
    params, who = replace(params, structured_outputs=constraint), asdict(decoding)
    if not json_:
        _print_coloured(model, inputs, params, who)
        return
    out = model.generate(inputs, params, **who)
    usage = {name: asdict(used) for name, used in out.usage.items()}
    for one in out:
        summary = {"text": one.text, "deferral_rate": one.deferral_rate}
        typer.echo(json.dumps({**summary, **asdict(one), "usage_of_call": usage}))


def _print_coloured(model: CoLLM, prompts: list[Prompt], params: SamplingParams, decoding: dict[str, Any]) -> None:
    from collm.cli.terminal import Console, legend

    console = Console(soft_wrap=True)
    for index, prompt in enumerate(prompts):
        if len(prompts) > 1:
            console.print(f"[dim]prompt {index + 1}[/dim]")
        steps = []
        for step in model.stream(prompt, params, **decoding):
            console.show([step])
            steps.append(step)
        console.print()
        if steps and not any(step.text for step in steps):
            who = model.author_names[steps[-1].author]
            typer.echo(f"the answer is empty: the {who} ended the text at once", err=True)
        if console.is_terminal:
            rate = deferral_rate([step.author for step in steps])
            console.print(legend(model.author_names), f"[dim]deferral rate {rate:.1%}[/dim]")
