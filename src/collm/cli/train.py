"""`collm train`: options from a YAML file and from flags."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml

from collm.cli.options import descriptions
from collm.errors import ConfigError
from collm.run.options import RunConfig, functions_named
from collm.tools.spec import not_trusted
from collm.untrusted import read_yaml

if TYPE_CHECKING:
    from collm.training.config import CoLLMConfig


def train(context: typer.Context) -> None:
    """Train a collaboration: compute scores, warm-start the head, train, calibrate. --help lists all options."""
    from collm.cli.tables import calibration_table
    from collm.cli.terminal import Console, log_to_terminal
    from collm.run.train import leave, train_collaboration

    log_to_terminal()
    config, args = parse(context.args)
    console = Console()
    console.print(f"training into {args.output_dir}; its run.yaml holds every option", markup=False)
    result = train_collaboration(config, args)
    leave()
    if config.calibrate:
        console.print(calibration_table(result.calibration))
    else:
        console.print(f"not calibrated: collm calibrate {result.directory}", markup=False)
    console.print(f'collm generate {result.directory} "..."', markup=False)


def parse(arguments: list[str]) -> tuple[RunConfig, CoLLMConfig]:
    """The YAML file's fields with the flags' over them. Functions that the file names need consent."""
    from collm.training.config import CoLLMConfig

    options = vars(parser().parse_args(arguments))
    path, trusted = options.pop("config", None), options.pop("trust_code")
    merged = {**_read(path), **options}
    for name in functions_named(merged):
        if not trusted and name not in functions_named(options):
            raise ConfigError(not_trusted(path, name))
    missing = [name for name in ("base", "assistant", "data", "output_dir") if name not in merged]
    if missing:
        raise ConfigError(f"nothing says {', '.join(missing)}; give each as a flag or in the YAML file of --config")
    own = {}
    for field in fields(RunConfig):
        if field.name in merged:
            own[field.name] = value = merged.pop(field.name)
            if "str" in str(field.type) and not isinstance(value, str | list | None):
                raise ConfigError(f"{field.name} is {value!r}, expected text; put it in quotes")
            if "list" in str(field.type) and isinstance(value, str):
                own[field.name] = [value]
    return RunConfig(**own), CoLLMConfig.from_dict(merged)


def parser() -> argparse.ArgumentParser:
    """The flags, which are the fields of a run's options and those of training."""
    from collm.training.config import CoLLMConfig

    about = "Train a collaboration. Each option is a flag and a field of --config. A flag overrides the file."
    defaults: dict[str, Any] = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    made = argparse.ArgumentParser("collm train", description=about, **defaults)
    made.add_argument("--config", metavar="run.yaml", help="YAML file with any of the options below")
    says = "run the code that the file names as tools, metrics or formats; code that a flag names needs no consent"
    made.add_argument("--trust-code", action="store_true", default=False, help=says)
    for title, config in (("what to train on what", RunConfig), ("how to train", CoLLMConfig)):
        group, texts = made.add_argument_group(title), descriptions(config)
        flags = [one for one in fields(config) if one.init]
        for field in sorted(flags, key=lambda one: one.default is not one.default_factory):  # required ones first
            kind = re.sub("<class '(.*)'>", r"\1", str(field.type))
            group.add_argument(
                f"--{field.name}",
                nargs="+" if "list" in kind else None,
                type=_text if "str" in kind else _value,
                metavar=kind,
                help=texts.get(field.name, "").replace("%", "%%"),
            )
    return made


def _text(value: str) -> str | None:
    """Text is not parsed: "Question: {prompt}" would be a mapping in YAML."""
    return None if value == "null" else value


def _value(text: str) -> Any:
    """Other values read as they would in YAML: numbers, true, false, null."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read(path: str | None) -> dict[str, Any]:
    try:
        content = {} if path is None else read_yaml(Path(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"could not read {path}: {error}; expected a YAML file of fields") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected fields with values")
    return content
