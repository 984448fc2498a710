"""Choose the thresholds of a trained collaboration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration, CalibrationOptions
from collm.errors import DAMAGED, ConfigError, DataError
from collm.evaluation.calibration import calibrate
from collm.evaluation.gold import TeacherForcedCurve, gold_examples, gold_views, teacher_forced
from collm.evaluation.metrics import try_metric
from collm.run.data import score
from collm.run.options import RunConfig, functions_named
from collm.tools.spec import not_trusted
from collm.training.data import Row, load_rows
from collm.training.scores import find_scores
from collm.training.scoring import progress_bar
from collm.untrusted import contained, read_yaml

logger = logging.getLogger(__name__)

VALIDATION = "validation.jsonl"
"""The rows of a run's calibration, in its directory."""


def calibrate_on(
    model: CoLLM, rows: Sequence[Row], options: CalibrationOptions, *, source: str, quiet: bool = False
) -> Calibration:
    """Calibrate on rows from `source`, with models in memory also by the teacher-forced curve."""
    if not rows:
        raise DataError("there are no rows to calibrate on, expected at least one")
    try_metric(options.metric, rows[0].completion)
    curve = curve_on(model, rows) if model.servers is None else None
    with progress_bar(f"calibrating on {len(rows)} rows", "texts at most", enabled=not quiet) as progress:
        settings = {"data": source}
        found = calibrate(model, rows, options, curve=curve, settings=settings, on_completion=progress)
    if (warning := found.warning()) is not None:
        logger.warning(warning)
    return found


def curve_on(model: CoLLM, rows: Sequence[Row]) -> TeacherForcedCurve:
    """The teacher-forced curve on rows, with the models in memory."""
    return teacher_forced(gold_views(model, gold_examples(model, rows)))


@dataclass(frozen=True)
class PastRun:
    """A run directory, with the options of its run.yaml and its validation rows.

    Attributes:
        training: the fields of `CoLLMConfig` in run.yaml.
    """

    directory: Path
    config: RunConfig
    training: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path, *, trust_code: bool = False) -> PastRun:
        """Read the run of a directory. `trust_code` allows the functions that run.yaml names."""
        path = contained(directory) / "run.yaml"
        if not path.exists():
            raise ConfigError(f"there is no {path} of a training run; name its directory, or calibrate with --data")
        try:
            options = read_yaml(path)
            values = {one.name: options.pop(one.name) for one in fields(RunConfig)}
            if not trust_code and (functions := functions_named(values)):
                raise ConfigError(not_trusted(path, functions[0]))
            config = RunConfig(**values)
            options["max_length"] = int(options["max_length"])
            if options["max_length"] < 2:
                raise ValueError(f"max_length is {options['max_length']}")
        except (*DAMAGED, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path} is damaged ({type(error).__name__}: {reason:.200}); restore it, or calibrate with --data"
            ) from error
        return cls(directory, config, options)

    def rows(self) -> list[Row]:
        """The rows that the run held out or was given to calibrate on."""
        if not (self.directory / VALIDATION).exists():
            raise ConfigError(f"there is no {self.directory / VALIDATION} with the validation rows; pass --data")
        return load_rows(self.directory / VALIDATION)

    def curve(self, model: CoLLM, *, quiet: bool = False) -> TeacherForcedCurve:
        """The teacher-forced curve, with the stored scores of the assistants, so that only the base is loaded.

        Missing scores are computed and stored inside the run's directory, wherever run.yaml says they are.
        """
        examples = gold_examples(model, self.rows(), max_length=self.training["max_length"])
        shared, scores = self.config.scores_in(self.directory) / "validation", []
        inside = shared.resolve().is_relative_to(self.directory.resolve())
        own, batch = shared if inside else self.directory / "scores" / "validation", self.config.max_batch_tokens
        for number, (author, spec) in list(enumerate(self.config.authors.items()))[1:]:
            read, tokenizer = examples.read_by(number), model.author_tokenizers[number]
            found = find_scores(shared / author, read, spec)
            scores.append(found or score(read, spec, own / author, tokenizer, max_batch_tokens=batch, quiet=quiet))
        return teacher_forced(gold_views(model, examples, scores))
