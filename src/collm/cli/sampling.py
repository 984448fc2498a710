"""Options of commands that generate text: how its tokens are drawn, and what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collm.core.params import StructuredOutputs

TemperatureOption = Annotated[
    float | None,
    typer.Option(help="0 is greedy. Default: 0, or 1 where --top-p, --top-k or --min-p ask for sampling."),
]
TopPOption = Annotated[float, typer.Option(help="Keep the smallest set of tokens with this share.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")]
MinPOption = Annotated[float, typer.Option(help="Keep tokens at least this probable, relative to the most probable.")]
PresenceOption = Annotated[float, typer.Option(help="Lower the logits of tokens that were generated, -2 to 2.")]
FrequencyOption = Annotated[float, typer.Option(help="Likewise, for each time they were generated, -2 to 2.")]
RepetitionOption = Annotated[float, typer.Option(help="Make tokens of the prompt and the text less likely; 1: don't.")]
LogitBiasOption = Annotated[
    list[str] | None, typer.Option(metavar="ID=BIAS", help="Add to a token's logit; may be repeated.")
]
BadWordsOption = Annotated[list[str] | None, typer.Option(help="Text not to be written; may be repeated.")]
MinTokensOption = Annotated[int, typer.Option(help="Let nothing end the text before so many tokens.")]
StopTokenIdsOption = Annotated[list[int] | None, typer.Option(help="Token that ends the text; may be repeated.")]
IgnoreEosOption = Annotated[bool, typer.Option("--ignore-eos", help="Go on after EOS.")]
IncludeStopOption = Annotated[
    bool, typer.Option("--include-stop-str-in-output", help="Keep what ended the text in it.")
]
JsonSchemaOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The answer is JSON that satisfies this schema.")
]
JsonObjectOption = Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")]
RegexOption = Annotated[str | None, typer.Option(help="The answer matches this regular expression.")]
ChoiceOption = Annotated[list[str] | None, typer.Option(help="The answer is one of these; may be repeated.")]
GrammarOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The answer follows this grammar, in Lark (llguidance) or GBNF.")
]


def logit_bias(entries: Sequence[str] | None) -> dict[int, float]:
    """From "ID=BIAS".

    Raises:
        ConfigError: an entry of another form.
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
    """What the text must be; None where nothing says.

    Raises:
        ConfigError: several came, or a file cannot be read.
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
