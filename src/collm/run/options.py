"""What a run is told: which models and tools, on which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError
from collm.evaluation.calibration import DEFERRAL_RATES, REFINE, check_rates, check_refine
from collm.evaluation.metrics import metric_named
from collm.models.guards import check_accepted
from collm.models.loading import ModelSpec, stop_ids
from collm.models.members import AssistantSpec
from collm.models.template import PromptTemplate
from collm.tools.spec import BUILT_IN, PREFIX, ToolSpec
from collm.training.data import Row, Rows, load_rows


@dataclass
class DataConfig:
    """Which rows, and how they are rendered.

    Attributes:
        data: training rows: JSON, JSONL, a `datasets` directory or a Hub name.
        data_split: which split of a data set.
        prompt_field, completion_field: names of the two fields.
        template: wraps prompts, in training and in decoding alike.
        format: rows (default), tulu, gsm8k, gsm8k-plain, math or bioasq: the forms in which these sets are published.
        chat_template: file with the Jinja template that renders chats; by default the base tokenizer's own.
        bad_rows: "stop" at a row that cannot be used, or "skip" it, reported and counted.
    """

    data: str
    data_split: str | None = None
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: str = "{prompt}"
    format: str = "rows"
    bad_rows: str = "stop"
    chat_template: str | None = None

    def prompt_template(
        self, tokenizer: PreTrainedTokenizerBase, base: ModelSpec, rows: Sequence[Row]
    ) -> PromptTemplate:
        """How prompts and chats are rendered; where the rows are chats, also what ends a turn.

        Raises:
            ConfigError: the chat template cannot be read.
            DataError: no token ends a turn.
        """
        chat = tokenizer.chat_template
        if self.chat_template is not None:
            try:
                chat = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"chat_template {self.chat_template} cannot be read ({error}); name a file"
                ) from error
        template = PromptTemplate(self.template, chat=cast("str | None", chat))
        if chat is None or all(row.messages is None for row in rows):
            return template
        return template.with_turn_ends(tokenizer, stop_ids(tokenizer, base))

    def rows(self, source: str, split: str | None) -> Rows:
        """Rows of any source that has this format."""
        return load_rows(
            source,
            split=split,
            format=self.format,
            prompt_field=self.prompt_field,
            completion_field=self.completion_field,
            bad_rows=self.bad_rows,
        )


@dataclass(kw_only=True)
class RunConfig(DataConfig):
    """What to train on what. How to train is `CoLLMConfig`; a run's YAML file holds the fields of both.

    Attributes:
        base: the model to train: a directory, a GGUF file or a Hub id, "@revision" behind it if need be; of a GGUF file
            on the Hub repo:file.gguf.
        assistant: the assistants 1..K, likewise; or tools: tool:calculator, tool:date, tool:lookup:facts.csv, or a
            function of yours as tool:package.module:function.
        validation: rows to calibrate on; by default up to 200 rows, at most a tenth, held out of `data`.
        validation_split: which split of a data set.
        metric: what calibration measures: exact_match, contains, last_number, token_f1 or module:function.
        calibrate: measure thresholds when training is done; false where base and assistants do not fit one process
            there: `collm calibrate` does it later, with the same rows.
        rates: deferral rates that calibration aims at.
        budgets: deferral rates to find the best threshold within, besides the best of all.
        refine: thresholds that calibration adds beside the best, and beside the best within each budget.
        max_new_tokens, stop, max_batch: of calibration's completions.
        dtype, device, attention: of all models; with dtype "auto" as they were saved, but fp32 for a base to be tuned
            whole.
        base_quantization, assistant_quantization: nf4 or int8, by bitsandbytes; of the base with method "lora" (QLoRA)
            or "head".
        tool_eps: probability that a tool leaves to all tokens but the next of its answer, 0.01 by default.
        tool_seconds: time limit of a call of your function, 1 by default.
        accept_differences: differences between the models to put up with: special_tokens, eos, chat_template.
        cache_hidden_states: keep the base's hidden states at all target tokens beside its scores, in its dtype; with
            method "head" they are all that training reads, however many epochs.
        scores: directory of the scores (`base`, `assistant-1`, ...), by default in the run directory; what is missing
            there is computed.
        max_batch_tokens: of scoring, padding included; by default 512 on a CPU, 16,384 elsewhere.
    """

    base: str
    assistant: list[str]
    validation: str | None = None
    validation_split: str | None = None
    calibrate: bool = True
    metric: str = "exact_match"
    rates: list[float] = field(default_factory=lambda: list(DEFERRAL_RATES))
    budgets: list[float] = field(default_factory=list)
    refine: int = REFINE
    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    max_batch: int = 16
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    base_quantization: str | None = None
    assistant_quantization: str | None = None
    tool_eps: float | None = None
    tool_seconds: float | None = None
    accept_differences: list[str] = field(default_factory=list)
    cache_hidden_states: bool = False
    scores: str | None = None
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.assistant:
            raise ConfigError("no assistant came; expected at least one directory, GGUF file or Hub id")
        if self.validation_split is not None and self.validation is None:
            raise ConfigError("validation_split has no effect without validation; name the data set")
        for split in (self.data_split, self.validation_split):
            if split is not None and split.startswith("test"):
                raise ConfigError(
                    f"split {split!r} is what results are measured on; train on another, and choose the threshold on "
                    "rows held out of it (leave validation out) or on a validation split"
                )
        if self.base.startswith(PREFIX):
            raise ConfigError(f"the base is {self.base}, expected a language model: the head reads its hidden states")
        tools = [spec for spec in self.assistants if isinstance(spec, ToolSpec)]
        if self.tool_eps is not None and not tools:
            raise ConfigError("tool_eps has no effect without a tool among the assistants; leave it out")
        if self.tool_seconds is not None and not any(tool.foreign for tool in tools):
            raise ConfigError("tool_seconds has no effect without a function of yours as an assistant; leave it out")
        if self.assistant_quantization is not None and len(tools) == len(self.assistant):
            raise ConfigError("assistant_quantization has no effect where all assistants are tools; leave it out")
        check_accepted(self.accept_differences)
        check_rates([*self.rates, *self.budgets])
        check_refine(self.refine)
        metric_named(self.metric)

    @property
    def authors(self) -> dict[str, AssistantSpec]:
        """Base and assistants by the names of their scores: base, assistant-1, .."""
        return {"base": self.base_model, **{f"assistant-{k}": spec for k, spec in enumerate(self.assistants, start=1)}}

    @property
    def base_model(self) -> ModelSpec:
        """Where the base comes from."""
        return self._model(self.base, self.base_quantization)

    @property
    def assistants(self) -> list[AssistantSpec]:
        """Where the assistants 1..K come from."""
        return [
            parse_tool(name, self.tool_eps, self.tool_seconds)
            if name.startswith(PREFIX)
            else self._model(name, self.assistant_quantization)
            for name in self.assistant
        ]

    def _model(self, name: str, quantization: str | None) -> ModelSpec:
        return parse_model(
            name, dtype=self.dtype, device=self.device, attention=self.attention, quantization=quantization
        )


def functions_named(options: Mapping[str, Any]) -> list[str]:
    """The functions that these options of a run name: its metric, and assistants that are functions of somebody's."""
    metric, assistants = str(options.get("metric", "")), options.get("assistant") or []
    tools = [str(one) for one in ([assistants] if isinstance(assistants, str) else assistants)]
    foreign = [name for name in tools if name.startswith(PREFIX) and name.split(":")[1] not in BUILT_IN]
    return [metric] * (":" in metric) + foreign


def parse_tool(name: str, eps: float | None = None, seconds: float | None = None) -> ToolSpec:
    """A tool by name, with what is set of its options."""
    options = {"eps": eps, "seconds": seconds}
    return ToolSpec.parse(name, **{key: value for key, value in options.items() if value is not None})


def parse_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attention: str | None = None,
    quantization: str | None = None,
) -> ModelSpec:
    """A model by directory, GGUF file or Hub id, with "@revision" behind it if need be."""
    path, at, revision = name.rpartition("@")
    if not at or Path(name).exists():
        path, revision = name, ""
    return ModelSpec(path, revision or None, dtype, device, attention, quantization)
