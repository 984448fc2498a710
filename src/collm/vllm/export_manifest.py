"""What is known of an exported base: written by the export, read by whoever decodes with it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from collm.core.head import DeferralHead
from collm.errors import DAMAGED, ArtefactError, LoadError
from collm.models.loading import ModelSpec, load_tokenizer
from collm.version import __version__
from collm.vllm import NOTE, NOTE_FORMAT


def head_digest(head: DeferralHead) -> str:
    """Twelve hexadecimal digits that tell one head from another."""
    digest = hashlib.sha256()
    for values in (head.weight, head.bias):
        digest.update(values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def defer_names(head: DeferralHead) -> list[str]:
    """Tokens of the rows that hold the head: of each assistant, and of the row of zeros, named after the head itself.

    So a server that knows the last one serves an export of this very head.
    """
    count = head.num_assistants
    names = ["<|defer|>"] if count == 1 else [f"<|defer-{k}|>" for k in range(1, count + 1)]
    return [*names, f"<|head-{head_digest(head)}|>"]


@dataclass(frozen=True)
class Note:
    """The content of collm_vllm.json.

    Attributes:
        defer_ids: rows of the output layer that hold the head, of assistants 1..K.
        scale: at which they hold it.
        biases: b_1..b_K, which no row can hold: u_k is row k's logit over the scale, plus b_k.
        zero_id: a row of zeros, whose logit is 0, from which log-probabilities become logits again.
        vocab_size: the ids that all models share.
        tokenizer_hash: of the collaboration's tokenizer.
        default_threshold: chosen by calibration, None before it.
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

    def write(self, directory: Path) -> None:
        """Put it beside the model."""
        (directory / NOTE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Note:
        """The note of an exported base.

        Raises:
            ArtefactError: there is none, or another version wrote it.
        """
        path = directory / NOTE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != NOTE_FORMAT:
                raise ArtefactError(f"{path} has format {content['format']!r}, this version reads {NOTE_FORMAT}")
            return cls(**content)
        except OSError as error:
            raise ArtefactError(f"there is no {path}; expected what 'collm export vllm' writes") from error
        except DAMAGED as error:
            raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {error}); export again") from error


def check_exported(directory: Path, head: DeferralHead) -> None:
    """Raise an ArtefactError unless a directory holds a base that was exported with this head."""
    note = Note.read(directory)
    try:
        tokenizer = load_tokenizer(ModelSpec(str(directory)))
    except LoadError as error:
        raise ArtefactError(f"{directory} has no tokenizer; remove it to have it written anew") from error
    if tokenizer.convert_tokens_to_ids(defer_names(head)) != [*note.defer_ids, note.zero_id]:
        raise ArtefactError(f"{directory} was exported with another head; remove it to have it written anew")
