"""`collm train`: options from a YAML file and from flags."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from collm.cli.options import descriptions

if TYPE_CHECKING:
    from collm.run import RunConfig
    from collm.training.config import CoLLMConfig

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(context: typer.Context) -> None:
    """Train a collaboration: compute scores, warm-start the head, train, calibrate. --help lists all options."""
    from collm import run
    from collm.cli.tables import calibration_table
    from collm.cli.terminal import Console, log_to_terminal

    log_to_terminal()
    config, args = parse(context.args)
    console = Console()
    console.print(f"training into {args.output_dir}; its run.yaml holds every option", markup=False)
    result = run.train_collaboration(config, args)
    run.leave()
    if config.calibrate:
        console.print(calibration_table(result.calibration))
    else:
        console.print(f"not calibrated: collm calibrate {result.directory}", markup=False)
    console.print(f'collm generate {result.directory} "..."', markup=False)


def parse(arguments: list[str]) -> tuple[RunConfig, CoLLMConfig]:
    """The YAML file's fields with the flags' over them.

    Raises:
        ConfigError: an unknown or missing key, a value that does not fit, or a function that the file names without
            consent to run it.
    """
    from collm.errors import ConfigError
    from collm.run import RunConfig
    from collm.run.options import functions_named
    from collm.tools.spec import not_trusted
    from collm.training.config import CoLLMConfig

    options = vars(_parser().parse_args(arguments))
    path, trusted = options.pop("config", None), options.pop("trust_code")
    merged = {**_read_yaml(path), **options}
    by_file = [name for name in functions_named(merged) if name not in functions_named(options)]
    if by_file and not trusted:
        raise ConfigError(not_trusted(path, by_file[0]))
    missing = [name for name in ("base", "assistant", "data", "output_dir") if name not in merged]
    if missing:
        raise ConfigError(f"nothing says {', '.join(missing)}; give each as a flag or in the YAML file of --config")
    known = {field.name: field for field in fields(RunConfig)}
    own = {name: _fitting(known[name], merged.pop(name)) for name in list(merged) if name in known}
    return RunConfig(**own), CoLLMConfig.from_dict(merged)


def _fitting(field: Any, value: Any) -> Any:
    """A value of a field of ours: a lone text may stand for a list of one, other values for no text."""
    from collm.errors import ConfigError

    if "str" in str(field.type) and not isinstance(value, str | list | None):
        raise ConfigError(f"{field.name} is {value!r}, expected text; put it in quotes")
    return [value] if "list" in str(field.type) and isinstance(value, str) else value


def _parser() -> argparse.ArgumentParser:
    from collm.run import RunConfig
    from collm.training.config import CoLLMConfig

    parser = argparse.ArgumentParser(
        prog="collm train",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a collaboration. Each option is a flag and a field of --config. A flag overrides the file.",
    )
    parser.add_argument("--config", metavar="run.yaml", help="YAML file with any of the options below")
    parser.add_argument(
        "--trust-code",
        action="store_true",
        default=False,
        help="run the code that the file names as tools, metrics or formats; code that a flag names needs no consent",
    )
    for title, config in (("what to train on what", RunConfig), ("how to train", CoLLMConfig)):
        group = parser.add_argument_group(title)
        says = descriptions(config)
        for field in fields(config):
            if field.init:
                kind = re.sub("<class '(.*)'>", r"\1", str(field.type))
                group.add_argument(
                    f"--{field.name}",
                    nargs="+" if "list" in kind else None,
                    type=_text if "str" in kind else _value,
                    metavar=kind,
                    help=says.get(field.name, "").replace("%", "%%"),
                )
    return parser


def _text(value: str) -> str | None:
    """Text is not parsed: "Question: {prompt}" would be a mapping in YAML."""
    return None if value == "null" else value


def _value(text: str) -> Any:
    """Other values read as they would in YAML: numbers, true, false, null."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_yaml(path: str | None) -> dict[str, Any]:
    from collm.errors import ConfigError
    from collm.untrusted import read_yaml

    if path is None:
        return {}
    try:
        content = read_yaml(Path(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"could not read {path}: {error}; expected a YAML file of fields") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected fields with values")
    return content
