"""The note of an exported base, and checks of exported directories."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from collm.core.head import DeferralHead
from collm.errors import DAMAGED, ArtefactError, LoadError
from collm.models.loading import ModelSpec, load_tokenizer
from collm.untrusted import read_text
from collm.version import __version__
from collm.vllm import NOTE, NOTE_FORMAT


def head_digest(head: DeferralHead) -> str:
    """A digest of the head: twelve hexadecimal digits."""
    digest = hashlib.sha256()
    for values in (head.weight, head.bias):
        digest.update(values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def defer_names(head: DeferralHead) -> list[str]:
    """Names of the tokens for the head's rows: one for each assistant, then one for the row of zeros.

    The last name contains the head's digest. So a server that knows this token serves an export of this very head.
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
        version: version of collm that wrote the note.
        format: format of the note.
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
        """Write the note into the directory of the exported model."""
        (directory / NOTE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Note:
        """Read the note of an exported base.

        Raises:
            ArtefactError: the note is missing or damaged, or has another format.
        """
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


def check_exported(directory: Path, head: DeferralHead) -> None:
    """Check that a directory holds a base that was exported with this head.

    Raises:
        ArtefactError: it does not.
    """
    note = Note.read(directory)
    try:
        tokenizer = load_tokenizer(ModelSpec(str(directory)))
    except LoadError as error:
        raise ArtefactError(f"{directory} has no tokenizer; remove the directory to export the base again") from error
    if tokenizer.convert_tokens_to_ids(defer_names(head)) != [*note.defer_ids, note.zero_id]:
        raise ArtefactError(
            f"{directory} was exported with another head; remove the directory to export the base again"
        )
