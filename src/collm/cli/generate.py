"""`collm generate`: continue prompts, showing who wrote each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli import options, sampling

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.core.params import SamplingParams
    from collm.models.template import Prompt


def generate(
    collaboration: options.CollaborationArgument,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue. '-' reads one from stdin.")
    ],
    threshold: options.ThresholdOption = None,
    budget: options.BudgetOption = None,
    policy: Annotated[
        str,
        typer.Option(
            help="threshold, joint (author drawn from its probability), mixture, confidence, product:weight=.., "
            "contrastive:alpha=..,beta=.., proxy:model=..,tuned=..,untuned=.., random:rate=.., single:writer=.., "
            "budget:budget=..,threshold=.. (of each completion), schedule:start=..,end=..,steps=.."
        ),
    ] = "threshold",
    chat: Annotated[bool, typer.Option("--chat", help="Send each prompt as a chat message of the user.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 256,
    temperature: sampling.TemperatureOption = None,
    top_p: sampling.TopPOption = 1.0,
    top_k: sampling.TopKOption = 0,
    min_p: sampling.MinPOption = 0.0,
    seed: Annotated[int | None, typer.Option(help="Make sampling reproducible.")] = None,
    stop: options.StopOption = None,
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
    device: options.DeviceOption = None,
    engine: options.EngineOption = None,
    servers: options.ServersOption = None,
    trust_code: options.TrustCodeOption = False,
    dtype: options.DtypeOption = None,
    lookahead: Annotated[
        int | None,
        typer.Option(help="Maximum number of drafted tokens, 0 for none. The output is the same.  [default: 16]"),
    ] = None,
    eager: options.EagerOption = False,
    cache_memory: options.CacheMemoryOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Continue prompts. In a terminal, each token has the colour of its author."""
    import transformers

    from collm.cli.terminal import not_text
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
    try:
        texts = [
            typer.get_binary_stream("stdin").read().decode("utf-8-sig") if prompt == "-" else prompt
            for prompt in prompts
        ]
    except UnicodeDecodeError as error:
        raise not_text(error) from error
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_code": trust_code, "eager": eager}
    loading |= {"engine": engine, "cache_memory": cache_memory}
    model = CoLLM.from_pretrained(collaboration, servers=options.servers_named(servers), **loading)
    if not chat and model.training.get("rows") == "chats":
        typer.echo("this collaboration was trained on chats; --chat sends the prompt as a user's message", err=True)
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
    """Print each token when it is generated."""
    from collm.cli.authors import legend
    from collm.cli.terminal import Console
    from collm.core.types import deferral_rate

    console = Console(soft_wrap=True)
    for index, prompt in enumerate(prompts):
        if len(prompts) > 1:
            console.print(f"[dim]prompt {index + 1}[/dim]")
        authors, is_empty = [], True
        for step in model.stream(prompt, params, **deciding):
            console.show([step])
            authors.append(step.author)
            is_empty = is_empty and not step.text
        console.print()
        if is_empty and authors:
            who = model.author_names[authors[-1]]
            typer.echo(f"the answer is empty: the {who} ended the text at once", err=True)
        if console.is_terminal:
            console.print(legend(model.author_names), f"[dim]deferral rate {deferral_rate(authors):.1%}[/dim]")
