"""Export of a base with its deferral head as one transformers model that vLLM can serve, and checks of exports."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from collm.atomic import atomic_directory
from collm.core.head import DeferralHead
from collm.errors import DAMAGED, ArtefactError, LoadError, UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_tokenizer
from collm.models.members import merged_copy
from collm.text.guards import TokenizerIdentity
from collm.untrusted import read_text
from collm.version import __version__
from collm.vllm import NOTE, NOTE_FORMAT, ROW_SCALE


def head_digest(head: DeferralHead) -> str:
    """Twelve hexadecimal digits that identify the head."""
    digest = hashlib.sha256()
    for values in head.state_dict().values():
        digest.update(values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def defer_names(head: DeferralHead) -> list[str]:
    """Names of the tokens for the head's rows: one for each assistant, then one for the row of zeros. The last contains
    the head's digest. So a server that knows this token serves an export of this very head.
    """
    count = head.num_assistants
    names = ["<|defer|>"] if count == 1 else [f"<|defer-{k}|>" for k in range(1, count + 1)]
    return [*names, f"<|head-{head_digest(head)}|>"]


@dataclass(frozen=True)
class Note:
    """The content of collm_vllm.json.

    Attributes:
        defer_ids: rows of the output layer that hold the head, for assistants 1..K.
        scale: factor of the defer logits in these rows.
        biases: b_1..b_K, which rows cannot hold: u_k = (logit of row k) / scale + b_k.
        zero_id: a row of zeros. Its logit is 0, so that log-probabilities can be turned back into logits.
        vocab_size: number of token ids that all models share.
        tokenizer_hash: hash of the collaboration's tokenizer.
        default_threshold: the threshold chosen by calibration; None before calibration.
    """

    defer_ids: list[int]
    scale: float
    biases: list[float]
    zero_id: int
    vocab_size: int
    tokenizer_hash: str
    default_threshold: float | None
    version: str = __version__
    format: int = NOTE_FORMAT

    @classmethod
    def read(cls, directory: Path) -> Note:
        """Read the note of an exported base. Raises an ArtefactError if it is missing, damaged or of another format."""
        path = directory / NOTE
        try:
            content = json.loads(read_text(path))
            if content["format"] != NOTE_FORMAT:
                raise ArtefactError(f"{path} has format {content['format']!r}, this version reads {NOTE_FORMAT}")
            return cls(**content)
        except OSError as error:
            raise ArtefactError(f"there is no {path}; expected a directory that 'collm export vllm' wrote") from error
        except DAMAGED as error:
            raise ArtefactError(
                f"{path} is damaged ({type(error).__name__}: {error}); export the base again"
            ) from error


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
        default_threshold: stored in the note.

    Raises:
        ArtefactError: `out` exists.
        ConfigError: the base is quantized.
        UnsupportedModel: rows cannot hold the head because the base caps its logits, or the head has a hidden layer,
            reads the doubt or compares the gains of several assistants; or the tokenizer cannot name them.
        WriteError: the files could not be written; `out` does not exist then.
    """
    if out.exists():
        raise ArtefactError(f"{out} exists; choose another directory or remove it")
    model = merged_copy(base)
    language = LanguageModel(model, name="base")
    check_rows(head, language.softcap)
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
    _add_rows(model, ROW_SCALE * head.weight.detach() / language.scale, note)
    with atomic_directory(out.resolve()) as directory:
        _with_row_tokens(tokenizer, defer_names(head), note).save_pretrained(directory)
        model.save_pretrained(directory)
        (directory / NOTE).write_text(json.dumps(asdict(note), indent=2) + "\n", encoding="utf-8")
    return note


def check_rows(head: DeferralHead, softcap: float | None = None) -> None:
    """Raise an UnsupportedModel if rows of the output layer, whose values may be capped, cannot hold the head."""
    reason = None
    if head.width:
        reason = f"the head has a hidden layer of {head.width} units"
    elif head.doubt:
        reason = "the head reads the base's doubt"
    elif head.predicts_gain and head.num_assistants > 1:
        reason = f"the head takes the largest of the gains of {head.num_assistants} assistants"
    elif softcap is not None:
        reason = f"the base caps its logits (final_logit_softcapping {softcap})"
    if reason is not None:
        advice = "decode with --engine local or, with one assistant, in one vLLM engine"
        raise UnsupportedModel(f"{reason}, so no rows of an output layer can hold the head; {advice}")


def check_exported(directory: Path, head: DeferralHead) -> None:
    """Raise an ArtefactError if a directory does not hold a base that was exported with this head."""
    note, advice = Note.read(directory), "remove the directory to export the base again"
    try:
        tokenizer = load_tokenizer(ModelSpec(str(directory)))
    except LoadError as error:
        raise ArtefactError(f"{directory} has no tokenizer; {advice}") from error
    if tokenizer.convert_tokens_to_ids(defer_names(head)) != [*note.defer_ids, note.zero_id]:
        raise ArtefactError(f"{directory} was exported with another head; {advice}")


@torch.no_grad()
def _add_rows(model: Any, rows: Tensor, note: Note) -> None:
    """Append `rows` and a row of zeros to the output layer, untie it, and zero the rows that belong to no token."""
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.clone())
    model.config.tie_word_embeddings = False
    embedded = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(note.zero_id + 1, mean_resizing=False)
    model.get_input_embeddings().weight[embedded:] = 0  # no text contains these tokens
    output = model.get_output_embeddings()
    output.weight[note.vocab_size :] = 0
    output.weight[note.defer_ids] = rows.to(output.weight)
    if getattr(output, "bias", None) is not None:
        output.bias[note.vocab_size :] = 0


def _with_row_tokens(tokenizer: PreTrainedTokenizerBase, names: list[str], note: Note) -> PreTrainedTokenizerBase:
    """Copy the tokenizer and add a special token for each new row and for the padding rows before them."""
    named, expected = deepcopy(tokenizer), [*note.defer_ids, note.zero_id]
    new = [*(f"<|padding-{token_id}|>" for token_id in range(note.vocab_size, note.defer_ids[0])), *names]
    taken = [name for name in new if name in named.get_vocab()]
    if taken:
        raise UnsupportedModel(
            f"the tokenizer has the token {taken[0]!r} already; rename it, because the export adds a token of this name"
        )
    named.add_tokens([AddedToken(name, special=True) for name in new], special_tokens=True)
    found = named.convert_tokens_to_ids(names)
    if found != expected:
        raise UnsupportedModel(
            f"the tokenizer gives the new tokens the ids {found}, expected {expected}; its vocabulary has gaps"
        )
    return named
