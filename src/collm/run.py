"""One training run: from two checkpoints and a data file to a calibrated collaboration on disk."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from collm.artefact import library_versions
from collm.atomic import atomic_file
from collm.collaboration import CoLLM
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.core.types import SamplingParams
from collm.errors import ConfigError
from collm.evaluation.calibration import DEFERRAL_RATES, ValidationItem, calibrate, check_rates
from collm.evaluation.metrics import metric_named
from collm.models.guards import ACCEPTABLE, TokenizerIdentity, check_accepted, check_tokenizers
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.models.members import AssistantSpec
from collm.models.template import PromptTemplate
from collm.models.tools import ToolModel
from collm.tools.calls import open_tool
from collm.tools.spec import PREFIX, ToolSpec
from collm.training.checkpoints import last_checkpoint
from collm.training.config import CoLLMConfig
from collm.training.data import Row, load_rows
from collm.training.dataset import TrainingSet
from collm.training.examples import Examples, encode_rows
from collm.training.scores import Scores
from collm.training.scoring import find_scores, load_scores, progress_bar, write_scores
from collm.training.trainer import CoLLMTrainer

MAX_HELD_OUT = 200
"""Most rows held out for calibration where no validation set is given; at most a tenth of the rows."""


@dataclass
class DataConfig:
    """Which rows, and how they are rendered.

    Attributes:
        data: training rows: JSON, JSONL, a `datasets` directory or a Hub name.
        data_split: which split of a data set.
        prompt_field, completion_field: names of the two fields.
        template: wraps prompts, in training and in decoding alike.
    """

    data: str
    data_split: str | None = None
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: str = "{prompt}"

    def rows(self, source: str, split: str | None) -> list[Row]:
        """Rows of any source that has these fields."""
        return load_rows(source, split=split, prompt_field=self.prompt_field, completion_field=self.completion_field)


@dataclass(kw_only=True)
class RunConfig(DataConfig):
    """What to train on what. How to train is `CoLLMConfig`; a run's YAML file holds the fields of both.

    Attributes:
        base: the model to train: a path or Hub id, "@revision" behind it if need be.
        assistant: the assistants 1..K, likewise; or tools: tool:calculator, tool:date, tool:lookup:facts.csv, or a
            function of yours as tool:package.module:function.
        validation: rows to calibrate on; by default up to 200 rows, at most a tenth, held out of `data`.
        validation_split: which split of a data set.
        metric: what calibration measures: exact_match, contains, last_number, token_f1 or module:function.
        rates: deferral rates that calibration aims at.
        max_new_tokens, stop, max_batch: of calibration's completions.
        dtype, device, attention: of all models; with dtype "auto" as they were saved, but fp32 for a base to be tuned
            whole.
        tool_eps: probability that a tool leaves to all tokens but the next of its answer, 0.01 by default.
        tool_seconds: time limit of a call of your function, 1 by default.
        accept_differences: differences between the models to put up with: special_tokens, eos, chat_template.
        scores: directory of the scores (`base`, `assistant-1`, ...), by default in the run directory; what is missing
            there is computed.
        max_batch_tokens: of scoring, padding included.
    """

    base: str
    assistant: list[str]
    validation: str | None = None
    validation_split: str | None = None
    metric: str = "exact_match"
    rates: list[float] = field(default_factory=lambda: list(DEFERRAL_RATES))
    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    max_batch: int = 16
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    tool_eps: float | None = None
    tool_seconds: float | None = None
    accept_differences: list[str] = field(default_factory=list)
    scores: str | None = None
    max_batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if not self.assistant:
            raise ConfigError("no assistant came; expected at least one path or Hub id")
        if self.validation_split is not None and self.validation is None:
            raise ConfigError("validation_split has no effect without validation; name the data set")
        if self.base.startswith(PREFIX):
            raise ConfigError(f"the base is {self.base}, expected a language model: the head reads its hidden states")
        tools = [spec for spec in self.assistants if isinstance(spec, ToolSpec)]
        if self.tool_eps is not None and not tools:
            raise ConfigError("tool_eps has no effect without a tool among the assistants; leave it out")
        if self.tool_seconds is not None and not any(tool.foreign for tool in tools):
            raise ConfigError("tool_seconds has no effect without a function of yours as an assistant; leave it out")
        check_accepted(self.accept_differences)
        check_rates(self.rates)
        metric_named(self.metric)

    @property
    def base_model(self) -> ModelSpec:
        """Where the base comes from."""
        return self._model(self.base)

    @property
    def assistants(self) -> list[AssistantSpec]:
        """Where the assistants 1..K come from."""
        return [
            parse_tool(name, self.tool_eps, self.tool_seconds) if name.startswith(PREFIX) else self._model(name)
            for name in self.assistant
        ]

    def _model(self, name: str) -> ModelSpec:
        return parse_model(name, dtype=self.dtype, device=self.device, attention=self.attention)


def parse_tool(name: str, eps: float | None = None, seconds: float | None = None) -> ToolSpec:
    """A tool by name, with what is set of its options."""
    options = {"eps": eps, "seconds": seconds}
    return ToolSpec.parse(name, **{key: value for key, value in options.items() if value is not None})


def parse_model(
    name: str, *, dtype: str = "auto", device: str | None = None, attention: str | None = None
) -> ModelSpec:
    """A model by path or Hub id, with "@revision" behind it if need be."""
    path, at, revision = name.rpartition("@")
    if not at or Path(name).exists():
        path, revision = name, ""
    return ModelSpec(path, revision or None, dtype, device, attention)


@dataclass(frozen=True)
class Prepared:
    """What the models will read."""

    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    examples: Examples
    validation: list[Row]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    directory: Path
    model: CoLLM
    calibration: Calibration
    metrics: dict[str, Any]


def train_collaboration(config: RunConfig, args: CoLLMConfig, *, quiet: bool = False) -> RunResult:
    """Score what is missing, warm-start the head, train, save, calibrate.

    Started in several processes (torchrun, `accelerate launch`), they share scoring and training; the first one saves
    and calibrates while the others wait. An interrupted run goes on where it was when it is started again with the same
    options. The run directory (`args.output_dir`) holds run.yaml, run.json, scores/, checkpoint-*/, metrics.json and
    collaboration/.

    Raises:
        ConfigError: options that do not fit, or a run directory that holds another run.
        CollmError: whatever else its steps raise.
    """
    directory = Path(args.output_dir)
    processes = processes_of(args)
    check_directory(directory, config, args)
    prepared = prepare(config, args.max_length, seed=args.seed)
    processes.wait_for_everyone()  # all have looked before one writes
    if processes.is_main_process:
        claim_directory(directory, config, args)
    scores = score_all(config, prepared, directory, processes, quiet=quiet)
    model, metrics = fit(config, args, prepared, scores)
    if processes.is_main_process:
        _save(config, prepared, directory, model, metrics, quiet=quiet)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        model = CoLLM.from_pretrained(directory / "collaboration", trust_tools=True)
    assert model.calibration is not None
    metrics["calibration"] = model.calibration.to_dict()
    return RunResult(directory / "collaboration", model, model.calibration, metrics)


def processes_of(args: CoLLMConfig) -> PartialState:
    """The processes of this run, each with its device."""
    args.device  # noqa: B018 - makes the process group
    assert args.distributed_state is not None
    return args.distributed_state


def _save(
    config: RunConfig, prepared: Prepared, directory: Path, model: CoLLM, metrics: dict[str, Any], *, quiet: bool
) -> None:
    """Save the collaboration, calibrate it and keep what was measured."""
    model.training = {name: value for name, value in metrics.items() if isinstance(value, str | float | int)}
    model.save_pretrained(directory / "collaboration")
    calibration = calibrate_rows(
        model,
        prepared.validation,
        config.validation or f"held out of {config.data}",
        metric=config.metric,
        rates=config.rates,
        params=SamplingParams(max_new_tokens=config.max_new_tokens, stop=config.stop),
        max_batch=config.max_batch,
        quiet=quiet,
    )
    model.save_calibration(directory / "collaboration")
    kept = {**metrics, "calibration": calibration.to_dict()}
    _write(directory / "metrics.json", json.dumps(kept, indent=2) + "\n")


def check_directory(directory: Path, config: RunConfig, args: CoLLMConfig) -> None:
    """Refuse a directory that holds another run, or something else."""
    path = directory / "run.yaml"
    if path.exists():
        before, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(to_yaml(config, args))
        different = [name for name in now if before.get(name) != now[name]]
        if different:
            name = different[0]
            raise ConfigError(
                f"{directory} holds a run with {name}={before.get(name)!r}, now it is {now[name]!r}; "
                "choose another output_dir, or give the same options to resume"
            )
    elif directory.exists() and any(entry.name != "scores" for entry in directory.iterdir()):
        raise ConfigError(f"{directory} exists and holds no run; choose another output_dir")


def claim_directory(directory: Path, config: RunConfig, args: CoLLMConfig) -> None:
    """Keep the options, the command line and the versions."""
    _write(directory / "run.yaml", to_yaml(config, args))
    about = {
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": args.seed,
        "versions": {**library_versions(), "python": sys.version.split()[0]},
    }
    _write(directory / "run.json", json.dumps(about, indent=2) + "\n")


def to_yaml(config: RunConfig, args: CoLLMConfig) -> str:
    """All options of a run, as its YAML file."""
    options = {**asdict(config), **{f.name: getattr(args, f.name) for f in fields(args) if f.init}}
    return yaml.safe_dump(json.loads(json.dumps(options, default=str)), sort_keys=False, allow_unicode=True)


def prepare(config: RunConfig, max_length: int, *, seed: int) -> Prepared:
    """Read the rows, check that the tokenizers agree and that tools can be called, encode."""
    rows = config.rows(config.data, config.data_split)
    if config.validation is None:
        rows, validation = hold_out(rows, seed=seed)
    else:
        validation = config.rows(config.validation, config.validation_split)
    tokenizer = load_tokenizer(config.base_model)
    identity = TokenizerIdentity.of(tokenizer)
    for number, spec in enumerate(config.assistants, start=1):
        if isinstance(spec, ModelSpec):
            other = TokenizerIdentity.of(load_tokenizer(spec))
            check_tokenizers(identity, other, f"assistant {number} ({spec.path})", accept=config.accept_differences)
        else:
            open_tool(spec).close()
    template = PromptTemplate(config.template, chat=cast("str | None", tokenizer.chat_template))
    return Prepared(tokenizer, template, encode_rows(rows, template, tokenizer, max_length=max_length), validation)


def hold_out(rows: Sequence[Row], *, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to calibrate on, drawn at random.

    Raises:
        ConfigError: fewer than 10 rows.
    """
    count = min(MAX_HELD_OUT, len(rows) // 10)
    if count == 0:
        raise ConfigError(f"{len(rows)} rows are too few to hold some out for calibration; pass a validation set")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:count])
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def score_all(
    config: RunConfig, prepared: Prepared, directory: Path, processes: PartialState, *, quiet: bool
) -> list[Scores]:
    """Scores of the base and of each assistant; computed where missing, one model in memory at a time."""
    root = Path(config.scores) if config.scores else directory / "scores"
    specs = {"base": config.base_model, **{f"assistant-{k}": spec for k, spec in enumerate(config.assistants, start=1)}}
    return [
        score(
            prepared.examples,
            spec,
            root / author,
            prepared.tokenizer,
            processes,
            max_batch_tokens=config.max_batch_tokens,
            quiet=quiet,
        )
        for author, spec in specs.items()
    ]


def score(
    examples: Examples,
    spec: AssistantSpec,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    processes: PartialState | None = None,
    *,
    max_batch_tokens: int,
    quiet: bool = False,
) -> Scores:
    """Scores of one model or tool: those that lie in `out`, or computed there; a model leaves memory afterwards.

    Several processes share the work; all return all scores.
    """
    processes = processes or PartialState(cpu=not torch.cuda.is_available())
    found = find_scores(out, examples, spec)
    if found is None:
        _score_part(examples, spec, out, tokenizer, processes, max_batch_tokens=max_batch_tokens, quiet=quiet)
    processes.wait_for_everyone()
    return found or load_scores(out, examples, spec)


def _score_part(
    examples: Examples,
    spec: AssistantSpec,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    processes: PartialState,
    *,
    max_batch_tokens: int,
    quiet: bool,
) -> None:
    vocab_size = TokenizerIdentity.of(tokenizer).vocab_size
    model: LanguageModel | ToolModel
    if isinstance(spec, ToolSpec):
        name, model = str(spec), ToolModel(spec, tokenizer, name=str(spec), vocab_size=vocab_size)
    else:
        name, model = Path(spec.path).name, LanguageModel(load_model(spec), name=spec.path, vocab_size=vocab_size)
    with progress_bar(f"scoring with {name}", enabled=not quiet and processes.is_main_process) as progress:
        write_scores(
            model,
            examples,
            out,
            spec=spec,
            max_batch_tokens=max_batch_tokens,
            process=processes.process_index,
            num_processes=processes.num_processes,
            progress=progress,
        )
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score_data(
    config: DataConfig, spec: AssistantSpec, base: ModelSpec, out: Path, *, max_length: int, max_batch_tokens: int
) -> Scores:
    """Score rows with one model or tool, encoded by the base's tokenizer as training will encode them."""
    tokenizer = load_tokenizer(base)
    if isinstance(spec, ModelSpec):
        other = TokenizerIdentity.of(load_tokenizer(spec))
        check_tokenizers(TokenizerIdentity.of(tokenizer), other, spec.path, accept=ACCEPTABLE)
    template = PromptTemplate(config.template, chat=cast("str | None", tokenizer.chat_template))
    rows = config.rows(config.data, config.data_split)
    examples = encode_rows(rows, template, tokenizer, max_length=max_length)
    return score(examples, spec, out, tokenizer, max_batch_tokens=max_batch_tokens)


def fit(
    config: RunConfig, args: CoLLMConfig, prepared: Prepared, scores: Sequence[Scores]
) -> tuple[CoLLM, dict[str, Any]]:
    """Warm-start the head and train; the assistants are not in memory. Goes on from a checkpoint if there is one."""
    spec = config.base_model
    # Most updates of full tuning round to nothing in bf16 weights; `bf16: true` computes in it.
    in_fp32 = args.method == "full" and spec.dtype == "auto"
    base = load_model(replace(spec, dtype="float32") if in_fp32 else spec)
    vocab_size = TokenizerIdentity.of(prepared.tokenizer).vocab_size
    hidden_size = LanguageModel(base, name="base").hidden_size
    trainer = CoLLMTrainer(
        base=base,
        head=DeferralHead(hidden_size, len(config.assistant)),
        args=args,
        train_dataset=TrainingSet(prepared.examples, scores[1:], scores[0]),
        vocab_size=vocab_size,
    )
    outcome = trainer.train(resume_from_checkpoint=last_checkpoint(Path(args.output_dir)))
    tuned, head = trainer.gathered()
    metrics: dict[str, Any] = {
        "method": args.method,
        "data": config.data,
        "examples": len(prepared.examples),
        "train_loss_nats": outcome.training_loss,
    }
    if trainer.label_report is not None and trainer.warm_start_report is not None:
        metrics["pseudo_label_share"] = trainer.label_report.share
        metrics["warm_start"] = asdict(trainer.warm_start_report)
    model = CoLLM(
        spec if args.method == "head" else tuned,
        config.assistants,
        head,
        prepared.tokenizer,
        template=prepared.template,
        accept_differences=config.accept_differences,
    )
    return model, metrics


def calibrate_rows(
    model: CoLLM,
    rows: Sequence[Row],
    source: str,
    *,
    metric: str,
    params: SamplingParams,
    rates: Sequence[float] = DEFERRAL_RATES,
    max_batch: int = 16,
    quiet: bool = False,
) -> Calibration:
    """Calibrate on rows of data that came from `source`, with a progress bar."""
    items = [ValidationItem(row.prompt, row.completion) for row in rows]
    with progress_bar("calibrating", enabled=not quiet) as progress:
        return calibrate(
            model,
            items,
            metric=metric,
            params=params,
            rates=rates,
            max_batch=max_batch,
            settings={"data": source},
            on_completion=progress,
        )


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
