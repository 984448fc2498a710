"""Options of commands that generate text: sampling parameters and structured outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collm.core.params import StructuredOutputs

TemperatureOption = Annotated[
    float | None,
    typer.Option(help="0 is greedy. Default: 1 with --top-p, --top-k or --min-p, otherwise 0."),
]
TopPOption = Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")]
TopKOption = Annotated[int, typer.Option(help="Sample from the k most probable tokens, 0 for all.")]
MinPOption = Annotated[float, typer.Option(help="Drop tokens below this share of the highest probability.")]
PresenceOption = Annotated[float, typer.Option(help="Lower the logits of generated tokens, -2 to 2.")]
FrequencyOption = Annotated[float, typer.Option(help="Lower the logits of generated tokens by their count, -2 to 2.")]
RepetitionOption = Annotated[
    float, typer.Option(help="Make tokens of the prompt and the completion less likely. 1 has no effect.")
]
LogitBiasOption = Annotated[
    list[str] | None, typer.Option(metavar="ID=BIAS", help="Add a bias to a token's logit. Can be given several times.")
]
BadWordsOption = Annotated[
    list[str] | None, typer.Option(help="Text that must not be generated. Can be given several times.")
]
MinTokensOption = Annotated[int, typer.Option(help="Minimum number of tokens before the completion can end.")]
StopTokenIdsOption = Annotated[
    list[int] | None, typer.Option(help="Token id that ends the completion. Can be given several times.")
]
IgnoreEosOption = Annotated[bool, typer.Option("--ignore-eos", help="Continue after EOS.")]
IncludeStopOption = Annotated[
    bool, typer.Option("--include-stop-str-in-output", help="Include the stop text in the output.")
]
JsonSchemaOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The output is JSON that satisfies this schema.")
]
JsonObjectOption = Annotated[bool, typer.Option("--json-object", help="The output is a JSON object.")]
RegexOption = Annotated[str | None, typer.Option(help="The output matches this regular expression.")]
ChoiceOption = Annotated[
    list[str] | None, typer.Option(help="The output is one of these texts. Can be given several times.")
]
GrammarOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The output follows this grammar, in Lark (llguidance) or GBNF.")
]


def logit_bias(entries: Sequence[str] | None) -> dict[int, float]:
    """Parse "ID=BIAS" entries.

    Raises:
        ConfigError: an entry has another form.
    """
    from collm.errors import ConfigError

    found = {}
    for entry in entries or ():
        token_id, _, bias = entry.partition("=")
        try:
            found[int(token_id)] = float(bias)
        except ValueError as error:
            raise ConfigError(f"--logit-bias is {entry!r}, expected a token id and a number, as 13=-2.5") from error
    return found


def structured_outputs(
    json_schema: Path | None, json_object: bool, regex: str | None, choice: Sequence[str] | None, grammar: Path | None
) -> StructuredOutputs | None:
    """The constraint of the given options; None if none is given.

    Raises:
        ConfigError: several options are given, or a file cannot be read.
    """
    from collm.core.params import StructuredOutputs

    if json_schema is None and grammar is None and regex is None and not choice and not json_object:
        return None
    return StructuredOutputs(
        json=None if json_schema is None else _text_of(json_schema),
        json_object=json_object,
        regex=regex,
        choice=choice or None,
        grammar=None if grammar is None else _text_of(grammar),
    )


def _text_of(path: Path) -> str:
    from collm.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
