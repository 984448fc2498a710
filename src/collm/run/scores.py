"""Score with models, tools and served models. The processes of a run share the work."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.models.members import AssistantSpec, aligned
from collm.models.tools import ToolModel
from collm.run.data import Prepared, prepare
from collm.run.options import DataConfig, RunConfig
from collm.text.guards import ACCEPTABLE, TokenizerIdentity
from collm.tools.spec import ToolSpec
from collm.training.config import CoLLMConfig
from collm.training.examples import Example, encode
from collm.training.remote import RemoteModel
from collm.training.scores import Scores, find_scores, load_scores
from collm.training.scoring import Scored, progress_bar, write_scores


@dataclass(frozen=True)
class Server:
    """A server that scores a model (`training.remote.RemoteModel`)."""

    base_url: str
    concurrency: int = 16
    api_key_env: str | None = None


def score(
    examples: Sequence[Example],
    spec: AssistantSpec,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_batch_tokens: int | None = None,
    hidden_states: bool = False,
    server: Server | None = None,
    quiet: bool = False,
) -> Scores:
    """The scores of a model or tool. They are computed in `out` unless they exist. Then the model is freed.

    Several processes share the work. Each returns all scores.

    Args:
        examples: the examples in the tokens of this model.
        tokenizer: the tokenizer of this model.

    Raises:
        ConfigError: a server cannot score segments.
    """
    if server is not None and examples[0].law is not None:
        raise ConfigError(
            f"{spec} has another tokenizer than the base, so scores need all its logits, which a server does not "
            "return; score it in this process"
        )
    processes = PartialState(cpu=not torch.cuda.is_available())
    found = find_scores(out, examples, spec, hidden_states=hidden_states)
    if found is None:
        model = _model(spec, tokenizer, server)
        with progress_bar(f"scoring with {model.name}", enabled=not quiet and processes.is_main_process) as progress:
            write_scores(
                model,
                examples,
                out,
                spec=spec,
                max_batch_tokens=max_batch_tokens,
                hidden_states=hidden_states,
                share=(processes.process_index, processes.num_processes),
                progress=progress,
            )
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    processes.wait_for_everyone()
    return found or load_scores(out, examples, spec)


def _model(spec: AssistantSpec, tokenizer: PreTrainedTokenizerBase, server: Server | None) -> Scored:
    vocab_size = TokenizerIdentity.of(tokenizer).vocab_size
    if isinstance(spec, ToolSpec):
        return ToolModel(spec, tokenizer, name=str(spec), vocab_size=vocab_size)
    if server is not None:
        return RemoteModel(
            server.base_url,
            spec.path,
            vocab_size=vocab_size,
            concurrency=server.concurrency,
            api_key_env=server.api_key_env,
        )
    return LanguageModel(load_model(spec), name=spec.path, vocab_size=vocab_size)


def score_run(
    config: RunConfig,
    prepared: Prepared,
    directory: Path,
    authors: Sequence[str],
    *,
    server: Server | None = None,
    quiet: bool = False,
) -> list[list[Scores]]:
    """The scores of these authors on a run's training examples and, if it evaluates, on its validation examples.

    One model is in memory at a time.
    """
    root, names = scores_directory(config, directory), list(config.authors)
    return [
        [
            score(
                examples.read_by(names.index(author)),
                config.authors[author],
                place / author,
                prepared.tokenizer_of(names.index(author)),
                max_batch_tokens=config.max_batch_tokens,
                hidden_states=config.cache_hidden_states and author == "base",
                server=server,
                quiet=quiet,
            )
            for author in authors
        ]
        for place, examples in zip((root, root / "validation"), prepared.sets, strict=False)
    ]


def score_data(
    config: DataConfig,
    spec: AssistantSpec,
    base: ModelSpec,
    out: Path,
    *,
    max_length: int,
    max_batch_tokens: int | None = None,
    server: Server | None = None,
) -> Scores:
    """Score rows with one model or tool. The rows are encoded as for training a base with it."""
    tokenizer = load_tokenizer(base)
    rows = config.rows(config.data, config.data_split)
    template = config.prompt_template(tokenizer, base, rows)
    alignment = aligned(base, [spec], tokenizer, template, accept_differences=ACCEPTABLE)
    examples = encode(rows, template, tokenizer, alignment, max_length=max_length)
    own = tokenizer if alignment is None else alignment.tokenizers[1].tokenizer
    return score(examples.read_by(1), spec, out, own, max_batch_tokens=max_batch_tokens, server=server)


def score_author(
    config: RunConfig, args: CoLLMConfig, author: str, *, server: Server | None = None, quiet: bool = False
) -> Scores:
    """Compute the scores of one author that a run needs, in the run's directory.

    These are the scores of the training rows, and of the validation rows if the run evaluates.

    Args:
        author: base, assistant, assistant-2, ..

    Raises:
        ConfigError: the run has no such author, or a server is given for a tool.
    """
    if author not in config.authors:
        raise ConfigError(f"author is {author!r}, expected one of {', '.join(config.authors)}")
    spec, prepared = config.authors[author], prepare(config, args)
    if server is not None and isinstance(spec, ToolSpec):
        raise ConfigError(f"{author} is the tool {spec}, which does not run on a server; leave the server out")
    return score_run(config, prepared, Path(args.output_dir), [author], server=server, quiet=quiet)[0][0]


def scores_directory(config: RunConfig, run: Path) -> Path:
    """The directory of a run's scores."""
    return Path(config.scores) if config.scores else run / "scores"
