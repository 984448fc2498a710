"""Compatibility checks of models and tokenizers, made before the first token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError, MismatchError
from collm.text.template import PromptTemplate, tokenize

ACCEPTABLE = ("special_tokens", "eos", "chat_template")
"""Differences that a user may accept by name. A different vocabulary is not among them."""

PROBE = "The 3 quick-brown foxes\n\tpaid €1,234.50  (c'est ça) 日本語 🦊 {x: 'y'} ÀÉ"


@dataclass(frozen=True)
class TokenizerIdentity:
    """The properties that two tokenizers must share to be interchangeable.

    Attributes:
        tokens: token id -> token.
        special_tokens: role (bos, eos, unk, ...) -> token, without padding, which no model reads.
        chat_template: None if the tokenizer has none; as JSON if it has another for tools.
        probe_ids: token ids of a fixed text, which depend on merges and normalisation.
    """

    tokens: dict[int, str]
    special_tokens: dict[str, str]
    chat_template: str | None
    probe_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerIdentity:
        special = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
        template = PromptTemplate.of(tokenizer)
        return cls(
            {token_id: token for token, token_id in tokenizer.get_vocab().items()},
            special,
            template.chat if template.tool_chat is None else json.dumps([template.chat, template.tool_chat]),
            tuple(tokenize(tokenizer, PROBE, special=False)),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self.tokens) + 1

    @property
    def hash(self) -> str:
        """SHA-256 of vocabulary, special tokens and probe."""
        return _sha256(json.dumps([sorted(self.tokens.items()), sorted(self.special_tokens.items()), self.probe_ids]))

    @property
    def chat_template_hash(self) -> str | None:
        return None if self.chat_template is None else _sha256(self.chat_template)


def _sha256(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def check_accepted(accept: Collection[str]) -> None:
    """Raise a ConfigError if a name is not in `ACCEPTABLE`."""
    unknown = sorted(set(accept) - set(ACCEPTABLE))
    if unknown:
        raise ConfigError(
            f"cannot accept a difference in {', '.join(unknown)}; expected one of {', '.join(ACCEPTABLE)}"
        )


def token_difference(base: TokenizerIdentity, other: TokenizerIdentity, name: str) -> str | None:
    """Describe why an assistant's token ids differ from the base's; None if they do not."""
    for token_id in sorted(base.tokens.keys() | other.tokens.keys()):
        ours, theirs = base.tokens.get(token_id), other.tokens.get(token_id)
        if ours != theirs:
            return (
                f"the vocabulary of {name} differs from the base's: token {token_id} is {_shown(theirs)} there and "
                f"{_shown(ours)} in the base ({len(other.tokens)} and {len(base.tokens)} tokens)"
            )
    if base.probe_ids != other.probe_ids:
        return f"{name} has the base's vocabulary but splits text into other tokens"
    return None


def check_tokenizers(
    base: TokenizerIdentity, other: TokenizerIdentity, name: str, *, accept: Collection[str] = ()
) -> None:
    """Raise a MismatchError that names the first token, special token or template in which an assistant differs."""
    difference = token_difference(base, other, name)
    if difference is not None:
        raise MismatchError(f"{difference}; use models that share one tokenizer")
    ours, theirs = base.special_tokens, other.special_tokens
    if ours != theirs and "special_tokens" not in accept:
        role = next(role for role in sorted({*ours, *theirs}) if ours.get(role) != theirs.get(role))
        raise MismatchError(
            f"the {role} of {name} is {_shown(theirs.get(role))}, but {_shown(ours.get(role))} in the base; "
            f"{_how_to_accept('special_tokens')}"
        )
    templates = {base.chat_template, other.chat_template} - {None}
    if len(templates) > 1 and "chat_template" not in accept:
        raise MismatchError(
            f"the chat template of {name} differs from the base's, so it was trained on another chat format; "
            f"{_how_to_accept('chat_template')}, and both will use the base's"
        )


def check_eos(eos_sets: Sequence[tuple[str, frozenset[int]]], *, accept: Collection[str] = ()) -> frozenset[int]:
    """The tokens that end a text, from pairs of model name and EOS token ids, the base first.

    Raises:
        MismatchError: sets that are not empty differ, and "eos" is not accepted.
    """
    base_name, base_eos = eos_sets[0]
    for name, eos in eos_sets[1:]:
        if eos and base_eos and eos != base_eos and "eos" not in accept:
            raise MismatchError(
                f"{name} ends texts with token ids {sorted(eos)}, {base_name} with {sorted(base_eos)}; "
                f"{_how_to_accept('eos')}, and any of them ends a text"
            )
    return frozenset[int]().union(*(eos for _, eos in eos_sets))


def _shown(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def _how_to_accept(what: str) -> str:
    return f"if that is intended, accept it: --accept_differences {what} (accept_differences: [{what}] in YAML)"
