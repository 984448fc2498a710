"""Options of a run: models, tools and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.core.params import SamplingParams
from collm.core.types import author_name
from collm.errors import ConfigError
from collm.evaluation.calibration import DEFERRAL_RATES, REFINE, CalibrationOptions
from collm.models.loading import ModelSpec, stop_ids
from collm.models.members import AssistantSpec
from collm.text.guards import check_accepted
from collm.text.template import PromptTemplate
from collm.tools.spec import BUILT_IN, PREFIX, ToolSpec
from collm.training.data import Row, Rows, load_rows
from collm.untrusted import check_fields


@dataclass
class DataConfig:
    """Rows and their templates.

    Attributes:
        data: training rows: JSON, JSONL, a `datasets` directory or a Hub name.
        data_split: split of the data set.
        prompt_field, completion_field: names of the two fields.
        template: prompt template, for training and decoding.
        format: rows (default), or the published format of a data set: tulu, gsm8k, gsm8k-plain, or
            module:NAME.
        chat_template: file with the Jinja template of chats; by default the base tokenizer's template.
        bad_rows: "stop" at an invalid row, or "skip" invalid rows and count them.
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
        """The template of prompts and chats. If the rows have chats, it also has the tokens that end a turn.

        Raises:
            ConfigError: the chat template cannot be read.
            DataError: no token ends a turn.
        """
        template = PromptTemplate.of(tokenizer, self.template)
        if self.chat_template is not None:
            try:
                chat = Path(self.chat_template).read_text(encoding="utf-8")
                template = PromptTemplate(self.template, chat)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"chat_template {self.chat_template} cannot be read ({error}); name a file"
                ) from error
        if (template.chat or template.tool_chat) is None or all(row.messages is None for row in rows):
            return template
        return template.with_turn_ends(tokenizer, stop_ids(tokenizer, base))

    def rows(self, source: str, split: str | None) -> Rows:
        """Read rows with this format from any source."""
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
    """Models and data of a run. `CoLLMConfig` has the training options. A run's YAML file has the fields of both.

    Attributes:
        base: the model to train: a directory, a GGUF file or a Hub id, optionally with "@revision". A GGUF file on the
            Hub is repo:file.gguf.
        assistant: the assistants 1..K, in the same form. Or tools: tool:calculator, tool:lookup:facts.csv,
            or a Python function tool:package.module:function.
        validation: rows to calibrate on; by default up to 200 rows, at most a tenth, held out of `data`.
        validation_split: split of the validation data set.
        metric: metric of calibration: exact_match, contains, last_number, token_f1 or module:function.
        calibrate: calibrate after training. Set it to false if base and assistants do not fit in one process;
            `collm calibrate` can do it later with the same rows.
        rates: target deferral rates of calibration.
        budgets: maximum deferral rates to find thresholds for, besides the best threshold of all.
        refine: number of thresholds that calibration adds near the best one, and near that of each budget.
        max_new_tokens, stop, max_batch: options of calibration's completions.
        dtype, device, attention: options of all models. With dtype "auto" models keep their saved dtype, but full
            fine-tuning of the base uses float32.
        base_quantization, assistant_quantization: nf4 or int8, with bitsandbytes. For the base with method "lora"
            (QLoRA) or "head".
        tool_eps: probability that a tool gives to all tokens except its next one together, 0.01 by default.
        tool_seconds: time limit of a call to a Python function, 1 by default.
        accept_differences: differences between the models to accept: special_tokens, eos, chat_template.
        cache_hidden_states: store the base's hidden states at all target tokens with its scores. With method "head",
            training only reads these.
        scores: directory of the scores (`base`, `assistant`, `assistant-2`, ...), by default in the run directory.
            Missing scores are computed.
        max_batch_tokens: maximum number of tokens in a scoring batch, with padding; by default 512 on a CPU, otherwise
            16,384.
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
        check_fields(self)
        if not self.assistant:
            raise ConfigError("there is no assistant; expected at least one directory, GGUF file or Hub id")
        if self.validation_split is not None and self.validation is None:
            raise ConfigError("validation_split has no effect without validation; name the data set")
        for split in (self.data_split, self.validation_split):
            if split is not None and split.startswith("test"):
                raise ConfigError(
                    f"split {split!r} is for test results; train on another split, and choose the threshold on "
                    "held-out rows (leave validation out) or on a validation split"
                )
        if self.base.startswith(PREFIX):
            raise ConfigError(f"the base is {self.base}, expected a language model: the head reads its hidden states")
        tools = [spec for spec in self.assistants if isinstance(spec, ToolSpec)]
        if self.tool_eps is not None and not tools:
            raise ConfigError("tool_eps has no effect without a tool among the assistants; leave it out")
        if self.tool_seconds is not None and not any(tool.foreign for tool in tools):
            raise ConfigError("tool_seconds has no effect without a Python function as an assistant; leave it out")
        if self.assistant_quantization is not None and len(tools) == len(self.assistant):
            raise ConfigError("assistant_quantization has no effect if all assistants are tools; leave it out")
        check_accepted(self.accept_differences)
        self.calibration_options()  # raises

    def calibration_options(self) -> CalibrationOptions:
        """How thresholds are chosen."""
        params = SamplingParams(max_new_tokens=self.max_new_tokens, stop=self.stop)
        return CalibrationOptions(self.metric, params, self.rates, self.budgets, self.refine, self.max_batch)

    @property
    def authors(self) -> dict[str, AssistantSpec]:
        """Base and assistants by name: base, assistant, assistant-2, .."""
        return {author_name(author): spec for author, spec in enumerate([self.base_model, *self.assistants])}

    @property
    def base_model(self) -> ModelSpec:
        """The spec of the base."""
        return self._model(self.base, self.base_quantization)

    @property
    def assistants(self) -> list[AssistantSpec]:
        """The specs of the assistants 1..K."""
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
    """The Python objects that the options of a run name as metric, format or tools."""
    assistants = options.get("assistant") or []
    named = [str(options.get(name, "")) for name in ("metric", "format")]
    tools = [str(one) for one in ([assistants] if isinstance(assistants, str) else assistants)]
    foreign = [name for name in tools if name.startswith(PREFIX) and name.split(":")[1] not in BUILT_IN]
    return [name for name in named if ":" in name] + foreign


def parse_tool(name: str, eps: float | None = None, seconds: float | None = None) -> ToolSpec:
    """Parse a tool with the given options."""
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
    """Parse a model: a directory, a GGUF file or a Hub id, optionally with "@revision"."""
    path, at, revision = name.rpartition("@")
    if not at or Path(name).expanduser().exists():
        path, revision = name, ""
    return ModelSpec(path, revision or None, dtype, device, attention, quantization)
