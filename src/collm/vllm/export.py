"""Export of a base with its deferral head as one transformers model that vLLM can serve."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from collm.atomic import atomic_directory
from collm.core.head import DeferralHead
from collm.errors import ArtefactError, ConfigError, UnsupportedModel
from collm.models.guards import TokenizerIdentity
from collm.models.language_model import LanguageModel, without_adapter
from collm.models.loading import ModelSpec, load_model
from collm.models.members import spec_of
from collm.vllm import ROW_SCALE
from collm.vllm.export_manifest import Note, defer_names


def export_base(
    base: nn.Module | ModelSpec,
    head: DeferralHead,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    default_threshold: float | None = None,
) -> Note:
    """Write the base, with the head as additional rows of its output layer, the tokenizer and the note.

    A LoRA adapter is merged. Tied embeddings are untied. Rows that pad the vocabulary become zeros. One row for each
    assistant and a row of zeros follow all existing rows. The new rows have the model's dtype, so in bfloat16 a defer
    logit is rounded to about three digits. The head itself computes in fp32.

    Args:
        base: as for `CoLLM`; it is not modified.
        head: the deferral head.
        tokenizer: the tokenizer of the collaboration.
        out: the directory to create.
        default_threshold: stored in the note.

    Raises:
        ArtefactError: `out` exists.
        ConfigError: the base is quantized.
        UnsupportedModel: rows cannot hold the head because the base caps its logits, or the tokenizer cannot name them.
        WriteError: the files could not be written; `out` does not exist then.
    """
    if out.exists():
        raise ArtefactError(f"{out} exists; choose another directory or remove it")
    model: Any = _merged_copy(base)
    language = LanguageModel(model, name="base")
    if language.softcap is not None:
        raise UnsupportedModel(
            f"the base caps its logits (final_logit_softcapping {language.softcap}), so no row of its output layer can "
            "hold the head; decode with --engine local"
        )
    identity, first = TokenizerIdentity.of(tokenizer), language.padded_vocab_size
    note = Note(
        defer_ids=list(range(first, first + head.num_assistants)),
        scale=ROW_SCALE,
        biases=head.bias.detach().float().tolist(),
        zero_id=first + head.num_assistants,
        vocab_size=identity.vocab_size,
        tokenizer_hash=identity.hash,
        default_threshold=default_threshold,
    )
    named = _with_row_tokens(tokenizer, defer_names(head), note)
    _add_rows(model, ROW_SCALE * head.weight.detach() / language.scale, note)
    with atomic_directory(out.resolve()) as directory:
        model.save_pretrained(directory)
        named.save_pretrained(directory)
        note.write(directory)
    return note


def _merged_copy(base: nn.Module | ModelSpec) -> Any:
    """Copy the base to the CPU and merge its adapter."""
    spec = spec_of(base)
    if isinstance(spec, ModelSpec) and spec.quantization is not None:
        raise ConfigError(
            f"the base is quantized ({spec.quantization}), so rows cannot be added to its output layer; export a "
            "collaboration whose base is not quantized"
        )
    if isinstance(base, ModelSpec):
        return load_model(replace(base, device="cpu"))
    copy: Any = deepcopy(base).to("cpu")
    return copy if without_adapter(copy) is copy else copy.merge_and_unload()


@torch.no_grad()
def _add_rows(model: Any, rows: Tensor, note: Note) -> None:
    """Append `rows` and a row of zeros to the output layer, untie it, and zero the rows that belong to no token."""
    vocab_size = note.zero_id + 1
    old = model.get_output_embeddings()
    weight, bias = _zero_padded(old.weight, vocab_size), getattr(old, "bias", None)
    weight[note.vocab_size :] = 0
    weight[note.defer_ids] = rows.to(weight)
    output = nn.Linear(weight.shape[1], vocab_size, bias=bias is not None, device="meta")
    output.weight = nn.Parameter(weight)
    if bias is not None:
        output.bias = nn.Parameter(_zero_padded(bias, vocab_size))
        output.bias[note.vocab_size :] = 0
    embedded = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.get_input_embeddings().weight[embedded:] = 0  # no text contains these tokens
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(output)


def _zero_padded(values: Tensor, length: int) -> Tensor:
    longer = values.new_zeros(length, *values.shape[1:])
    longer[: len(values)] = values
    return longer


def _with_row_tokens(tokenizer: PreTrainedTokenizerBase, names: list[str], note: Note) -> PreTrainedTokenizerBase:
    """Copy the tokenizer and add a special token for each new row and for the padding rows before them."""
    named = deepcopy(tokenizer)
    padding = [f"<|padding-{token_id}|>" for token_id in range(note.vocab_size, note.defer_ids[0])]
    taken = [name for name in [*padding, *names] if name in named.get_vocab()]
    if taken:
        raise UnsupportedModel(
            f"the tokenizer has the token {taken[0]!r} already; rename it, because the export adds a token of this name"
        )
    named.add_tokens([AddedToken(name, special=True) for name in [*padding, *names]], special_tokens=True)
    found = named.convert_tokens_to_ids(names)
    if found != [*note.defer_ids, note.zero_id]:
        raise UnsupportedModel(
            f"the tokenizer gives the new tokens the ids {found}, expected {[*note.defer_ids, note.zero_id]}; its "
            "vocabulary has gaps"
        )
    return named
