"""Read the rows of a run and encode them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError
from collm.models.loading import load_tokenizer
from collm.models.members import aligned
from collm.run.options import RunConfig
from collm.text.alignment import Alignment
from collm.text.template import PromptTemplate
from collm.tools.calls import open_tool
from collm.tools.spec import ToolSpec
from collm.training.config import CoLLMConfig
from collm.training.data import Row, Rows
from collm.training.examples import Examples, encode

MAX_HELD_OUT = 200
"""Maximum number of rows held out for calibration without a validation set. It is also at most a tenth of the rows."""


@dataclass(frozen=True)
class Prepared:
    """The encoded data of a run.

    Attributes:
        validation: rows to calibrate on.
        evaluation: these rows as examples, if there are evaluations during training.
        num_bad: number of skipped training rows.
        kind: "prompts", "chats", or "prompts and chats".
        alignment: the alignment of models that do not share a tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    examples: Examples
    validation: list[Row]
    evaluation: Examples | None
    num_bad: int
    kind: str
    alignment: Alignment | None = None

    @property
    def sets(self) -> list[Examples]:
        """The training examples and, if there are evaluations, those of the validation rows."""
        return [self.examples] if self.evaluation is None else [self.examples, self.evaluation]

    def tokenizer_of(self, author: int) -> PreTrainedTokenizerBase:
        """The tokenizer of an author."""
        return self.tokenizer if self.alignment is None else self.alignment.tokenizers[author].tokenizer

    def rendered(self) -> str:
        """The decoded first example with special tokens, and its target tokens."""
        first = self.examples[0]
        learned = [token for token, wanted in zip(first.token_ids, first.is_target, strict=True) if wanted]
        whole, targets = (self.tokenizer.decode(ids) for ids in (first.token_ids, learned))
        return f"--- the first example ---\n{whole}\n--- its target tokens ---\n{targets}\n"


def prepare(config: RunConfig, args: CoLLMConfig) -> Prepared:
    """Read the rows, check tokenizers and tools, and encode the rows."""
    rows, validation = split_rows(config, seed=args.seed)
    tokenizer = load_tokenizer(config.base_model)
    for spec in config.assistants:
        if isinstance(spec, ToolSpec):
            open_tool(spec)
    template = config.prompt_template(tokenizer, config.base_model, rows)
    accepted = config.accept_differences
    alignment = aligned(config.base_model, config.assistants, tokenizer, template, accept_differences=accepted)
    examples = encode(rows, template, tokenizer, alignment, max_length=args.max_length)
    evaluation = None
    if args.eval_strategy != "no":
        evaluation = encode(validation, template, tokenizer, alignment, max_length=args.max_length)
    are_chats = {row.messages is not None for row in rows}
    kind = " and ".join(name for name, is_chat in (("prompts", False), ("chats", True)) if is_chat in are_chats)
    return Prepared(tokenizer, template, examples, validation, evaluation, rows.num_bad, kind, alignment)


def split_rows(config: RunConfig, *, seed: int) -> tuple[Rows, list[Row]]:
    """Rows to train on, and rows to calibrate and evaluate on.

    Raises:
        ConfigError: fewer than 10 rows, so that none can be held out.
    """
    rows = config.rows(config.data, config.data_split)
    if config.validation is None:
        return hold_out(rows, seed=seed)
    return rows, list(config.rows(config.validation, config.validation_split))


def hold_out(rows: Rows, *, seed: int) -> tuple[Rows, list[Row]]:
    """Divide rows at random into rows to train on and rows to calibrate on.

    Raises:
        ConfigError: fewer than 10 rows.
    """
    count = min(MAX_HELD_OUT, len(rows) // 10)
    if count == 0:
        raise ConfigError(f"{len(rows)} rows are too few to hold out some for calibration; pass a validation set")
    kept, held_out = divided(rows, count, seed=seed)
    return Rows(kept, rows.num_bad), held_out


def divided(rows: Sequence[Row], count: int, *, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows without `count` of them that are drawn at random, and those, in their order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept, drawn = sorted(order[count:]), sorted(order[:count])
    return [rows[i] for i in kept], [rows[i] for i in drawn]
