"""The data of a run: rows, the examples made of them, and the scores of each author."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError
from collm.models.loading import ModelSpec, load_tokenizer
from collm.models.members import AssistantSpec, aligned, load_author, stop_ids
from collm.models.tools import ToolModel
from collm.run.options import RowFormat, RunConfig
from collm.text.alignment import Alignment
from collm.text.guards import ACCEPTABLE, TokenizerIdentity
from collm.text.template import PromptTemplate
from collm.tools.calls import open_tool
from collm.tools.spec import ToolSpec
from collm.training.config import CoLLMConfig
from collm.training.data import Row, Rows
from collm.training.examples import Example, Examples, encode
from collm.training.remote import RemoteModel
from collm.training.scores import Scores, find_scores, load_scores
from collm.training.scoring import Scored, progress_bar, write_scores

MAX_HELD_OUT = 200
"""Maximum number of rows held out for calibration without a validation set. It is also at most a tenth of the rows."""

OnServer = Callable[..., RemoteModel]
"""`RemoteModel` with the address and options of a server. It takes the name of the model and `vocab_size`."""


@dataclass(frozen=True)
class Prepared:
    """Encoded rows.

    Attributes:
        sets: the training examples and, if there are evaluations during training, those of the validation rows.
        alignment: the alignment of models that do not share a tokenizer.
        kind: "prompts", "chats", or "prompts and chats".
        num_bad: number of skipped training rows.
        validation: rows to calibrate on.
    """

    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    alignment: Alignment | None
    sets: list[Examples]
    kind: str
    num_bad: int = 0
    validation: Sequence[Row] = ()

    def tokenizer_of(self, author: int) -> PreTrainedTokenizerBase:
        return self.tokenizer if self.alignment is None else self.alignment.tokenizers[author].tokenizer

    def rendered(self) -> str:
        """The decoded first example with special tokens, and its target tokens."""
        first = self.sets[0][0]
        learned = [token for token, wanted in zip(first.token_ids, first.is_target, strict=True) if wanted]
        whole, targets = (self.tokenizer.decode(ids) for ids in (first.token_ids, learned))
        return f"--- the first example ---\n{whole}\n--- its target tokens ---\n{targets}\n"


def prepare(config: RunConfig, args: CoLLMConfig, given: tuple[Sequence[Row], Sequence[Row]] | None = None) -> Prepared:
    """Read the rows unless training and validation rows are given, check tokenizers and tools, and encode the rows."""
    rows, validation = given or split_rows(config, seed=args.seed)
    for spec in config.assistants:
        if isinstance(spec, ToolSpec):
            open_tool(spec)
    sets = [rows] if args.eval_strategy == "no" else [rows, validation]
    accept = config.accept_differences
    prepared = encode_for(config.base_model, config.assistants, sets, config, args.max_length, accept)
    return replace(prepared, num_bad=getattr(rows, "num_bad", 0), validation=validation)


def encode_for(
    base: ModelSpec,
    assistants: Sequence[AssistantSpec],
    sets: Sequence[Sequence[Row]],
    layout: RowFormat,
    max_length: int,
    accept_differences: Sequence[str] = ACCEPTABLE,
) -> Prepared:
    """Encode sets of rows for models that are not loaded. The first set says how prompts and chats are rendered."""
    tokenizer = load_tokenizer(base)
    template = prompt_template(layout, tokenizer, base, sets[0])
    alignment = aligned(base, assistants, tokenizer, template, accept_differences=accept_differences)
    examples = [encode(rows, template, tokenizer, alignment, max_length=max_length) for rows in sets]
    are_chats = {row.messages is not None for row in sets[0]}
    kind = " and ".join(name for name, is_chat in (("prompts", False), ("chats", True)) if is_chat in are_chats)
    return Prepared(tokenizer, template, alignment, examples, kind)


def prompt_template(
    layout: RowFormat, tokenizer: PreTrainedTokenizerBase, base: ModelSpec, rows: Sequence[Row]
) -> PromptTemplate:
    """The template of prompts and chats. If the rows have chats, it also has the tokens that end a turn."""
    template = PromptTemplate.of(tokenizer, layout.template)
    if layout.chat_template is not None:
        try:
            template = PromptTemplate(layout.template, Path(layout.chat_template).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template {layout.chat_template} cannot be read ({error}); name a file") from error
    if (template.chat or template.tool_chat) is None or all(row.messages is None for row in rows):
        return template
    return template.with_turn_ends(tokenizer, stop_ids(tokenizer, base))


def split_rows(config: RunConfig, *, seed: int) -> tuple[Rows, Sequence[Row]]:
    """Rows to train on, and rows to calibrate and evaluate on: the validation set, or rows drawn at random."""
    rows = config.load(config.data, config.data_split)
    if config.validation is not None:
        return rows, config.load(config.validation, config.validation_split)
    count = min(MAX_HELD_OUT, len(rows) // 10)
    if count == 0:
        raise ConfigError(f"{len(rows)} rows are too few to hold out some for calibration; pass a validation set")
    kept, held_out = _divided(rows, count, seed)
    return Rows(kept, rows.num_bad), held_out


def hold_back(rows: Sequence[Row], share: float) -> tuple[Rows, Rows]:
    """Divide rows at random, always alike, into rows to choose thresholds on, and a share to check the choice on."""
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise ConfigError(
            f"the share to check on is {share}, which is {count} of {len(rows)} rows; expected a number between 0 and "
            "1 that leaves at least one row to choose on and one to check on"
        )
    return _divided(rows, count, seed=0)


def _divided(rows: Sequence[Row], count: int, seed: int) -> tuple[Rows, Rows]:
    """The rows without `count` of them that are drawn at random, and those, in their order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept, drawn = sorted(order[count:]), sorted(order[:count])
    return Rows(rows[i] for i in kept), Rows(rows[i] for i in drawn)


def score_run(
    config: RunConfig,
    prepared: Prepared,
    directory: Path,
    authors: Sequence[str],
    *,
    server: OnServer | None = None,
    quiet: bool = False,
) -> list[list[Scores]]:
    """The scores of these authors for each set of a run's examples. One model is in memory at a time."""
    root, found = config.scores_in(directory), []
    how: dict[str, Any] = {"max_batch_tokens": config.max_batch_tokens, "server": server, "quiet": quiet}
    for place, examples in zip((root, root / "validation"), prepared.sets, strict=False):
        of_set = []
        for number, (author, spec) in enumerate(config.authors.items()):
            if author in authors:
                each = examples.read_by(number), spec, place / author, prepared.tokenizer_of(number)
                of_set.append(score(*each, hidden_states=config.cache_hidden_states and number == 0, **how))
        found.append(of_set)
    return found


def score(
    examples: Sequence[Example],
    spec: AssistantSpec,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_batch_tokens: int | None = None,
    hidden_states: bool = False,
    server: OnServer | None = None,
    quiet: bool = False,
) -> Scores:
    """The scores of a model or tool. They are computed in `out` unless they exist. Then the model is freed.

    Several processes share the work. Each returns all scores. Examples and tokenizer are those of this model.
    """
    if server is not None and examples[0].law is not None:
        raise ConfigError(
            f"{spec} has another tokenizer than the base, so scores need all its logits, which a server does not "
            "return; score it in this process"
        )
    processes = PartialState(cpu=not torch.cuda.is_available())
    found = find_scores(out, examples, spec, hidden_states=hidden_states)
    if found is None:
        vocab_size = TokenizerIdentity.of(tokenizer).vocab_size
        model: Scored
        if isinstance(spec, ToolSpec):
            model = ToolModel(spec, tokenizer, name=str(spec), vocab_size=vocab_size)
        elif server is not None:
            model = server(spec.path if spec.adapter is None else Path(spec.adapter).name, vocab_size=vocab_size)
        else:
            model = load_author(spec, name=spec.path, vocab_size=vocab_size)
        share = processes.process_index, processes.num_processes
        how: dict[str, Any] = {"spec": spec, "max_batch_tokens": max_batch_tokens, "hidden_states": hidden_states}
        with progress_bar(f"scoring with {model.name}", enabled=not quiet and processes.is_main_process) as progress:
            write_scores(model, examples, out, share=share, progress=progress, **how)
        del model
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without CUDA
    processes.wait_for_everyone()
    return found or load_scores(out, examples, spec)
