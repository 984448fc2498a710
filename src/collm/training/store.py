"""Scores on disk, in atomically written shards that are tied to their examples and model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from collm.atomic import atomic_file
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.members import AssistantSpec
from collm.training.examples import Example, fingerprint
from collm.training.scores import HiddenStates, Scores
from collm.untrusted import check_fields, read_text
from collm.version import __version__

FORMAT = 2
HEADER = "scores.json"
_FIELDS = {
    "fingerprint": "input (data, tokenizer, prompt template or max_length)",
    "path": "model",
    "revision": "model revision",
    "dtype": "model dtype",
    "quantization": "quantization of the model",
    "weights": "weights of the model (or source or table of the tool)",
    "vocab_size": "vocabulary size",
    "shard_size": "shard size",
    "hidden_states": "kind (with or without hidden states)",
}
_MODEL = ("path", "revision", "dtype", "quantization", "weights")
"""Fields of the model's `identity`."""

_ADVICE = "run the same scoring again with the same --out, which recomputes the missing ones"


@dataclass(frozen=True)
class Header:
    """The content of scores.json: everything the scores depend on, and library versions.

    Attributes:
        hidden_states: whether the shards include the model's last hidden states at the target tokens.
    """

    fingerprint: str
    path: str
    revision: str | None
    dtype: str | None
    weights: str | None
    vocab_size: int
    shard_size: int
    num_examples: int
    num_targets: int
    versions: dict[str, str]
    quantization: str | None = None
    hidden_states: bool = False
    format: int = FORMAT

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        spec: AssistantSpec,
        *,
        vocab_size: int,
        shard_size: int,
        hidden_states: bool = False,
    ) -> Header:
        return cls(
            fingerprint=fingerprint(examples),
            **spec.identity(),
            vocab_size=vocab_size,
            shard_size=shard_size,
            num_examples=len(examples),
            num_targets=sum(example.num_targets for example in examples),
            hidden_states=hidden_states,
            versions={"collm": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        )

    def check_same(self, wanted: dict[str, Any], directory: Path) -> None:
        """Raise a ConfigError that names the first differing field."""
        for name, value in wanted.items():
            own = getattr(self, name)
            if own != value:
                raise ConfigError(
                    f"{directory} has scores of another {_FIELDS[name]}: {name} is {own!r}, now {value!r}; "
                    "choose another directory, or delete that one to score again"
                )


class ScoreStore:
    """A directory of shards with `shard_size` examples each.

    Args:
        directory: directory of the shards, created if it does not exist.
        header: identity of the scores.
        order: indices of the examples, in the order of scoring.
        counts: number of target tokens of each example.
    """

    def __init__(self, directory: Path, header: Header, order: Sequence[int], counts: Sequence[int]) -> None:
        self.directory = directory
        self.header = header
        self.counts = counts
        size = header.shard_size
        self.shards = [list(order[start : start + size]) for start in range(0, len(order), size)]

    @classmethod
    def opened(cls, directory: Path) -> ScoreStore:
        """Open an existing store, and take the order of its examples from its shards.

        Raises:
            ArtefactError: the store is missing, incomplete or damaged.
        """
        header = read_header(directory)
        if header is None:
            raise ArtefactError(f"there are no scores in {directory}: no {HEADER}; run 'collm score' first")
        store = cls(directory, header, [], [])
        order: list[int] = []
        counts: dict[int, int] = {}
        for shard in range(-(-header.num_examples // header.shard_size)):
            tensors = store._read_existing(shard)
            order += tensors["examples"].tolist()
            counts.update(zip(tensors["examples"].tolist(), tensors["offsets"].diff().tolist(), strict=True))
        if len(order) != header.num_examples or sorted(counts) != [*range(len(order))]:
            raise ArtefactError(f"{directory / HEADER} is damaged: the shards hold other examples; {_ADVICE}")
        return cls(directory, header, order, [counts[index] for index in range(len(order))])

    def path(self, shard: int) -> Path:
        return self.directory / f"scores-{shard:05d}.safetensors"

    def begin(self) -> None:
        """Write scores.json, or check an existing one.

        Raises:
            ConfigError: the directory has scores of other examples or another model.
            ArtefactError: the existing scores.json is damaged.
        """
        if (found := read_header(self.directory)) is not None:
            wanted = asdict(self.header)
            found.check_same({name: wanted[name] for name in _FIELDS}, self.directory)
            return
        with atomic_file(self.directory / HEADER) as temporary:
            temporary.write_text(json.dumps(asdict(self.header), indent=2) + "\n", encoding="utf-8")

    def write(self, shard: int, scores: Mapping[str, Tensor]) -> None:
        """Write one shard's scores at its target tokens, in the shard's order.

        Args:
            scores: logprob and correct; abstained for a tool; hidden (the last hidden states) if the store includes
                them; shape (n, ..).
        """
        assert ("hidden" in scores) == self.header.hidden_states
        tensors = {name: values.cpu().contiguous() for name, values in {**scores, **self._layout(shard)}.items()}
        flags = {name: values.to(torch.uint8) for name, values in tensors.items() if values.dtype == torch.bool}
        tensors |= {"logprob": tensors["logprob"].float(), **flags}
        content = save(tensors, metadata={"sha256": self._digest(tensors)})
        with atomic_file(self.path(shard)) as temporary:
            temporary.write_bytes(content)

    def read(self, shard: int) -> dict[str, Tensor] | None:
        """Read the tensors of one shard; None if it does not exist.

        Raises:
            ArtefactError: the shard is damaged or belongs to other examples.
        """
        if not self.path(shard).exists():
            return None
        tensors = self._read_verified(shard)
        layout = self._layout(shard)
        if any(not torch.equal(tensors[name], layout[name]) for name in layout):
            raise ArtefactError(f"{self.path(shard)} is damaged: it belongs to other examples; {_ADVICE}")
        return tensors

    def _read_existing(self, shard: int) -> dict[str, Tensor]:
        if not self.path(shard).exists():
            raise ArtefactError(
                f"the scores in {self.directory} are incomplete: {self.path(shard).name} is missing; {_ADVICE}"
            )
        return self._read_verified(shard)

    def _read_verified(self, shard: int) -> dict[str, Tensor]:
        """Read the tensors of an existing shard and verify their checksum."""
        path = self.path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                intact = (file.metadata() or {}).get("sha256") == self._digest(tensors)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path} is damaged ({error}); {_ADVICE}") from error
        if not intact:
            raise ArtefactError(f"{path} is damaged: its content does not match its checksum; {_ADVICE}")
        return tensors

    def collect(self) -> Scores:
        """Load all scores, in the order of the examples.

        Raises:
            ArtefactError: a shard is missing or damaged.
        """
        offsets = torch.tensor([0, *self.counts], dtype=torch.int64).cumsum(0)
        places: dict[int, tuple[Path, int, int]] = {}
        logprobs = torch.empty(int(offsets[-1]), dtype=torch.float32)
        corrects, abstained = torch.zeros(2, int(offsets[-1]), dtype=torch.bool)
        for shard, indices in enumerate(self.shards):
            tensors = self._read_existing(shard)
            pieces = zip(indices, tensors["offsets"].tolist(), tensors["offsets"][1:].tolist(), strict=False)
            for index, start, end in pieces:
                places[index] = (self.path(shard), start, end)
                logprobs[offsets[index] : offsets[index + 1]] = tensors["logprob"][start:end]
                corrects[offsets[index] : offsets[index + 1]] = tensors["correct"][start:end].bool()
                if "abstained" in tensors:
                    abstained[offsets[index] : offsets[index + 1]] = tensors["abstained"][start:end].bool()
        hidden = HiddenStates(places) if self.header.hidden_states else None
        model = {name: getattr(self.header, name) for name in _MODEL}
        return Scores(logprobs, corrects, offsets, self.header.fingerprint, hidden, model, abstained)

    def _layout(self, shard: int) -> dict[str, Tensor]:
        indices = self.shards[shard]
        counts = torch.tensor([0, *(self.counts[index] for index in indices)], dtype=torch.int64)
        return {"examples": torch.tensor(indices, dtype=torch.int64), "offsets": counts.cumsum(0)}

    def _digest(self, tensors: dict[str, Tensor]) -> str:
        identity = [getattr(self.header, name) for name in _FIELDS]
        digest = hashlib.sha256(json.dumps(identity).encode())
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].view(torch.uint8).numpy().data)
        return digest.hexdigest()


def read_header(directory: Path) -> Header | None:
    """Read scores.json; None if it does not exist.

    Raises:
        ArtefactError: the file is damaged or has another format.
    """
    path = directory / HEADER
    if not path.exists():
        return None
    try:
        content = json.loads(read_text(path))
        if content["format"] != FORMAT:
            raise ArtefactError(f"{path} has format {content['format']!r}, this version reads {FORMAT}; score again")
        header = Header(**content)
        check_fields(header)
        if header.shard_size < 1:
            raise ValueError(f"shard_size is {header.shard_size}")
        return header
    except (*DAMAGED, ConfigError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); delete {directory} and score again") from error
