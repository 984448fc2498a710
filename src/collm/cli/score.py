"""`collm score`: score every target token of a data set with a frozen model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.cli.options import Fields, refuse, with_options
from collm.errors import ConfigError
from collm.run.options import RowFormat
from collm.tools.spec import PREFIX, ToolSpec

if TYPE_CHECKING:
    from collm.models.members import AssistantSpec
    from collm.run.data import OnServer
    from collm.training.scores import Scores


@dataclass(frozen=True)
class Scoring:
    """What scores the rows, and how.

    Attributes:
        model: directory, GGUF file, Hub id (with @revision), each with +ADAPTER; or tool:..
        out: output directory. An interrupted run resumes from it.
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
    layout: Annotated[
        RowFormat, Fields("data_split prompt_field completion_field format bad_rows template chat_template")
    ],
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="JSON, JSONL, data set directory or Hub name.")
    ] = None,
) -> None:
    """Score a data set with one model: per target token its log-probability, and whether it is the argmax.

    `collm train` computes missing scores itself.
    """
    from collm.training.remote import RemoteModel

    server: OnServer | None = None
    if how.server is None:
        refuse(context, "no effect without --server", none={"concurrency", "api_key_env"})
    else:
        server = partial(RemoteModel, how.server, concurrency=how.concurrency, api_key_env=how.api_key_env)
    if how.config is not None:
        of_run = {"config", "author", "server", "concurrency", "api_key_env", "trust_code"}
        refuse(context, "--config determines what to score", only=of_run)
        scores = _score_of_run(how, server)
    else:
        refuse(context, "without --config, naming a function is consent", none={"trust_code"})
        scores = _score_rows(context, how, layout, data, server)
    nll, accuracy = -scores.logprobs.double().mean().item(), scores.corrects.double().mean().item()
    found = f"mean NLL {nll:.4f} nats, argmax is gold for {accuracy:.2%}"
    typer.echo(f"{len(scores.logprobs)} target tokens: {found}" + (f"; written to {how.out}" if how.out else ""))


def _score_of_run(how: Scoring, server: OnServer | None) -> Scores:
    from collm.cli.train import parse
    from collm.run.data import prepare, score_run

    if how.author is None:
        raise typer.BadParameter("--config needs --author: base, assistant, assistant-2, ..")
    run, args = parse(["--config", str(how.config), *(["--trust-code"] if how.trust_code else [])])
    run = run.for_training(args)
    if how.author not in run.authors:
        raise ConfigError(f"author is {how.author!r}, expected one of {', '.join(run.authors)}")
    if server is not None and isinstance(spec := run.authors[how.author], ToolSpec):
        raise ConfigError(f"{how.author} is the tool {spec}, which does not run on a server; leave the server out")
    return score_run(run, prepare(run, args), Path(args.output_dir), [how.author], server=server)[0][0]


def _score_rows(
    context: typer.Context, how: Scoring, layout: RowFormat, data: str | None, server: OnServer | None
) -> Scores:
    """Score rows with one model or tool. They are encoded as for training a base with it."""
    from collm.core.devices import check_device
    from collm.models.loading import ModelSpec
    from collm.run.data import encode_for, score

    if data is None or how.model is None or how.out is None:
        raise typer.BadParameter("expected DATA, --model and --out; or --config run.yaml")
    check_device(how.device)
    of_models = {"dtype", "device", "quantization", "max_batch_tokens"}
    if how.model.startswith(PREFIX):
        refuse(context, f"no effect with {how.model}, which is no model", none={*of_models, "server"})
        if how.tokenizer is None:
            raise ConfigError(f"{how.model} has no tokenizer; pass the base's with --tokenizer")
        spec: AssistantSpec = ToolSpec.parse(how.model, eps=how.tool_eps, seconds=how.tool_seconds)
        base = ModelSpec.parse(how.tokenizer)
    else:
        refuse(context, f"no effect with {how.model}, which is no tool", none={"tool_eps", "tool_seconds"})
        if server is not None:
            refuse(context, "no effect on a model that the server runs", none=of_models)
        spec = own = ModelSpec.parse(how.model, dtype=how.dtype, device=how.device, quantization=how.quantization)
        base = ModelSpec.parse(how.tokenizer) if how.tokenizer else own
    prepared = encode_for(base, [spec], [layout.load(data, layout.data_split)], layout, how.max_length)
    examples, tokenizer = prepared.sets[0].read_by(1), prepared.tokenizer_of(1)
    return score(examples, spec, how.out, tokenizer, max_batch_tokens=how.max_batch_tokens, server=server)
