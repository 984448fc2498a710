"""Choose the thresholds of a trained collaboration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration
from collm.errors import DAMAGED, ConfigError
from collm.evaluation.calibration import CalibrationOptions, calibrate, check_on
from collm.evaluation.gold import TeacherForcedCurve, gold_examples, gold_views, teacher_forced
from collm.models.members import AssistantSpec
from collm.run.data import divided, split_rows
from collm.run.options import RunConfig, functions_named
from collm.run.scores import score, scores_directory
from collm.tools.spec import not_trusted
from collm.training.data import Row
from collm.training.examples import Example
from collm.training.scores import Scores
from collm.training.scoring import find_scores, progress_bar
from collm.untrusted import contained, read_yaml


@dataclass(frozen=True)
class Validation:
    """The rows and options of a calibration.

    Attributes:
        rows: prompts with their reference completions.
        source: the source of the rows, for the record.
        options: how thresholds are found and measured.
    """

    rows: Sequence[Row]
    source: str
    options: CalibrationOptions = field(default_factory=CalibrationOptions)

    @classmethod
    def of(cls, config: RunConfig, rows: Sequence[Row]) -> Validation:
        """The validation of a training run."""
        return cls(rows, config.validation or f"held out of {config.data}", config.calibration_options())

    def split(self, share: float) -> tuple[Validation, Validation]:
        """Divide the rows at random into rows to choose thresholds on, and a share of rows to check the choice on.

        The division is always the same.

        Raises:
            ConfigError: the share leaves one of the parts empty.
        """
        if not 0 < share < 1:
            raise ConfigError(f"the share to check on is {share}, expected a number between 0 and 1, such as 0.3")
        count = round(share * len(self.rows))
        if not 0 < count < len(self.rows):
            raise ConfigError(
                f"a share of {share} of {len(self.rows)} rows is {count} rows; leave at least one to choose on and one "
                "to check on"
            )
        chosen, checked = divided(self.rows, count, seed=0)
        return replace(self, rows=chosen), replace(self, rows=checked)

    def calibrate(self, model: CoLLM, *, quiet: bool = False) -> Calibration:
        """Calibrate on these rows. With models in memory, the best thresholds of the teacher-forced curve are added."""
        guesses = list[float]()
        if model.servers is None:
            curve = self.curve(model)
            guesses = [curve.best(budget).threshold for budget in (1.0, *self.options.budgets)]
        with progress_bar("calibrating", enabled=not quiet) as progress:
            settings = {"data": self.source}
            return calibrate(model, self.rows, self.options, guesses=guesses, settings=settings, on_completion=progress)

    def check(self, model: CoLLM, *, quiet: bool = False) -> Calibration:
        """Check the chosen thresholds on these rows."""
        with progress_bar("checking", enabled=not quiet) as progress:
            return check_on(model, self.rows, self.options, on_completion=progress)

    def curve(self, model: CoLLM) -> TeacherForcedCurve:
        """The teacher-forced curve on these rows."""
        return teacher_forced(gold_views(model, gold_examples(model, self.rows)))


@dataclass(frozen=True)
class PastRun:
    """A run directory, with the options of its run.yaml."""

    directory: Path
    config: RunConfig
    seed: int
    max_length: int

    @classmethod
    def read(cls, directory: Path, *, trust_code: bool = False) -> PastRun:
        """Read the run of a directory.

        Args:
            trust_code: run the functions that run.yaml names.

        Raises:
            ConfigError: run.yaml is missing or damaged, or names a function that is not trusted.
            ArtefactError: a symbolic link leads out of the directory.
        """
        path = contained(directory) / "run.yaml"
        if not path.exists():
            raise ConfigError(f"there is no {path} with the validation rows; pass --data")
        try:
            options = read_yaml(path)
            values = {one.name: options[one.name] for one in fields(RunConfig)}
            named = functions_named(values)
            if named and not trust_code:
                raise ConfigError(not_trusted(path, named[0]))
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

    def validation(self) -> Validation:
        """The validation of the run."""
        return Validation.of(self.config, split_rows(self.config, seed=self.seed)[1])

    def curve(self, model: CoLLM, *, quiet: bool = False) -> TeacherForcedCurve:
        """The teacher-forced curve, with the stored scores of the assistants, so that only the base is loaded.

        Missing scores are computed and stored in the run's directory.
        """
        rows, config = self.validation().rows, self.config
        examples = gold_examples(model, rows, max_length=self.max_length)
        scores = [
            self._scores(author, spec, examples.read_by(number), model.tokenizers[number], quiet=quiet)
            for number, (author, spec) in enumerate(config.authors.items())
            if author != "base"
        ]
        return teacher_forced(gold_views(model, examples, scores))

    def _scores(
        self,
        author: str,
        spec: AssistantSpec,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        quiet: bool,
    ) -> Scores:
        """The stored scores of an author. Missing scores are only written inside the run's directory."""
        part = Path("validation") / author
        shared = scores_directory(self.config, self.directory) / part
        found = find_scores(shared, examples, spec)
        if found is not None:
            return found
        inside = shared.resolve().is_relative_to(self.directory.resolve())
        out = shared if inside else self.directory / "scores" / part
        batch = self.config.max_batch_tokens
        return score(examples, spec, out, tokenizer, max_batch_tokens=batch, quiet=quiet)
