"""Choose the thresholds of a trained collaboration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration, CalibrationOptions
from collm.errors import DAMAGED, ConfigError
from collm.evaluation.calibration import calibrate
from collm.evaluation.gold import TeacherForcedCurve, gold_examples, gold_views, teacher_forced
from collm.evaluation.metrics import metric_named
from collm.run.data import score, split_rows
from collm.run.options import RunConfig, functions_named
from collm.tools.spec import not_trusted
from collm.training.data import Row
from collm.training.scores import find_scores
from collm.training.scoring import progress_bar
from collm.untrusted import contained, read_yaml


def calibrate_on(
    model: CoLLM, rows: Sequence[Row], options: CalibrationOptions, *, source: str, quiet: bool = False
) -> Calibration:
    """Calibrate on rows from `source`. With models in memory, the best of the teacher-forced curve is measured too."""
    metric_named(options.metric)  # raises before the rows are read
    guesses = list[float]()
    if model.servers is None:
        curve = curve_on(model, rows)
        guesses = [curve.best(budget).threshold for budget in (1.0, *options.budgets)]
    with progress_bar("calibrating", enabled=not quiet) as progress:
        settings = {"data": source}
        return calibrate(model, rows, options, guesses=guesses, settings=settings, on_completion=progress)


def curve_on(model: CoLLM, rows: Sequence[Row]) -> TeacherForcedCurve:
    """The teacher-forced curve on rows, with the models in memory."""
    return teacher_forced(gold_views(model, gold_examples(model, rows)))


@dataclass(frozen=True)
class PastRun:
    """A run directory, with the options of its run.yaml."""

    directory: Path
    config: RunConfig
    seed: int
    max_length: int

    @classmethod
    def read(cls, directory: Path, *, trust_code: bool = False) -> PastRun:
        """Read the run of a directory. `trust_code` allows the functions that run.yaml names."""
        path = contained(directory) / "run.yaml"
        if not path.exists():
            raise ConfigError(f"there is no {path} with the validation rows; pass --data")
        try:
            options = read_yaml(path)
            values = {one.name: options[one.name] for one in fields(RunConfig)}
            if not trust_code and (functions := functions_named(values)):
                raise ConfigError(not_trusted(path, functions[0]))
            config = RunConfig(**values)
            seed, max_length = (int(options[name]) for name in ("seed", "max_length"))
            if abs(seed) >= 1 << 63 or max_length < 2:
                raise ValueError(f"seed is {seed}, max_length {max_length}")
        except (*DAMAGED, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path} is damaged ({type(error).__name__}: {reason:.200}); restore it, or pass --data"
            ) from error
        return cls(directory, config, seed, max_length)

    def curve(self, model: CoLLM, *, quiet: bool = False) -> TeacherForcedCurve:
        """The teacher-forced curve, with the stored scores of the assistants, so that only the base is loaded.

        Missing scores are computed and stored inside the run's directory, wherever run.yaml says they are.
        """
        _, rows = split_rows(self.config, seed=self.seed)
        examples = gold_examples(model, rows, max_length=self.max_length)
        shared, scores = self.config.scores_in(self.directory) / "validation", []
        inside = shared.resolve().is_relative_to(self.directory.resolve())
        own, batch = shared if inside else self.directory / "scores" / "validation", self.config.max_batch_tokens
        for number, (author, spec) in list(enumerate(self.config.authors.items()))[1:]:
            read, tokenizer = examples.read_by(number), model.author_tokenizers[number]
            found = find_scores(shared / author, read, spec)
            scores.append(found or score(read, spec, own / author, tokenizer, max_batch_tokens=batch, quiet=quiet))
        return teacher_forced(gold_views(model, examples, scores))
