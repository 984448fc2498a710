"""Grammars over a tokenizer's tokens: which of them may come next in a text that must have a given form."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.core.params import StructuredOutputs
from collm.errors import ConfigError, MissingExtra, RequestError
from collm.models.runner import common_prefix

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64
"""Compiled grammars that are kept for further requests."""
_WORD_BITS = 32


class Grammar:
    """How far a text has come in its grammar. Tokens are taken and given back; nothing else changes it.

    Attributes:
        token_ids: the tokens that were taken.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.token_ids: list[int] = []
        self._matcher = matcher

    def allows(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow."""
        return self._matcher.validate_tokens(list(token_ids))

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def go_to(self, token_ids: Sequence[int]) -> None:
        """Take and give back tokens until these, which the grammar allows, were taken.

        Raises:
            RequestError: the grammar has become too complex to follow.
        """
        same = common_prefix(self.token_ids, token_ids)
        if same < len(self.token_ids):
            self._matcher.rollback(len(self.token_ids) - same)
            del self.token_ids[same:]
        if same < len(token_ids):
            self._matcher.consume_tokens(list(token_ids[same:]))
            self.token_ids += token_ids[same:]
        self._check()

    def fill(self, bits: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Write which tokens may come next into a row made by `bit_row`.

        Raises:
            RequestError: the grammar has become too complex to follow.
        """
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            what = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"the text cannot be kept to its grammar: {what}; use a simpler one")


def bit_row(vocab_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """One bit for each token, all zero, shape (V / 32 rounded up,)."""
    return np.zeros(-(-vocab_size // _WORD_BITS), dtype=np.int32)


def forbidden(bits: np.ndarray[Any, np.dtype[np.int32]], vocab_size: int) -> Tensor:
    """The tokens whose bit is 0, bool, shape (count, V)."""
    return torch.from_numpy(np.unpackbits(bits.view(np.uint8), axis=-1, count=vocab_size, bitorder="little") == 0)


class Grammars:
    """Compiles what texts must be, over one tokenizer; from any thread.

    Args:
        tokenizer: of all models, byte-level or with byte fallback.
        vocab_size: V, of the models.
        eos_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._over: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, structured: StructuredOutputs) -> Grammar:
        """The grammar, at the beginning of a text.

        Raises:
            RequestError: what came is no schema, regular expression or grammar, or one that is too large.
            ConfigError: the tokenizer's tokens cannot be matched with text, or nothing ends a text.
            MissingExtra: llguidance is not installed.
        """
        source = _source(structured)
        with self._lock:
            matcher = self._compiled.get(source)
        if matcher is None:
            matcher = self._matcher(source)  # may take long, and others need not wait for it
        with self._lock:
            self._compiled[source] = matcher
            self._compiled.move_to_end(source)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return Grammar(matcher.deep_copy())

    def _matcher(self, source: str) -> LLMatcher:
        llguidance = _llguidance()
        with self._making:
            if self._over is None:
                self._over = self._tokens()
        matcher = llguidance.LLMatcher(self._over, source, log_level=0)
        if matcher.is_error():
            raise RequestError(f"structured_outputs cannot be followed: {_shortened(matcher.get_error())}")
        return cast("LLMatcher", matcher)

    def _tokens(self) -> LLTokenizer:
        from llguidance import hf

        if not self._eos_ids:
            raise ConfigError("structured_outputs need a token that ends a text, and the tokenizer has no EOS; set one")
        try:
            return hf.from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_ids)
        except Exception as error:  # whatever its reader of tokenizers raises
            raise ConfigError(
                "structured_outputs need a tokenizer whose tokens are bytes of text, as byte-level BPE: "
                f"{str(error).partition(':')[0]:.100}"
            ) from error


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtra("llguidance", "structured") from error
    return llguidance


def _source(structured: StructuredOutputs) -> str:
    """The grammar as llguidance reads it."""
    matcher = _llguidance().LLMatcher
    if structured.json_object:
        return cast(str, matcher.grammar_from_json_schema({"type": "object"}))
    if structured.regex is not None:
        return cast(str, matcher.grammar_from_regex(structured.regex))
    if structured.choice is not None:
        choices = " | ".join(json.dumps(one, ensure_ascii=False) for one in structured.choice)
        return cast(str, matcher.grammar_from_lark(f"start: {choices}"))
    if structured.grammar is not None:
        return cast(str, matcher.grammar_from_lark(_lark(structured.grammar)))
    schema = structured.json if isinstance(structured.json, str) else json.dumps(structured.json)
    try:
        json.loads(schema)
        return cast(str, matcher.grammar_from_json_schema(schema))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is {schema!r:.80}, expected a JSON schema ({error})") from error


def _lark(grammar: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance import gbnf_to_lark

    try:
        return gbnf_to_lark.gbnf_to_lark(grammar)
    except Exception as error:  # a parser of a few hundred lines, fed with anything
        raise RequestError(f"structured_outputs.grammar is no GBNF grammar: {_shortened(str(error))}") from error


def _shortened(message: str) -> str:
    first = " ".join(message.split())
    return first if len(first) <= 200 else f"{first[:200]}.."
