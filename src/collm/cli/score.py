"""`collm score`: score every target token of a data set with a frozen model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.cli.options import RowFormat, refuse, with_options
from collm.errors import ConfigError

if TYPE_CHECKING:
    from collm.models.members import AssistantSpec
    from collm.run import DataConfig, Server
    from collm.training.scores import Scores


@dataclass(frozen=True)
class Scoring:
    """What scores the rows, and how.

    Attributes:
        model: directory, GGUF file, Hub id (with @revision) or tool:..
        out: output directory. An interrupted run resumes from it.
        inspect: only compare the scores in SCORES/base with those in SCORES/assistant, SCORES/assistant-2, ..
        config: compute the scores of --author that 'collm train --config' needs.
        author: with --config: base, assistant, assistant-2, ..
        tokenizer: the base that training will use, for its tokenizer and template, by default the model.
        max_length: maximum number of tokens of an example, as in training.
        max_batch_tokens: maximum number of tokens in a batch, with padding, by default 512 on a CPU, otherwise 16,384.
        dtype: data type of the model: auto, float32, bfloat16 or float16.
        device: device of the model: cpu, cuda, cuda:1 or auto.
        quantization: quantize the model with bitsandbytes: nf4 or int8.
        server: base URL of an OpenAI-compatible server to score on.
        concurrency: maximum number of concurrent requests.
        api_key_env: environment variable with the server's API key.
        tool_eps: probability that a tool gives to other tokens.
        tool_seconds: time limit of a Python function, seconds.
        trust_code: run the functions that --config names.
    """

    model: str | None = None
    out: Path | None = None
    inspect: Path | None = field(default=None, metadata={"metavar": "SCORES"})
    config: Path | None = field(default=None, metadata={"metavar": "run.yaml"})
    author: str | None = None
    tokenizer: str | None = None
    max_length: int = 2048
    max_batch_tokens: int | None = None
    dtype: str = "auto"
    device: str | None = None
    quantization: str | None = None
    server: str | None = None
    concurrency: int = 16
    api_key_env: str | None = None
    tool_eps: float | None = None
    tool_seconds: float | None = None
    trust_code: bool = False


@with_options
def score(
    context: typer.Context,
    how: Scoring,
    rows: RowFormat,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="JSON, JSONL, data set directory or Hub name.")
    ] = None,
) -> None:
    """Score a data set with one model: per target token its log-probability, and whether it is the argmax.

    `collm train` computes missing scores itself.
    """
    if how.inspect is not None:
        refuse(context, "--inspect scores nothing", only={"inspect"})
        _inspect(how.inspect)
        return

    from collm.run import Server

    if how.server is None:
        refuse(context, "no effect without --server", none={"concurrency", "api_key_env"})
    server = None if how.server is None else Server(how.server, how.concurrency, how.api_key_env)
    if how.config is not None:
        of_run = {"config", "author", "server", "concurrency", "api_key_env", "trust_code"}
        refuse(context, "--config says what to score", only=of_run)
        if how.author is None:
            raise typer.BadParameter("--config needs --author: base, assistant, assistant-2, ..")
        _report(_score_of_run(how.config, how.author, server, trust_code=how.trust_code), None)
        return
    refuse(context, "without --config, naming a function is consent", none={"trust_code"})
    if data is None or how.model is None or how.out is None:
        raise typer.BadParameter("expected DATA, --model and --out; or --config run.yaml; or --inspect SCORES")
    _report(_score_rows(context, rows.of(data), how, how.model, how.out, server), how.out)


def _score_rows(
    context: typer.Context, rows: DataConfig, how: Scoring, model: str, out: Path, server: Server | None
) -> Scores:
    from collm import run
    from collm.tools.spec import PREFIX

    of_models = {"dtype", "device", "quantization", "max_batch_tokens"}
    if model.startswith(PREFIX):
        refuse(context, f"no effect with {model}, which is no model", none={*of_models, "server"})
        if how.tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer; pass the base's with --tokenizer")
        spec: AssistantSpec = run.parse_tool(model, how.tool_eps, how.tool_seconds)
        base = run.parse_model(how.tokenizer)
    else:
        refuse(context, f"no effect with {model}, which is no tool", none={"tool_eps", "tool_seconds"})
        if server is not None:
            refuse(context, "no effect on a model that the server runs", none=of_models)
        spec = own = run.parse_model(model, dtype=how.dtype, device=how.device, quantization=how.quantization)
        base = run.parse_model(how.tokenizer) if how.tokenizer else own
    most = how.max_batch_tokens
    return run.score_data(rows, spec, base, out, max_length=how.max_length, max_batch_tokens=most, server=server)


def _score_of_run(config: Path, author: str, server: Server | None, *, trust_code: bool) -> Scores:
    """Compute the scores of an author that 'collm train --config' needs."""
    from collm import run
    from collm.cli.train import parse

    given = ["--config", str(config), *(["--trust-code"] if trust_code else [])]
    return run.score_author(*parse(given), author, server=server)


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
