"""A training run: compute scores, warm-start the head, train, save, calibrate."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate import PartialState
from torch import Tensor, nn

from collm.artefact import library_versions
from collm.atomic import atomic_directory, sole_writer, write_text
from collm.collaboration import CoLLM
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.errors import DAMAGED, ConfigError, MissingExtra
from collm.evaluation.metrics import try_metric
from collm.models.checks import quantized_with
from collm.models.language_model import LanguageModel, merged
from collm.models.loading import load_config, load_model, quiet_if_small
from collm.models.names import names_gguf
from collm.redaction import redacted_command, redacted_options, visible
from collm.run.calibrate import VALIDATION, calibrate_on
from collm.run.data import Prepared, prepare, score_run
from collm.run.options import RunConfig
from collm.text.guards import TokenizerIdentity
from collm.tools.spec import ToolSpec
from collm.training.checkpoints import check_origin, last_checkpoint
from collm.training.config import CoLLMConfig, check_fitted
from collm.training.data import Row, write_rows
from collm.training.examples import fingerprint
from collm.training.scores import Scores, TrainingSet
from collm.training.trainer import CoLLMTrainer, fit_head
from collm.untrusted import contained, read_yaml

ROWS = "train.jsonl"
"""The training rows of a run that has them in its directory."""


@dataclass(frozen=True)
class RunResult:
    """A trained collaboration, its directory, and measures of its training."""

    directory: Path
    model: CoLLM
    metrics: dict[str, Any]

    @property
    def calibration(self) -> Calibration:
        """The calibration at the end of the run. A ConfigError if the run did not calibrate."""
        if self.model.calibration is None:
            raise ConfigError(f"{self.directory} was not calibrated; run 'collm calibrate {self.directory}'")
        return self.model.calibration


def train_collaboration(config: RunConfig, args: CoLLMConfig, *, quiet: bool = False) -> RunResult:
    """Compute missing scores, warm-start the head, train, save, calibrate.

    Several processes (torchrun, `accelerate launch`) share scoring and training, and the first saves and calibrates. An
    interrupted run resumes when it is started again with the same options. The run directory (`args.output_dir`) has
    run.yaml, run.json, example.txt, validation.jsonl, scores/, checkpoint-*/, metrics.json and collaboration/.

    Raises:
        ConfigError: options that contradict each other, or a run directory with another run, writer, rows or models.
        CollmError: an error of a step.
    """
    directory = Path(args.output_dir)
    with open_run(config, args, quiet=quiet) as (config, prepared):
        scores = score_run(config, prepared, directory, list(config.authors), quiet=quiet)
        sets = [
            TrainingSet(examples, assistants, base)
            for examples, (base, *assistants) in zip(prepared.sets, scores, strict=True)
        ]
        tuned, head, metrics = fit(config, args, prepared, sets)
        model = CoLLM(
            config.base_model if args.method == "head" or tuned is None else tuned,
            config.assistants,
            head,
            prepared.tokenizer,
            template=prepared.template,
            accept_differences=config.accept_differences,
        )
        return finish(model, metrics, config, prepared, directory, quiet=quiet)


def tune_model(config: RunConfig, args: CoLLMConfig, *, quiet: bool = False) -> Path:
    """Tune the base of a run without assistants on its own likelihood. An adapter is merged.

    Rows, templates, processes, resuming and errors are those of `train_collaboration`. Returns the directory of the
    model, in the run directory.
    """
    if config.assistant or args.warm_start or config.base_quantization:
        raise ConfigError("a model tuned alone has no assistant, warm start or quantization; leave them out")
    out, processes = Path(args.output_dir) / "model", PartialState()
    with open_run(config, args, quiet=quiet) as (config, prepared):
        tuned, _, metrics = fit(config, args, prepared, [TrainingSet(examples, []) for examples in prepared.sets])
        if processes.is_main_process and not out.exists():
            model = merged(cast(Any, tuned))
            with atomic_directory(out) as directory, quiet_if_small(model):
                model.save_pretrained(directory)
                prepared.tokenizer.save_pretrained(directory)
            write_text(out.parent / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        processes.wait_for_everyone()
    return out


@contextmanager
def open_run(
    config: RunConfig,
    args: CoLLMConfig,
    *,
    quiet: bool,
    rows: tuple[Sequence[Row], Sequence[Row]] | None = None,
) -> Iterator[tuple[RunConfig, Prepared]]:
    """Check the options and begin or resume a run, as the only writer of its directory.

    `rows` are training and validation rows in place of those that the options name. The directory then has both.
    Yields the options with those that training needs, and the encoded rows.
    """
    args.deferral_costs(len(config.assistant))  # raises if their number does not fit
    if args.method == "lora" and find_spec("peft") is None:
        raise MissingExtra("peft", "train")
    if (config.base_quantization or config.assistant_quantization) and find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize")
    config = config.for_training(args)
    if config.cache_hidden_states and args.method == "head":
        check_fitted(args)
    base = config.base_model
    own = None if names_gguf(base.path) else quantized_with(load_config(base))  # a GGUF file is dequantized
    if args.method == "full" and (method := config.base_quantization or own):
        raise ConfigError(f"the base is quantized with {method}, and such weights take no updates; use lora")
    directory = Path(args.output_dir)
    args.device  # noqa: B018 - makes the process group
    processes = PartialState()
    check_directory(directory, config, args)
    with sole_writer(directory) if processes.is_main_process else nullcontext():
        prepared = prepare(config, args, rows)
        try_metric(config.metric, prepared.validation[0].completion)
        if (checkpoint := last_checkpoint(directory)) is not None:
            origin = {
                **dict(zip(("examples", "evaluation"), map(fingerprint, prepared.sets), strict=False)),
                "base": config.base_model.identity()["weights"],  # None for a model on the Hub, until it is loaded
                "assistants": [spec.identity() for spec in config.assistants],
            }
            check_origin(checkpoint, {name: value for name, value in origin.items() if value is not None})
        processes.wait_for_everyone()  # all have checked the directory before one writes
        if processes.is_main_process:
            claim_directory(directory, config, args)
            write_text(directory / "example.txt", prepared.rendered())
            write_rows(directory / VALIDATION, prepared.validation)
            if rows is not None:
                write_rows(directory / ROWS, rows[0])
            if not quiet:
                sys.stderr.write(visible(prepared.rendered()))
        yield config, prepared


def finish(
    model: CoLLM,
    metrics: dict[str, Any],
    config: RunConfig,
    prepared: Prepared,
    directory: Path,
    *,
    quiet: bool,
) -> RunResult:
    """Save a trained collaboration in its run directory, and calibrate it."""
    out, processes = directory / "collaboration", PartialState()
    if processes.is_main_process:
        model.training = {name: value for name, value in metrics.items() if isinstance(value, str | float | int)}
        model.save_pretrained(out)
        if config.calibrate:
            calibrate_on(model, prepared.validation, config, source=config.validation_source, quiet=quiet)
            model.save_calibration(out)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        model = CoLLM.from_pretrained(out, trust_code=True)
    if model.calibration is not None:
        metrics["calibration"] = model.calibration.to_dict()
    if processes.is_main_process:
        write_text(directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return RunResult(out, model, metrics)


def leave() -> None:
    """Destroy the process group in all processes together, if there is one. Exiting without this can abort."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        # Gloo's threads need the GIL to free their last tensors, and destroying the group holds it while it waits.
        time.sleep(0.5)
        state.destroy_process_group()


def check_directory(directory: Path, config: RunConfig, args: CoLLMConfig) -> None:
    """Raise a ConfigError for a directory with another run or other files, an ArtefactError if a link leads out."""
    path = contained(directory) / "run.yaml"
    if path.exists():
        now = yaml.safe_load(_to_yaml(config, args))
        try:
            before = dict(read_yaml(path))
        except DAMAGED as error:
            raise ConfigError(f"{path} is damaged; restore it, or choose another output_dir") from error
        for name in now:
            if before.get(name) != now[name]:
                raise ConfigError(
                    f"{directory} holds a run with {name}={before.get(name)!r:.200}, now it is {now[name]!r:.200}; "
                    "choose another output_dir, or give the same options to resume"
                )
    elif directory.exists() and not (
        directory.is_dir() and all(entry.name == "scores" or entry.name[0] == "." for entry in directory.iterdir())
    ):
        raise ConfigError(f"{directory} exists and holds no run; choose another output_dir")


def claim_directory(directory: Path, config: RunConfig, args: CoLLMConfig) -> None:
    """Write the options, the command line and the versions."""
    write_text(directory / "run.yaml", _to_yaml(config, args))
    about = {
        "command": redacted_command(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": args.seed,
        "versions": {**library_versions(), "python": sys.version.split()[0]},
    }
    write_text(directory / "run.json", json.dumps(about, indent=2) + "\n")


def _to_yaml(config: RunConfig, args: CoLLMConfig) -> str:
    """All options of a run as YAML, what must be given first, without secrets.

    Models and scores have absolute paths, because `collm calibrate` may be called from another directory.
    """
    first = {
        "base": config.base_model.name,
        "assistant": [str(one) if isinstance(one, ToolSpec) else one.name for one in config.assistants],
        "data": config.data,
        "scores": config.scores and str(Path(config.scores).resolve()),
    }
    how = {one.name: getattr(args, one.name) for one in fields(args) if one.init}
    options = redacted_options({**first, **asdict(config), **first, **how})
    return yaml.safe_dump(json.loads(json.dumps(options, default=str)), sort_keys=False, allow_unicode=True)


def fit(
    config: RunConfig, args: CoLLMConfig, prepared: Prepared, sets: Sequence[TrainingSet]
) -> tuple[nn.Module | None, DeferralHead, dict[str, Any]]:
    """Train on the first set, without the assistants in memory, or resume from a checkpoint. The second is evaluated.

    With stored hidden states of a frozen base only a head is fitted, and there is no tuned base.
    """
    spec, data, evaluation = config.base_model, sets[0], sets[1] if len(sets) > 1 else None
    facts = {
        "method": args.method,
        "data": config.data,
        "rows": prepared.kind,
        "examples": len(prepared.sets[0]),
        "bad_rows_skipped": prepared.num_bad,
    }
    if config.cache_hidden_states and args.method == "head":
        hidden = cast(Scores, data.base_scores).hidden
        head = DeferralHead(cast(Sequence[Tensor], hidden)[0].shape[-1], len(config.assistant), **config.head_shape)
        return None, head, facts | fit_head(head, args, data, evaluation)
    # In bf16 weights most updates of full fine-tuning are rounded to zero. `bf16: true` computes in bf16.
    in_fp32 = args.method == "full" and spec.dtype == "auto"
    base = load_model(replace(spec, dtype="float32") if in_fp32 else spec)
    hidden_size = LanguageModel(base, name="base").hidden_size
    trainer = CoLLMTrainer(
        base=base,
        head=DeferralHead(hidden_size, len(config.assistant), **config.head_shape),
        args=args,
        train_dataset=data,
        eval_dataset=evaluation,
        vocab_size=TokenizerIdentity.of(prepared.tokenizer).vocab_size,
    )
    outcome = trainer.train(resume_from_checkpoint=last_checkpoint(Path(args.output_dir)))
    tuned, head = trainer.gathered()
    metrics = facts | {"objective": trainer.objective, "deferral_costs": trainer.deferral_costs}
    metrics["train_loss_nats"] = outcome.training_loss
    if evaluation is not None:
        metrics |= trainer.evaluate()
    if trainer.label_report is not None and trainer.warm_start_report is not None:
        metrics |= {"pseudo_label_share": trainer.label_report.share, "warm_start": trainer.warm_start_report}
    return tuned, head, metrics
