"""`collm score`: score every target token of a data set with a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli import options
from collm.cli.usage import refuse

if TYPE_CHECKING:
    from collm.models.loading import ModelSpec
    from collm.models.members import AssistantSpec
    from collm.run import Server
    from collm.training.scores import Scores


def score(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="JSON, JSONL, data set directory or Hub name.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory, GGUF file, Hub id (with @revision) or tool:..")] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory. An interrupted run resumes from it.")] = None,
    inspect: Annotated[
        Path | None,
        typer.Option(
            metavar="SCORES",
            help="Only compare the scores in SCORES/base with those in SCORES/assistant, SCORES/assistant-2, ..",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="run.yaml", help="Compute the scores of --author that 'collm train --config' needs."),
    ] = None,
    author: Annotated[str | None, typer.Option(help="With --config: base, assistant, assistant-2, ..")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="The base that training will use, for its tokenizer and template. Default: the model."),
    ] = None,
    split: options.SplitOption = None,
    prompt_field: options.PromptFieldOption = "prompt",
    completion_field: options.CompletionFieldOption = "completion",
    template: Annotated[str, typer.Option(help="Prompt template, as in training.")] = "{prompt}",
    chat_template: Annotated[
        str | None, typer.Option(help="File with the chat template, as in training. Default: the tokenizer's template.")
    ] = None,
    format_: options.FormatOption = "rows",
    bad_rows: options.BadRowsOption = "stop",
    max_length: Annotated[int, typer.Option(help="Maximum number of tokens of an example, as in training.")] = 2048,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens in a batch, with padding. Default: 512 on a CPU, otherwise 16,384."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4 or int8, with bitsandbytes.")] = None,
    server: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible server to score on.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Maximum number of concurrent requests. Default: 16.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's API key.")] = None,
    tool_eps: Annotated[float | None, typer.Option(help="Probability that a tool gives to other tokens.")] = None,
    tool_seconds: Annotated[float | None, typer.Option(help="Time limit of a Python function, seconds.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run the functions that --config names.")] = False,
) -> None:
    """Score a data set with one model: per target token its log-probability, and whether it is the argmax.

    `collm train` computes missing scores itself.
    """
    if inspect is not None:
        refuse(context, "--inspect scores nothing", only={"inspect"})
        _inspect(inspect)
        return

    from collm import run
    from collm.errors import ConfigError

    served = _served(server, concurrency, api_key_env)
    if config is not None:
        of_run = {"config", "author", "server", "concurrency", "api_key_env", "trust_code"}
        refuse(context, "--config says what to score", only=of_run)
        if author is None:
            raise typer.BadParameter("--config needs --author: base, assistant, assistant-2, ..")
        _report(_score_of_run(config, author, served, trust_code=trust_code), None)
        return
    if trust_code:
        raise ConfigError("--trust-code has no effect without --config: naming a function is consent; leave it out")
    if data is None or model is None or out is None:
        raise typer.BadParameter("expected DATA, --model and --out; or --config run.yaml; or --inspect SCORES")
    loading = {"dtype": dtype, "device": device, "quantization": quantization}
    _check_effects(model, {**loading, "max_batch_tokens": max_batch_tokens}, tool_eps, tool_seconds, server)
    spec, base = _members(model, tokenizer, loading, tool_eps, tool_seconds)
    rows = run.DataConfig(data, split, prompt_field, completion_field, template, format_, bad_rows, chat_template)
    scores = run.score_data(
        rows, spec, base, out, max_length=max_length, max_batch_tokens=max_batch_tokens, server=served
    )
    _report(scores, out)


def _served(url: str | None, concurrency: int | None, api_key_env: str | None) -> Server | None:
    """The scoring server, if there is one.

    Raises:
        ConfigError: a server option without a server.
    """
    from collm import run
    from collm.errors import ConfigError

    if url is not None:
        return run.Server(url, concurrency or 16, api_key_env)
    if concurrency is not None or api_key_env is not None:
        raise ConfigError("concurrency and api_key_env have no effect without --server; leave them out")
    return None


def _score_of_run(config: Path, author: str, served: Server | None, *, trust_code: bool) -> Scores:
    """Compute the scores of an author that 'collm train --config' needs."""
    from collm import run
    from collm.cli.train import parse

    given = ["--config", str(config), *(["--trust-code"] if trust_code else [])]
    return run.score_author(*parse(given), author, server=served)


def _check_effects(
    model: str, of_models: dict[str, Any], tool_eps: float | None, tool_seconds: float | None, server: str | None
) -> None:
    """Raise a ConfigError for an option that has no effect on the model or tool."""
    from collm.tools.spec import PREFIX

    set_of_models = {name: value for name, value in of_models.items() if value != "auto"}
    if model.startswith(PREFIX):
        _refuse(model, "which is no model", **set_of_models, server=server)
        return
    _refuse(model, "which is no tool", tool_eps=tool_eps, tool_seconds=tool_seconds)
    if server is not None:
        _refuse(model, "which the server runs", **set_of_models)


def _members(
    model: str, tokenizer: str | None, loading: dict[str, Any], tool_eps: float | None, tool_seconds: float | None
) -> tuple[AssistantSpec, ModelSpec]:
    """The model or tool to score with, and the base that training will use.

    Raises:
        ConfigError: a tool without a base.
    """
    from collm import run
    from collm.errors import ConfigError
    from collm.tools.spec import PREFIX

    if not model.startswith(PREFIX):
        own = run.parse_model(model, **loading)
        return own, run.parse_model(tokenizer) if tokenizer else own
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer; pass the base's with --tokenizer")
    return run.parse_tool(model, tool_eps, tool_seconds), run.parse_model(tokenizer)


def _report(scores: Scores, out: Path | None) -> None:
    summary = scores.summary()
    typer.echo(
        f"{summary.num_targets} target tokens: mean NLL {summary.mean_nll_nats:.4f} nats, "
        f"argmax is gold for {summary.accuracy:.2%}" + (f"; written to {out}" if out else "")
    )


def _inspect(directory: Path) -> None:
    from collm.cli.tables import inspection_table
    from collm.cli.terminal import Console
    from collm.training.inspection import inspect_scores

    inspection = inspect_scores(directory)
    console = Console()
    console.print(inspection_table(inspection))
    console.print(str(inspection.labels), markup=False)


def _refuse(model: str, why: str, **options: object) -> None:
    """Raise a ConfigError for the first option that is set."""
    from collm.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} has no effect with {model}, {why}; leave it out")
