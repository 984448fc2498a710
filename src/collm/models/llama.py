"""GGUF files in llama.cpp, with their own quantized weights (package llama-cpp-python).

llama.cpp aborts the process when it is misused, so every call is checked before it is made.
"""

from __future__ import annotations

import ctypes
import io
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.gguf import read_gguf_metadata

from collm.errors import LoadError, MismatchError, MissingExtra, ModelFailure, UnsupportedModel

MAX_BATCH = 512
"""Largest number of tokens of one call of llama.cpp."""
MOST_SEQUENCES = 64
MAX_RENAMED = 0.01
"""Largest share of tokens that a tokenizer may name otherwise than the file."""
CACHE_TYPES = {"float32": 0, "float16": 1}
"""llama.cpp's numbers of the types of keys and values."""


def llama_installed() -> bool:
    """Whether GGUF files can run in llama.cpp here."""
    return find_spec("llama_cpp") is not None


class LlamaToken(NamedTuple):
    """A token of a call: its sequence, its position there, and whether its output is wanted."""

    sequence: int
    position: int
    token_id: int
    wanted: bool


class LlamaModel:
    """The weights of a GGUF file, which several contexts may use.

    Args:
        file: the GGUF file.
        name: name in error messages and usage counts.
        vocab_size: keep only logits of token ids below this; None keeps all.
        device: "cpu", or None for all devices that llama.cpp was built for (CUDA, Metal, Vulkan).

    Attributes:
        hidden_size: H.
        padded_vocab_size: number of tokens in the file.
        vocab_size: V, the number of logits.
        max_length: context length that the model was trained for.
        eos_token_ids: always empty, as the file has only the tokenizer's EOS.
        cache_type: "float32" for a file with float32 weights only, otherwise "float16".
        bytes_per_position: memory of one position's keys and values.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        LoadError: llama.cpp refuses the file.
        UnsupportedModel: the model has a state that cannot be rolled back, or is no decoder.
    """

    device = input_device = torch.device("cpu")  # of its outputs
    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, file: Path, *, name: str, vocab_size: int | None = None, device: str | None = None) -> None:
        self.file = file
        self.name = name
        self.library = llama = _library(file)
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0 if device == "cpu" else settings.n_gpu_layers
        with _log() as log:
            pointer = llama.llama_model_load_from_file(str(file).encode(), settings)
        if not pointer:
            advice = "download it again, update llama-cpp-python, or choose --engine transformers"
            raise LoadError(f"llama.cpp cannot load {str(file)!r}: {_reason(log)}; {advice}")
        self.weights = pointer
        self._owner = _Owner(llama.llama_model_free, pointer)
        for kind in ("recurrent", "hybrid", "diffusion"):
            if getattr(llama, f"llama_model_is_{kind}")(pointer):
                reason = f"is a {kind} model, whose state cannot be rolled back to any token"
                raise UnsupportedModel(f"{str(file)!r} {reason}; use a Transformer with attention in all layers")
        if llama.llama_model_has_encoder(pointer) or not llama.llama_model_has_decoder(pointer):
            raise UnsupportedModel(f"{str(file)!r} has an encoder; expected a causal language model")
        self.padded_vocab_size = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(pointer)))
        self.vocab_size = min(vocab_size or self.padded_vocab_size, self.padded_vocab_size)
        self.hidden_size = int(llama.llama_model_n_embd(pointer))
        self.max_length: int | None = int(llama.llama_model_n_ctx_train(pointer)) or None
        heads = max(int(llama.llama_model_n_head_kv(pointer)), 1)
        architecture = self._metadata("general.architecture")
        widths = [int(self._metadata(f"{architecture}.attention.{kind}_length") or 0) for kind in ("key", "value")]
        default = self.hidden_size // max(int(llama.llama_model_n_head(pointer)), 1)
        self.cache_type = "float16" if llama.llama_model_ftype(pointer) else "float32"
        size = getattr(torch, self.cache_type).itemsize
        self.bytes_per_position = size * llama.llama_model_n_layer(pointer) * heads * sum(w or default for w in widths)

    @property
    def weights_per_token(self) -> int:
        """Number of weights in matrix products per token: all but the input embedding, with inactive experts."""
        tied = "output.weight" not in read_gguf_metadata(str(self.file))[1]
        embedding = self.padded_vocab_size * self.hidden_size
        return int(self.library.llama_model_n_params(self.weights)) - (0 if tied else embedding)

    @property
    def module(self) -> LlamaModel:
        """What a collaboration takes as a member, as `LanguageModel.module`."""
        return self

    def named(self, name: str, vocab_size: int | None) -> LlamaModel:
        """The same weights under another name, with logits of token ids below `vocab_size`."""
        model = copy(self)
        model.name, model.vocab_size = name, min(vocab_size or self.padded_vocab_size, self.padded_vocab_size)
        return model

    def check_tokens(self, texts: Sequence[str | None]) -> None:
        """Check that a tokenizer's tokens, by token id, are those of the file, but for a few that may be renamed.

        None stands for an unused id.
        """
        llama, vocab = self.library, self.library.llama_model_get_vocab(self.weights)
        owns = (llama.llama_vocab_get_text(vocab, at).decode("utf-8", "replace") for at in range(len(texts)))
        pairs = enumerate(zip(texts, owns, strict=True))
        different = [(token_id, text, own) for token_id, (text, own) in pairs if text not in (None, own)]
        if len(different) > MAX_RENAMED * len(texts):
            token_id, text, own = different[0]
            raise MismatchError(
                f"{len(different):,} of {len(texts):,} tokens of {self.name} are others in {self.file.name} than in "
                f"the tokenizer, such as {token_id}: {own!r}, not {text!r}; use the tokenizer that belongs to the file"
            )

    def _metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        size = self.library.llama_model_meta_val_str(self.weights, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size >= 0 else ""


class LlamaContext:
    """Sequences of one model with their keys and values, all in one cache.

    Args:
        positions: number of positions that all sequences together can hold.
        sequences: number of sequences.

    Raises:
        UnsupportedModel: llama.cpp cannot create the context, for example because it needs too much memory.
    """

    def __init__(self, model: LlamaModel, *, positions: int, sequences: int = 1) -> None:
        self.model = model
        self.sequences = sequences
        self._llama = llama = model.library
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = positions, sequences
        settings.n_batch = settings.n_ubatch = MAX_BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.kv_unified = True  # otherwise copying a prefix aborts the process
        settings.swa_full = True  # otherwise rolling back beyond a sliding window is impossible
        settings.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        settings.type_k = settings.type_v = CACHE_TYPES[model.cache_type]
        if model.cache_type == "float32":
            settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in 16 bits
        with _log() as log:
            self._context = llama.llama_init_from_model(model.weights, settings)
        if not self._context:
            what = f"llama.cpp cannot create a context of {positions:,} tokens for {model.name}"
            raise UnsupportedModel(f"{what}: {_reason(log)}; lower cache_memory")
        self._owner = _Owner(llama.llama_free, self._context, model._owner)
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(MAX_BATCH, 0, 1)
        weakref.finalize(self, llama.llama_batch_free, self._batch)

    def decode(self, tokens: Sequence[LlamaToken], *, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """Read at most `MAX_BATCH` tokens, each at the end of its sequence.

        Args:
            hidden: also return hidden states. llama.cpp then computes the logits of every token.

        Returns:
            Logits (R, V) and, if asked for, hidden states after the final norm (R, H), fp32, of the wanted tokens.

        Raises:
            ModelFailure: llama.cpp reports an error. Cut the sequences before they are read again.
        """
        llama, batch = self._llama, self._batch
        assert 0 < len(tokens) <= MAX_BATCH
        rows = []
        for i, (sequence, position, token_id, wanted) in enumerate(tokens):
            assert 0 <= sequence < self.sequences
            assert 0 <= token_id < self.model.padded_vocab_size
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token_id, position, 1, wanted or hidden
            batch.seq_id[i][0] = sequence
            if wanted:
                rows.append(i)
        batch.n_tokens = len(tokens)
        llama.llama_set_embeddings(self._context, hidden)
        failed = llama.llama_decode(self._context, batch)
        if failed:
            reason = "found no room in its KV cache" if failed == 1 else f"failed with status {failed}"
            raise ModelFailure(f"llama.cpp {reason} while {self.model.name} read {len(tokens)} tokens")
        kept = rows if hidden else list(range(len(rows)))  # with hidden states, llama.cpp has outputs of all tokens
        if not kept:
            return torch.empty(0, self.model.vocab_size), None
        sizes = self.model.padded_vocab_size, self.model.vocab_size
        logits = self._outputs(llama.llama_get_logits, kept, *sizes)
        size = self.model.hidden_size
        return logits, self._outputs(llama.llama_get_embeddings, kept, size, size) if hidden else None

    def cut(self, sequence: int, length: int) -> None:
        """Drop a sequence's tokens from position `length` on."""
        assert 0 <= sequence < self.sequences
        self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make an empty sequence share the first `length` positions of another."""
        assert source != target
        self.cut(target, 0)
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def _outputs(self, read: Any, rows: list[int], width: int, kept: int) -> Tensor:
        """Copy the first `kept` of `width` values of some rows of the last call, which the next call overwrites."""
        values = np.ctypeslib.as_array(read(self._context), (rows[-1] + 1, width))
        are_adjacent = rows[-1] - rows[0] == len(rows) - 1
        # a copy by numpy, as threads of torch would wait for those of llama.cpp
        return torch.from_numpy(values[rows[0] :, :kept].copy() if are_adjacent else values[rows, :kept])


class _Owner:
    """Frees a pointer of llama.cpp when nothing refers to it, after what `needs` it."""

    def __init__(self, free: Any, pointer: Any, *needs: _Owner) -> None:
        self._needs = needs
        weakref.finalize(self, free, pointer)


def _library(file: Path) -> Any:
    """llama.cpp's functions, with its log limited to errors."""
    try:
        import llama_cpp
        from llama_cpp import _logger
    except ImportError as error:
        raise MissingExtra("llama-cpp-python", "llama") from error
    except (OSError, RuntimeError) as error:
        advice = "install it again, or choose --engine transformers"
        raise LoadError(f"llama-cpp-python, which runs {str(file)!r}, cannot be loaded ({error}); {advice}") from error
    _logger.logger.setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    return llama_cpp


@contextmanager
def _log() -> Iterator[io.StringIO]:
    """Collect what llama.cpp logs."""
    with redirect_stderr(io.StringIO()) as log:
        yield log


def _reason(log: io.StringIO) -> str:
    """The first error that llama.cpp logged."""
    lines = [line.strip() for line in log.getvalue().splitlines() if line.strip()]
    return lines[0].partition(": ")[2].rstrip(".") or lines[0] if lines else "no reason given"
