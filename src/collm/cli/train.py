"""`collm train` and `tune`, with the fields of `RunConfig` and `CoLLMConfig` as options; `collm add` and `drop`."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import yaml

from collm.cli.options import descriptions, metavar_of, option, read_fields, with_options, with_parameters
from collm.errors import ConfigError
from collm.run.options import NOT_ALONE, Addition, RunConfig, functions_named
from collm.tools.spec import not_trusted

if TYPE_CHECKING:
    from collm.run.train import RunResult
    from collm.training.config import CoLLMConfig

COMMON = {
    "Models and data": "base assistant data output_dir validation format",
    "Training": "method objective num_train_epochs learning_rate head_learning_rate per_device_train_batch_size"
    " gradient_accumulation_steps max_length deferral_cost cache_hidden_states bf16 base_quantization dtype"
    " device seed",
    "Calibration": "calibrate metric max_tokens stop budgets",
}
"""The options that --help shows, by heading."""
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a training run.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the new run.")]
TrustOption = Annotated[bool, typer.Option("--trust-code", help="Run the functions that RUN names.")]
DroppedOption = Annotated[str, typer.Option("--assistant", help="Its name (assistant-2), or its text in run.yaml.")]


def train(context: typer.Context) -> None:
    """Train a collaboration: compute scores, warm-start the head, train, calibrate.

    Each option is a flag and a field of the YAML file, where its name has underscores. A flag overrides the file.
    """
    from collm.cli.terminal import Console, log_to_terminal

    log_to_terminal()
    config, args = parse(context.args)
    from collm.run.train import leave, train_collaboration

    Console().print(f"training into {args.output_dir}; its run.yaml contains every option", markup=False)
    result = train_collaboration(config, args)
    leave()
    _show(result)


def tune(context: typer.Context) -> None:
    """Tune one model alone on the same rows: an assistant of your own, or a baseline.

    Each option is a flag and a field of the YAML file, where its name has underscores. A flag overrides the file.
    """
    from collm.cli.terminal import Console, log_to_terminal

    log_to_terminal()
    config, args = parse(context.args, alone=True)
    from collm.run.train import leave, tune_model

    model = tune_model(config, args)
    leave()
    Console().print(f"{model}: use it like any model, as --base or --assistant", markup=False)


@with_options
def add(run: RunArgument, added: Addition, out: OutOption, trust_code: TrustOption = False) -> None:
    """Add assistants to a trained collaboration. The base and the other assistants stay as they are.

    Only the new rows of the deferral head are fitted, on the new rows of data and a sample of the old ones.
    """
    from collm.cli.terminal import log_to_terminal
    from collm.run.experts import add_assistants

    log_to_terminal()
    _show(*add_assistants(run, added, out, trust_code=trust_code))


def drop(run: RunArgument, assistant: DroppedOption, out: OutOption, trust_code: TrustOption = False) -> None:
    """Remove an assistant from a trained collaboration. All else stays as it is."""
    from collm.cli.terminal import log_to_terminal
    from collm.run.experts import drop_assistant

    log_to_terminal()
    _show(*drop_assistant(run, assistant, out, trust_code=trust_code))


def _show(result: RunResult, changes: list[Any] | None = None) -> None:
    from collm.cli.terminal import Console, calibration_table

    console = Console()
    if result.model.calibration is not None:
        console.print(calibration_table(result.calibration))
    else:
        console.print(f"not calibrated: collm calibrate {result.directory}", markup=False)
    for change in changes or ():
        console.print(str(change), markup=False, soft_wrap=True)
    chat = " --chat" if result.model.training.get("rows") == "chats" else ""
    console.print(f'collm generate {result.directory}{chat} "..."', markup=False)


def parse(arguments: list[str], *, alone: bool = False) -> tuple[RunConfig, CoLLMConfig]:
    """The YAML file's fields with the flags' over them. Functions that the file names need consent.

    `alone` reads the options of a model that is tuned alone.
    """
    from collm.core.devices import check_device
    from collm.training.config import CoLLMConfig

    if asked := {"-h", "--help", "--help-all"}.intersection(arguments):
        _show_help(whole="--help-all" in asked, alone=alone)
    options = _flags(arguments, alone=alone)
    path, trusted = options.pop("config", None), options.pop("trust_code")
    merged = {**({} if path is None else read_fields(path)), **options}
    for name in functions_named(merged):
        if not trusted and name not in functions_named(options):
            raise ConfigError(not_trusted(path, name))
    if alone:
        if given := sorted(set(NOT_ALONE) & set(merged)):
            raise ConfigError(f"{given[0]} has no effect on a model that is tuned alone; leave it out")
        merged |= {"assistant": [], "calibrate": False, "warm_start": False}
        merged |= {"base": merged.pop("model")} if "model" in merged else {}
    missing = [name for name in ("base", "assistant", "data", "output_dir") if name not in merged]
    missing = ["model" if alone and name == "base" else name for name in missing]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}; give each as a flag or in the YAML file of --config")
    own = {}
    for field in fields(RunConfig):
        if field.name in merged:
            own[field.name] = value = merged.pop(field.name)
            if "str" in str(field.type) and not isinstance(value, str | list | None):
                raise ConfigError(f"{field.name} is {value!r}, expected text; put it in quotes")
            if "list" in str(field.type) and isinstance(value, str):
                own[field.name] = [value]
    run = RunConfig(**own)
    check_device(run.device)
    return run, CoLLMConfig.from_dict(merged)


def _known() -> dict[str, Field[Any]]:
    from collm.training.config import CoLLMConfig

    return {one.name: one for config in (RunConfig, CoLLMConfig) for one in fields(config) if one.init}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; '{self.prog} --help' lists the options")


def _flags(arguments: list[str], *, alone: bool) -> dict[str, Any]:
    """The values of the flags by the names of fields, and `model` for a model tuned alone.

    A flag may have hyphens or underscores.
    """
    command = "collm tune" if alone else "collm train"
    made = _Parser(command, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    made.add_argument("--config")
    made.add_argument("--trust_code", action="store_true", default=False)
    known = {**({"model": "str"} if alone else {}), **{name: str(one.type) for name, one in _known().items()}}
    for name, kind in known.items():
        read = _text if "str" in kind else _value
        made.add_argument(f"--{name}", nargs="+" if "list" in kind else None, type=read)
    given = [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), one) for one in arguments]
    options, unknown = made.parse_known_args(given)
    if unknown and not unknown[0].startswith("--"):
        raise ConfigError(f"{unknown[0]!r} belongs to no option; a YAML file is given with --config")
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--").replace("_", "-")
        near = get_close_matches(name, [one.replace("_", "-") for one in (*known, "config", "trust_code")], n=1)
        hint = f"did you mean --{near[0]}?" if near else f"'{command} --help-all' lists the options"
        raise ConfigError(f"there is no option --{name}; {hint}")
    return vars(options)


def _text(value: str) -> str | None:
    """Text is not parsed: "Question: {prompt}" would be a mapping in YAML."""
    return None if value == "null" else value


def _value(text: str) -> Any:
    """Other values read as they would in YAML: numbers, true, false, null."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _show_help(*, whole: bool, alone: bool) -> NoReturn:
    """Print the common options or, if `whole`, all that have an effect."""

    def command(**_: Any) -> None: ...

    consent = "Run the code that the file names as tools, metrics or formats. Code that a flag names needs no consent."
    options = [
        option("config", str | None, typer.Option(None, metavar="run.yaml", help="YAML file with any of the options.")),
        option("trust_code", bool, typer.Option(False, "--trust-code", help=consent)),
        option("help_all", bool, typer.Option(False, "--help-all", help="Show all options.")),
        *(option(name, str | None, shown) for name, shown in _options(whole=whole, alone=alone)),
    ]
    made = typer.Typer(add_completion=False)
    made.command(help=inspect.getdoc(tune if alone else train))(with_parameters(command, options))
    name = "collm tune" if alone else "collm train"
    typer.main.get_command(made).main(["--help"], prog_name=name, standalone_mode=False)
    raise typer.Exit


def _options(*, whole: bool, alone: bool) -> Iterator[tuple[str, Any]]:
    from transformers import TrainingArguments

    from collm.training.config import WITHOUT_EFFECT, CoLLMConfig

    says = {one.name: one.metadata.get("help", "").replace("%%", "%") for one in fields(TrainingArguments)}
    says |= descriptions(RunConfig) | descriptions(CoLLMConfig)
    groups = {title: names.split() for title, names in COMMON.items()}
    if whole:
        groups["More about models, data and calibration"] = [one.name for one in fields(RunConfig)]
        groups["More about training"] = list(inspect.get_annotations(CoLLMConfig))
        groups["Other options of transformers' Trainer"] = [one.name for one in fields(TrainingArguments)]
    known, left_out = _known(), {*WITHOUT_EFFECT, *(set(NOT_ALONE) - {"base"} if alone else ())}
    for title, names in groups.items():
        for one in [known.pop(name) for name in names if name in known and name not in left_out]:
            flag = "--" + ("model" if alone and one.name == "base" else one.name).replace("_", "-")
            how = {"metavar": metavar_of(one.type), "help": says[one.name][:1].upper() + says[one.name][1:]}
            yield one.name, typer.Option(_default(one), flag, **how, rich_help_panel=title)


def _default(one: Field[Any]) -> Any:
    """What the help shows as the default: ... for a required option, None for no value of its own."""
    default = one.default if one.default_factory is MISSING else one.default_factory()
    if default is MISSING or one.name == "output_dir":
        return ...
    if isinstance(default, bool):
        return str(default).lower()
    return None if default in (None, "") or isinstance(default, list) else str(default)
