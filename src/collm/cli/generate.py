"""`collm generate`: continue prompts, showing who wrote each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli import sampling
from collm.cli.servers import EngineOption, ServersOption, servers_named

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.core.params import SamplingParams
    from collm.models.template import Prompt


def generate(
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="A collaboration: directory or Hub repository.")],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue; '-' reads one from stdin.")
    ],
    threshold: Annotated[
        float | None, typer.Option(help="Base keeps a token while its defer prob is at most this. Default: calibrated.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Deferral rate to stay within, in place of a threshold.")] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="threshold, joint (author drawn from its probability), mixture, confidence, product:weight=.., "
            "contrastive:alpha=..,beta=.., proxy:model=..,tuned=..,untuned=.., random:rate=.., single:writer=.., "
            "budget:budget=..,threshold=.. (of each completion), schedule:start=..,end=..,steps=.."
        ),
    ] = "threshold",
    chat: Annotated[bool, typer.Option("--chat", help="Send each prompt as a user's chat message.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: sampling.TemperatureOption = None,
    top_p: sampling.TopPOption = 1.0,
    top_k: sampling.TopKOption = 0,
    min_p: sampling.MinPOption = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the completion; may be repeated.")] = None,
    include_stop_str_in_output: sampling.IncludeStopOption = False,
    stop_token_ids: sampling.StopTokenIdsOption = None,
    ignore_eos: sampling.IgnoreEosOption = False,
    min_tokens: sampling.MinTokensOption = 0,
    presence_penalty: sampling.PresenceOption = 0.0,
    frequency_penalty: sampling.FrequencyOption = 0.0,
    repetition_penalty: sampling.RepetitionOption = 1.0,
    logit_bias: sampling.LogitBiasOption = None,
    bad_words: sampling.BadWordsOption = None,
    json_schema: sampling.JsonSchemaOption = None,
    json_object: sampling.JsonObjectOption = False,
    regex: sampling.RegexOption = None,
    choice: sampling.ChoiceOption = None,
    grammar: sampling.GrammarOption = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, auto; or one for each model: cuda:0,cuda:1.")
    ] = None,
    engine: EngineOption = None,
    servers: ServersOption = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run functions that files name: of tools and metrics.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default as saved.")] = None,
    lookahead: Annotated[
        int | None, typer.Option(help="Most tokens drafted ahead; the text is the same. 0 for none. Default: 16.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Run models on a GPU without CUDA graphs.")] = False,
    cache_memory: Annotated[
        str | None,
        typer.Option(help="Memory for keys and values on each device, such as 4GiB, or a share of what is free: 50%."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object per prompt, for machines.")] = False,
) -> None:
    """Continue prompts, each token in its author's colour (plain when piped)."""
    import transformers

    from collm.collaboration import CoLLM
    from collm.core.params import SamplingParams

    transformers.utils.logging.disable_progress_bar()
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,  # type: ignore[arg-type]  # None for its default
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop or (),
        include_stop_str_in_output=include_stop_str_in_output,
        stop_token_ids=stop_token_ids or (),
        ignore_eos=ignore_eos,
        min_tokens=min_tokens,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=sampling.logit_bias(logit_bias),
        bad_words=bad_words or (),
        structured_outputs=sampling.structured_outputs(json_schema, json_object, regex, choice, grammar),
    )
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_code": trust_code, "eager": eager}
    loading |= {"engine": engine, "cache_memory": cache_memory}
    model = CoLLM.from_pretrained(collaboration, servers=servers_named(servers), **loading)
    if not chat and model.training.get("rows") == "chats":
        typer.echo("this collaboration was trained on chats; --chat sends the prompt as a user's message", err=True)
    texts = [typer.get_text_stream("stdin").read() if prompt == "-" else prompt for prompt in prompts]
    inputs: list[Prompt] = [[{"role": "user", "content": text}] if chat else text for text in texts]
    deciding = {"threshold": threshold, "budget": budget, "policy": policy, "lookahead": lookahead}
    show = _print_json if json_ else _print_coloured
    show(model, inputs, params, deciding)


def _print_json(model: CoLLM, prompts: list[Prompt], params: SamplingParams, deciding: dict[str, Any]) -> None:
    import json
    from dataclasses import asdict

    out = model.generate(prompts, params, **deciding)
    for completion in out:
        usage = {name: asdict(used) for name, used in out.usage.items()}
        summary = {"text": completion.text, "deferral_rate": completion.deferral_rate}
        typer.echo(json.dumps({**summary, **asdict(completion), "usage_of_call": usage}))


def _print_coloured(model: CoLLM, prompts: list[Prompt], params: SamplingParams, deciding: dict[str, Any]) -> None:
    """Token by token, as they come."""
    from collm.cli.authors import coloured, legend
    from collm.cli.terminal import Console
    from collm.core.types import deferral_rate
    from collm.models.members import author_name

    console = Console(soft_wrap=True)
    for index, prompt in enumerate(prompts):
        if len(prompts) > 1:
            console.print(f"[dim]prompt {index + 1}[/dim]")
        authors, is_empty = [], True
        for step in model.stream(prompt, params, **deciding):
            console.print(coloured([step]), end="")
            authors.append(step.author)
            is_empty = is_empty and not step.text
        console.print()
        if is_empty and authors:
            who = author_name(authors[-1], len(model.assistants))
            typer.echo(f"the answer is empty: the {who} ended the text at once", err=True)
        if console.is_terminal:
            names = [author_name(author, len(model.assistants)) for author in range(len(model.assistants) + 1)]
            console.print(legend(names), f"[dim]deferral rate {deferral_rate(authors):.1%}[/dim]")
