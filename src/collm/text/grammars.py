"""Structured outputs: grammars that determine which tokens may follow a text."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.core.params import StructuredOutputs
from collm.errors import ConfigError, MismatchError, MissingExtra, RequestError
from collm.text import isolated
from collm.text.text_tokenizer import bytes_of_tokens
from collm.text.token_ids import common_prefix

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LIMITS = {"bytes": 256 << 10, "rules": 2000, "alternatives": 20_000, "references": 1000}
"""Bounds of the source of a stranger's grammar."""
COMPILE_S = 4.0
"""Time limit for compiling a stranger's grammar, in seconds."""
COMPILE_BYTES = 1 << 30
"""Memory limit for compiling a stranger's grammar, where the system enforces it."""
_PARSER_LIMITS: dict[str, Any] = {"max_items_in_row": 1000, "step_max_items": 20_000}
"""Half of llguidance's limits, with which a token of an ambiguous grammar took two seconds, and now a tenth of one."""
_MAX_CACHED = 64
"""Number of compiled grammars to cache."""
_MAX_CACHED_BYTES = 1 << 20
"""Largest total size of the sources of cached grammars, which take some hundred times as much memory."""
_WORD_BITS = 32
_RULE = re.compile(r"^\s*[?!]?[\w-]+[^:\n\"/]*:", re.MULTILINE)


class Grammar:
    """The state of a text in its grammar, after `token_ids`.

    Args:
        names_tokens: whether the grammar may name tokens, as in <[5]> and <eos>.
    """

    def __init__(self, matcher: LLMatcher, *, names_tokens: bool = False) -> None:
        self.token_ids: list[int] = []
        self._initial = matcher  # compiled, and shared by texts
        self._matcher = matcher.deep_copy()
        self._names_tokens = names_tokens

    def allows(self, token_ids: Sequence[int]) -> int:
        """Number of leading tokens of `token_ids` that may follow."""
        return self._matcher.validate_tokens(list(token_ids))

    @property
    def complete(self) -> bool:
        """Whether only the end of the text may follow."""
        return self._matcher.is_stopped()

    def go_to(self, token_ids: Sequence[int]) -> None:
        """Move to the state after `token_ids`, which the grammar must allow, by consuming and rolling back tokens.

        Raises:
            RequestError: the grammar has become too complex.
        """
        same = common_prefix(self.token_ids, token_ids)
        if same < len(self.token_ids) and self._names_tokens:
            self._matcher = self._initial.deep_copy()  # its rollback miscounts the bytes of tokens named by the grammar
            same = 0
        elif same < len(self.token_ids):
            self._matcher.rollback(len(self.token_ids) - same)
        if same < len(token_ids):
            self._matcher.consume_tokens(list(token_ids[same:]))
        self.token_ids = list(token_ids)
        self._check()

    def fill(self, bits: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Write the allowed next tokens into a row made by `bit_row`. Raises as `go_to`."""
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            what = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"the grammar cannot be enforced: {what}; use a simpler one")


def bit_row(vocab_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A row of one bit per token, all zero, shape (V / 32 rounded up,)."""
    return np.zeros(-(-vocab_size // _WORD_BITS), dtype=np.int32)


def forbidden(bits: np.ndarray[Any, np.dtype[np.int32]], vocab_size: int) -> Tensor:
    """Tokens whose bit is 0, bool, shape (count, V)."""
    return torch.from_numpy(np.unpackbits(bits.view(np.uint8), axis=-1, count=vocab_size, bitorder="little") == 0)


class Grammars:
    """Compiles structured output constraints for one tokenizer, byte-level or with byte fallback. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self._lock, self._tokenizer_lock = threading.Lock(), threading.Lock()
        self._llg_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, structured: StructuredOutputs, *, trusted: bool = True) -> Grammar:
        """Compile a constraint and return its initial state.

        Args:
            trusted: whether it may crash this process. One of a stranger is bounded by `LIMITS`, and compiled first in
                another process.

        Raises:
            RequestError: the schema, regular expression or grammar is invalid or too large.
            ConfigError: the tokenizer is not supported, or has no EOS.
            MissingExtra: llguidance is not installed.
        """
        if not trusted:
            _check_size(structured)
        source = _source(structured)
        with self._lock:
            matcher = self._compiled.get(source)
        if matcher is None:
            if not trusted:
                self._rehearse(source)
            matcher = self._matcher(source)  # may be slow, so do not hold the lock
        with self._lock:
            self._compiled[source] = matcher
            self._compiled.move_to_end(source)
            while len(self._compiled) > _MAX_CACHED or sum(map(len, self._compiled)) > _MAX_CACHED_BYTES:
                self._compiled.popitem(last=False)
            return Grammar(matcher, names_tokens="<" in (structured.grammar or ""))

    def _rehearse(self, source: str) -> None:
        """Compile a grammar in a process that may die, with a vocabulary of bytes and special tokens."""
        special = self._tokenizer.added_tokens_decoder
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        small = Tokenizer(BPE({character: place for place, character in enumerate(alphabet)}, []))
        small.pre_tokenizer, small.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        small.add_tokens(list(special.values()))
        grammar = {
            "source": source,
            "tokenizer": small.to_str(),
            "vocab_size": max(self._vocab_size, len(alphabet) + len(special)),
        }
        try:
            isolated.run("compile", grammar, seconds=COMPILE_S, memory_bytes=COMPILE_BYTES)
        except ValueError as error:
            raise RequestError(
                f"structured_outputs cannot be compiled within {COMPILE_S:g} s, {COMPILE_BYTES >> 20} MiB and a stack "
                f"of {isolated.STACK_BYTES >> 20} MiB; use a simpler one"
            ) from error

    def _matcher(self, source: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

        with self._tokenizer_lock:
            if self._llg_tokenizer is None:
                vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer, sorted(self.eos_ids)))
                self._llg_tokenizer = LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=sorted(self.eos_ids))
        limits = LLParserLimits(**_PARSER_LIMITS)
        matcher = LLMatcher(self._llg_tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"structured_outputs cannot be compiled: {' '.join(matcher.get_error().split()):.200}")
        return matcher


class _Vocabulary:
    """A tokenizer in the form of llguidance's `TokenizerWrapper`.

    llguidance's own conversion takes every added token for a special one, which is no text. Here text contains those
    that are not special, such as Qwen's <tool_call>, and the names of special ones are spelled with other tokens.
    """

    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> None:
        if not eos_ids:
            raise ConfigError("structured_outputs require an EOS token, but the tokenizer has none; set one")
        try:
            spelled = bytes_of_tokens(tokenizer, "the base")
        except MismatchError as error:
            raise ConfigError(
                "structured_outputs require a tokenizer whose tokens are bytes of text, such as byte-level BPE"
            ) from error
        names = tokenizer.convert_ids_to_tokens(range(len(spelled)))
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = [token_id for token_id, one in enumerate(spelled) if one is None]
        self.tokens = [str(name).encode() if one is None else one for one, name in zip(spelled, names, strict=True)]
        self._byte_ids = {one: token_id for token_id, one in enumerate(spelled) if one is not None and len(one) == 1}
        self._backend = copy(cast(Any, tokenizer).backend_tokenizer)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        """Tokenise a text that follows another."""
        for before in ("", "\n", "."):  # a tokenizer may add a space before the first word
            token_ids = self._backend.encode(before + text, add_special_tokens=False).ids
            if before:
                token_ids = token_ids[len(self._backend.encode(before, add_special_tokens=False).ids) :]
            if b"".join(self.tokens[token_id] for token_id in token_ids) == text.encode():
                return cast("list[int]", token_ids)
        return [self._byte_ids[bytes([byte])] for byte in text.encode()]  # one that normalises this text


def _check_size(structured: StructuredOutputs) -> None:
    """Raise a RequestError for a constraint that exceeds `LIMITS`."""
    parts: Sequence[object] = structured.choice or [structured.regex or structured.grammar or structured.json or ""]
    try:
        source = "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts)
    except RecursionError as error:
        raise RequestError("structured_outputs.json is nested too deeply; use a simpler schema") from error
    found = {
        "bytes": len(source.encode()),
        "rules": len(_RULE.findall(source)) if structured.grammar else 0,
        "alternatives": len(structured.choice or ()) + source.count("|"),
        "references": source.count("$ref"),
    }
    for what, most in LIMITS.items():
        if found[what] > most:
            raise RequestError(
                f"structured_outputs has {found[what]} {what}, expected at most {most}; use a smaller one"
            )


def _source(structured: StructuredOutputs) -> str:
    """Convert a constraint to llguidance's format."""
    try:
        from llguidance import LLMatcher, gbnf_to_lark
    except ImportError as error:
        raise MissingExtra("llguidance", "structured") from error
    if structured.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"})
    if structured.regex is not None:
        return LLMatcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        choices = " | ".join(json.dumps(one, ensure_ascii=False) for one in structured.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")  # a terminal may be larger
    if structured.grammar is not None:
        lark = structured.grammar
        try:
            lark = gbnf_to_lark.gbnf_to_lark(lark) if "::=" in lark else lark
        except Exception as error:  # the parser may raise anything on invalid input
            message = " ".join(str(error).split())
            raise RequestError(f"structured_outputs.grammar is not a GBNF grammar: {message:.200}") from error
        return LLMatcher.grammar_from_lark(lark)
    try:
        schema = structured.json if isinstance(structured.json, str) else json.dumps(structured.json)
        json.loads(schema)
        return LLMatcher.grammar_from_json_schema(schema)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is not JSON, expected a JSON schema ({error})") from error
