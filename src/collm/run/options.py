"""Options of a run. Importing them loads no torch, so the command line can make its options of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.core.calibration import CalibrationOptions
from collm.core.types import author_name
from collm.errors import ConfigError
from collm.tools.spec import BUILT_IN, PREFIX, ToolSpec
from collm.untrusted import check_fields

if TYPE_CHECKING:
    from collm.models.members import AssistantSpec
    from collm.training.config import CoLLMConfig
    from collm.training.data import Rows


NOT_ALONE = [
    "assistant", "assistant_quantization", "base_quantization", "tool_eps", "tool_seconds",
    "accept_differences", "calibrate", "metric", "rates", "choose", "refine", "budgets", "max_tokens", "stop",
    "max_batch", "cache_hidden_states", "scores", "max_batch_tokens", "objective", "gain_clip",
    "deferral_cost", "head_learning_rate", "warm_start", "warm_start_tokens", "positive_weight",
    "pseudo_label_variant", "base", "head", "head_width", "head_doubt",
]  # fmt: skip
"""Options of `train` without effect on a model that is tuned alone."""


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
            Hub is repo:file.gguf. With method "head" it may have a LoRA adapter: MODEL+ADAPTER.
        assistant: the assistants 1..K, in the same form. Those that are MODEL+ADAPTER share the model's weights in
            memory. Or tools: tool:calculator, tool:lookup:facts.csv, or a Python function
            tool:package.module:function. Without any, and with calibrate set to false, the base is tuned alone
            (`tune_model`).
        data: training rows: JSON, JSONL, a `datasets` directory or a Hub name.
        validation: held-out rows, to calibrate on; by default up to 200 rows of `data`, at most a tenth of them.
        validation_split: split of the validation data set.
        calibrate: calibrate after training. Set it to false if base and assistants do not fit in one process;
            `collm calibrate` can do it later with the same rows.
        dtype: data type of all models: float32, bfloat16, float16 or auto. With auto, models keep their saved dtype,
            but full fine-tuning of the base uses float32.
        device: device of all models: cpu, cuda, cuda:1 or auto; by default the GPU if there is one.
        attention: attention implementation of all models, one of transformers'.
        base_quantization: quantization of the base with bitsandbytes, nf4 or int8, for method "lora" (QLoRA) or "head".
        assistant_quantization: quantization of the assistants with bitsandbytes, nf4 or int8.
        tool_eps: probability that a tool gives to all tokens except its next one together, 0.01 by default.
        tool_seconds: time limit of a call to a Python function, 1 by default.
        accept_differences: differences between the models to accept: special_tokens, eos, chat_template.
        head: shape of the head: "linear", or "mlp" to add a hidden layer; "mlp" by default with objective "gain". Only
            a linear head without doubt can be exported as rows for vLLM.
        head_width: number of units of the hidden layer, 256 by default.
        head_doubt: let the head also read the base's doubt: log max-probability, entropy and margin; by default with
            objective "gain".
        cache_hidden_states: store the base's hidden states at all target tokens with its scores. The warm start reads
            these. With method "head", the head is fitted on them until its loss no longer falls. Otherwise the base
            computes them again.
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
    head: str | None = None
    head_width: int | None = None
    head_doubt: bool | None = None
    cache_hidden_states: bool = False
    scores: str | None = None
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        from collm.evaluation.metrics import metric_named
        from collm.models.loading import ModelSpec
        from collm.text.guards import check_accepted

        check_fields(self)
        super().__post_init__()
        if self.metric is not None:
            metric_named(self.metric)
        if not self.assistant and self.calibrate:
            raise ConfigError("there is no assistant; expected at least one directory, GGUF file or Hub id")
        if self.validation_split is not None and self.validation is None:
            raise ConfigError("validation_split has no effect without validation; name the data set")
        for split in (self.data_split, self.validation_split):
            if split is not None and split.startswith("test"):
                raise ConfigError(
                    f"split {split!r} is for test results; train on another split, and choose the threshold on "
                    "held-out rows (leave validation out) or on a validation split"
                )
        if self.head not in (None, "linear", "mlp"):
            raise ConfigError(f"head is {self.head!r}, expected linear or mlp")
        if self.head_width is not None and (self.head != "mlp" or self.head_width < 1):
            raise ConfigError(f"head_width is {self.head_width}, expected at least 1, for head 'mlp' only")
        if self.base.startswith(PREFIX):
            raise ConfigError(f"the base is {self.base}, expected a language model: the head reads its hidden states")
        how = {"dtype": self.dtype, "device": self.device, "attention": self.attention}
        self.validation_source = self.validation or f"held out of {self.data}"
        self.base_model = ModelSpec.parse(self.base, **how, quantization=self.base_quantization)
        self.assistants: list[AssistantSpec] = [
            ToolSpec.parse(name, eps=self.tool_eps, seconds=self.tool_seconds)
            if name.startswith(PREFIX)
            else ModelSpec.parse(name, **how, quantization=self.assistant_quantization)
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

    @property
    def head_shape(self) -> dict[str, Any]:
        """Arguments of `DeferralHead`."""
        return {"width": (self.head_width or 256) if self.head == "mlp" else 0, "doubt": bool(self.head_doubt)}

    def for_training(self, args: CoLLMConfig) -> RunConfig:
        """The options that training needs.

        The objective "gain" reads stored hidden states. So does a head on a base with an adapter, or on one in
        llama.cpp, whose weights have no gradients. Other methods dequantize that base.

        Raises:
            ConfigError: the base has an adapter, and the method would train it.
        """
        in_llama, is_gain, adapter = self.base_model.in_llama, args.objective == "gain", self.base_model.adapter
        if adapter is not None and args.method != "head":
            advice = "use method 'head', or merge the adapter into the model"
            raise ConfigError(
                f"the base has the adapter {adapter}, which method {args.method!r} cannot train; {advice}"
            )
        reads_states = args.method == "head" and (in_llama or is_gain or adapter is not None)
        config = replace(
            self,
            head=self.head or ("mlp" if is_gain else "linear"),
            head_doubt=is_gain if self.head_doubt is None else self.head_doubt,
            cache_hidden_states=self.cache_hidden_states or reads_states,
        )
        if in_llama and args.method != "head":
            config.base_model = config.authors["base"] = self.base_model.dequantized()
        return config

    def scores_in(self, directory: Path) -> Path:
        """The directory of the scores of the run in this directory."""
        return Path(self.scores or directory / "scores")


@dataclass(frozen=True)
class Addition:
    """New assistants of a trained collaboration, and the rows that teach where they write.

    Attributes:
        data: rows of what the new assistants are for, in the layout of the run's own rows.
        assistant: what to add: a directory, a GGUF file, a Hub id, MODEL+ADAPTER, or a tool.
        validation: such rows to calibrate on; by default up to 200 rows, at most a tenth, held out of the data.
        sample: number of rows of the run to learn on too, so that the new assistants do not write there; by default as
            many as there are new ones.
        deferral_cost: nats per decision for a new assistant, by default that of the run.
        old_biases: fit one number of each other assistant too, its bias.
    """

    data: str
    assistant: Sequence[str] = ()
    validation: str | None = None
    sample: int | None = None
    deferral_cost: float | None = None
    old_biases: bool = False

    def __post_init__(self) -> None:
        if not self.assistant:
            raise ConfigError("there is no assistant to add; name at least one with --assistant")
        if self.sample is not None and self.sample < 0:
            raise ConfigError(f"sample is {self.sample}, expected at least 0 rows")


def functions_named(options: Mapping[str, Any]) -> list[str]:
    """The functions that options of a run name as metric, format or tools."""
    assistants = options.get("assistant") or []
    named = [str(options.get(name, "")) for name in ("metric", "format")]
    tools = [str(one) for one in ([assistants] if isinstance(assistants, str) else assistants)]
    functions = [name for name in tools if name.startswith(PREFIX) and name.split(":")[1] not in BUILT_IN]
    return [name for name in named if ":" in name] + functions
