"""Options of a run. Importing them loads no torch, so the command line can make its options of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.core.calibration import CalibrationOptions
from collm.core.types import author_name
from collm.errors import ConfigError
from collm.tools.spec import BUILT_IN, PREFIX, ToolSpec
from collm.untrusted import check_fields

if TYPE_CHECKING:
    from collm.models.loading import ModelSpec
    from collm.models.members import AssistantSpec
    from collm.training.data import Rows


@dataclass
class RowFormat:
    """What the rows of a data set look like.

    Attributes:
        data_split: split of the data set.
        prompt_field: name of the prompt field.
        completion_field: name of the completion field.
        template: prompt template, for training and decoding.
        format: layout of the rows: rows, the published format of a data set (tulu, gsm8k, gsm8k-plain), or module:NAME.
        bad_rows: what to do at an invalid row: stop, or skip it and count it.
        chat_template: file with the Jinja template of chats, by default the base tokenizer's template.
    """

    data_split: str | None = field(default=None, metadata={"flag": "--split"})
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: str = "{prompt}"
    format: str = "rows"
    bad_rows: str = "stop"
    chat_template: str | None = None

    def load(self, source: str, split: str | None) -> Rows:
        """Read the rows of a source."""
        from collm.training.data import load_rows

        options = ("format", "prompt_field", "completion_field", "bad_rows")
        return load_rows(source, split=split, **{name: getattr(self, name) for name in options})


@dataclass(kw_only=True)
class RunConfig(CalibrationOptions, RowFormat):
    """Models and data of a run. `CoLLMConfig` has the training options. A run's YAML file has the fields of both.

    Attributes:
        base: the model to train: a directory, a GGUF file or a Hub id, optionally with "@revision". A GGUF file on the
            Hub is repo:file.gguf.
        assistant: the assistants 1..K, in the same form. Or tools: tool:calculator, tool:lookup:facts.csv,
            or a Python function tool:package.module:function.
        data: training rows: JSON, JSONL, a `datasets` directory or a Hub name.
        validation: rows to calibrate on; by default up to 200 rows, at most a tenth, held out of `data`.
        validation_split: split of the validation data set.
        calibrate: calibrate after training. Set it to false if base and assistants do not fit in one process;
            `collm calibrate` can do it later with the same rows.
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
    data: str
    validation: str | None = None
    validation_split: str | None = None
    calibrate: bool = True
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
        from collm.evaluation.metrics import metric_named
        from collm.text.guards import check_accepted

        check_fields(self)
        super().__post_init__()
        metric_named(self.metric)
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
        how = {"dtype": self.dtype, "device": self.device, "attention": self.attention}
        self.validation_source = self.validation or f"held out of {self.data}"
        self.base_model = parse_model(self.base, **how, quantization=self.base_quantization)
        self.assistants: list[AssistantSpec] = [
            ToolSpec.parse(name, eps=self.tool_eps, seconds=self.tool_seconds)
            if name.startswith(PREFIX)
            else parse_model(name, **how, quantization=self.assistant_quantization)
            for name in self.assistant
        ]
        self.authors = {author_name(number): one for number, one in enumerate([self.base_model, *self.assistants])}
        tools = [spec for spec in self.assistants if isinstance(spec, ToolSpec)]
        if self.tool_eps is not None and not tools:
            raise ConfigError("tool_eps has no effect without a tool among the assistants; leave it out")
        if self.tool_seconds is not None and not any(tool.is_user_function for tool in tools):
            raise ConfigError("tool_seconds has no effect without a Python function as an assistant; leave it out")
        if self.assistant_quantization is not None and len(tools) == len(self.assistant):
            raise ConfigError("assistant_quantization has no effect if all assistants are tools; leave it out")
        check_accepted(self.accept_differences)

    def scores_in(self, directory: Path) -> Path:
        """The directory of the scores of the run in this directory."""
        return Path(self.scores or directory / "scores")


def parse_model(name: str, **options: Any) -> ModelSpec:
    """A directory, a GGUF file or a Hub id, optionally with "@revision", with further fields of its `ModelSpec`."""
    from collm.models.loading import ModelSpec

    path, at, revision = name.rpartition("@")
    if not at or Path(name).expanduser().exists():
        path, revision = name, ""
    return ModelSpec(path, revision or None, **options)


def functions_named(options: Mapping[str, Any]) -> list[str]:
    """The functions that options of a run name as metric, format or tools."""
    assistants = options.get("assistant") or []
    named = [str(options.get(name, "")) for name in ("metric", "format")]
    tools = [str(one) for one in ([assistants] if isinstance(assistants, str) else assistants)]
    functions = [name for name in tools if name.startswith(PREFIX) and name.split(":")[1] not in BUILT_IN]
    return [name for name in named if ":" in name] + functions
