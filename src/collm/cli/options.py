"""Options of commands, made from the fields of dataclasses, and those that several commands share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml

from collm.errors import ConfigError
from collm.untrusted import read_yaml

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.vllm.servers import Servers

CollaborationArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="The collaboration: a directory or a Hub repository.")
]


SPELLING: dict[str, Any] = {"token_normalize_func": lambda name: name.replace("_", "-")}
"""Settings of a command whose options may have underscores for hyphens."""
KINDS = {"Path": "PATH", "dict": "MAPPING", "str": "TEXT", "bool": "true|false", "float": "NUMBER", "int": "INTEGER"}
"""Part of a type -> what stands for its value in the help."""


@dataclass(frozen=True)
class Fields:
    """The fields of a dataclass that are options of a command. It stands in the annotation of a parameter.

    Attributes:
        shown: names of the options that --help shows.
        rare: names of the options that only --help-all shows.
        title: heading of the rare options.
        defaults: defaults that differ from those of the dataclass.
    """

    shown: str = ""
    rare: str = ""
    title: str = "Loading models"
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """Who writes the tokens.

    Attributes:
        threshold: the base keeps a token while its defer prob is at most this, by default the calibrated threshold.
        budget: use the best threshold whose deferral rate is within this limit with 95 %, instead of --threshold.
        price: defer where the head predicts a gain above this, in nats per token, instead of --threshold. The head must
            be trained with --objective gain. Several assistants may have a price each, in their order.
        policy: decision rule: threshold, joint (author drawn from its probability), mixture, confidence,
            product:weight=.., contrastive:alpha=..,beta=.., proxy:model=..,tuned=..,untuned=.., random:rate=..,
            single:writer=.., price:.., budget:budget=..,threshold=.. (of each completion),
            schedule:start=..,end=..,steps=..
        judge: which tokens of the base stand once an assistant has read them: exact, blend:weight=.., joint or
            regret:nats=..,budget=.., each with every=.., the largest number of tokens that wait. By default all stand.
        lookahead: maximum number of drafted tokens, by default 16, 0 for none. The output is the same.
    """

    threshold: float | None = None
    budget: float | None = None
    price: Sequence[float] | None = None
    policy: str = "threshold"
    judge: str | None = None
    lookahead: int | None = None


@dataclass(frozen=True)
class Loading:
    """How a collaboration is loaded.

    Attributes:
        device: device of the models: cpu, cuda, cuda:1 or auto; or one for each model: cuda:0,cuda:1.
        trust_code: run the functions that files name as tools, metrics or formats.
        assistants: where an assistant is on this machine: a directory, a GGUF file, a Hub id or a tool, in place of the
            artefact's; once for each assistant.
        dtype: data type of the models: float32, bfloat16 or float16, by default as saved.
        engine: where the models run: local (in this process), transformers (the same, but GGUF files are dequantized
            instead of run in llama.cpp), or vllm (on servers, the default with --servers).
        servers: addresses of the vLLM servers, such as http://localhost:8001/v1, the base's first. Or a YAML file with
            urls, on_failure (fail or base), timeout_s, retries, wait_s, api_key_env.
        eager: do not use CUDA graphs.
        cache_memory: KV cache memory on each device: a size such as 4GiB, or a share of the free memory such as 50%.
    """

    device: str | None = None
    trust_code: bool = False
    assistants: Sequence[str] | None = field(default=None, metadata={"flag": "--assistant"})
    dtype: str | None = None
    engine: Literal["local", "transformers", "vllm"] | None = None
    servers: str | None = field(default=None, metadata={"metavar": "URL,.. | FILE"})
    eager: bool = False
    cache_memory: str | None = None

    def load(self, path: str, servers: Servers | None = None) -> CoLLM:
        """Load a collaboration, whose models run on these servers or on those of the options."""
        from collm.collaboration import CoLLM
        from collm.vllm.servers import Servers

        if self.servers is not None:
            servers = Servers.named(self.servers)
        return CoLLM.from_pretrained(path, **{**vars(self), "servers": servers})


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its parameters that are dataclasses.

    An option has the name of its field without a unit: `time_limit_s` is --time-limit. Its help is what the docstring
    says of the field. The metadata of a field are further arguments of `typer.Option`; or `flag`, another name; or
    `file`: the value is the text of the file that is given. A dataclass or None is None if no option of it is given.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        options = _options(*(get_args(hint) if get_origin(hint) is Annotated else (hint,)))
        if options:
            groups[parameter.name] = hint, [one.name for one in options]
        parameters += options or [parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY)]
    if any(getattr(one.default, "hidden", False) for one in parameters):
        show_all = typer.Option(False, "--help-all", is_eager=True, callback=_help_all, help="Show all options.")
        parameters.append(option("help_all", bool, show_all))

    @wraps(function)
    def command(**given: Any) -> None:
        given.pop("help_all", None)
        for name, (kind, names) in groups.items():
            given[name] = collect(kind, {one: given.pop(one, None) for one in names})
        function(**given)

    return with_parameters(command, parameters)


def with_parameters(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """Let a function have these parameters for typer."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in parameters}
    return function


def option(name: str, kind: Any, shown: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=kind)


def collect(hint: Any, given: Mapping[str, Any]) -> Any:
    """A dataclass from the values of its options. Where a value is None, the field keeps its default."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    values = {
        name: dict(value) if isinstance(value, list) and isinstance(value[0], tuple) else value
        for name, value in given.items()
        if value is not None
    }
    if kinds := get_args(kind):
        return kinds[0](**values) if any(value is not False for value in values.values()) else None
    return kind(**values)


def read_fields(path: str, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """The fields of a YAML file of options."""
    try:
        content = read_yaml(Path(path), loader)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"could not read {path}: {error}; expected a YAML file of fields") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} contains {type(content).__name__}, expected fields with values")
    return content


def take_fields(context: typer.Context, path: str | None) -> str | None:
    """Callback of --config: options from a YAML file, where their names have underscores. Flags override it."""
    known = {one.opts[-1].lstrip("-").replace("-", "_"): one for one in context.command.params if not one.is_eager}
    taken: dict[str, Any] = {}
    for name, value in (read_fields(path, yaml.BaseLoader) if path is not None else {}).items():
        option: Any = known.get(name.replace("-", "_"))
        if option is None:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help-all lists the options"
            raise ConfigError(f"{path} has the field {name!r}, which is no option; {hint}")
        several = option.nargs == -1 or getattr(option, "multiple", False)
        values = value if several and isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise ConfigError(f"{name} in {path} is {value!r:.80}, expected {'texts' if several else 'one value'}")
        taken[option.name] = values if several else value
    context.default_map = taken
    return path


def descriptions(config: Any) -> dict[str, str]:
    """What the docstrings of a dataclass and its parents say of each field under `Attributes`."""
    found: dict[str, str] = {}
    for parent in reversed(config.__mro__):
        _, _, attributes = inspect.cleandoc(parent.__doc__ or "").partition("Attributes:\n")
        for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def metavar_of(kind: Any) -> str:
    """What stands for a value of this type in the help."""
    text = str(kind)
    one = next((metavar for part, metavar in KINDS.items() if part in text), "MAPPING")
    return f"{one} .." if "list[" in text else one


def given_options(context: typer.Context) -> dict[str, str]:
    """The parameters that the command line has, with their flags."""
    sources = {one: context.get_parameter_source(str(one.name)) for one in context.command.params}
    return {str(one.name): one.opts[-1] for one, source in sources.items() if source and source.name == "COMMANDLINE"}


def refuse(context: typer.Context, why: str, *, only: Container[str] | None = None, none: Container[str] = ()) -> None:
    """Refuse options that would have no effect: all but `only`, or those of `none`."""
    given = given_options(context).items()
    if flags := [flag for name, flag in given if name in none or (only is not None and name not in only)]:
        raise typer.BadParameter(f"{why}; leave {', '.join(flags)} out")


def _options(kind: Any, chosen: Fields | None = None) -> list[inspect.Parameter]:
    """The options of a dataclass, or of a dataclass or None; of another type none."""
    config = next((one for one in (kind, *get_args(kind)) if isinstance(one, type) and is_dataclass(one)), None)
    if config is None:
        return []
    known, hints, says = {one.name: one for one in fields(config)}, get_type_hints(config), descriptions(config)
    chosen = chosen or Fields(" ".join(known))
    rare = {"hidden": True, "rich_help_panel": chosen.title}
    groups = [(name, more) for names, more in ((chosen.shown, {}), (chosen.rare, rare)) for name in names.split()]
    return [
        _option(known[name], hints[name], chosen.defaults.get(name, known[name].default), says[name], more)
        for name, more in groups
    ]


def _option(one: Field[Any], hint: Any, default: Any, says: str, more: Mapping[str, Any]) -> inspect.Parameter:
    more = {**more, **one.metadata}
    name = more.pop("flag", "--" + re.sub("_(s|bytes)$", "", one.name).replace("_", "-"))
    says = says[0].upper() + says[1:]
    several = next((part for part in (hint, *get_args(hint)) if get_origin(part) in (Sequence, Mapping, list)), None)
    if more.pop("file", False):
        hint, says = str | None, f"{says} Read from FILE."
        more |= {"parser": _text_of, "metavar": "FILE"}
    elif several is not None:
        hint, default, says = list[get_args(several)[0]] | None, None, f"{says} Can be given several times."  # type: ignore[misc]
        if get_origin(several) is Mapping:
            more["parser"] = partial(_pair, get_args(several), more["metavar"])
    if "bool" not in str(hint) and "Literal" not in str(hint):
        more.setdefault("metavar", metavar_of(hint if several is None else get_args(several)[0]))
    return option(one.name, hint, typer.Option(... if default is MISSING else default, name, help=says, **more))


def _pair(kinds: Sequence[Callable[[str], Any]], metavar: str, text: str) -> tuple[Any, Any]:
    key, _, value = text.partition("=")
    try:
        return kinds[0](key), kinds[1](value)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not {metavar} ({error})") from error


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _help_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit
