"""Scores of one model in memory and on disk (scores.json and shards), and the training set with the examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from collm.atomic import atomic_file, write_text
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.members import AssistantSpec
from collm.training.examples import Example, fingerprint, scatter, shift
from collm.untrusted import check_fields, read_text
from collm.version import __version__

FORMAT = 3
HEADER = "scores.json"
_MODEL = ("path", "revision", "dtype", "quantization", "weights")  # the model's `identity`
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

_ADVICE = "run the same scoring again with the same --out, which computes the missing ones"


@dataclass(frozen=True)
class Scores:
    """Scores of one frozen model for the M target tokens of N examples.

    Attributes:
        logprobs: log-probabilities of the gold tokens, nats, fp32, shape (M,).
        corrects: whether the model's argmax is the gold token, bool, shape (M,).
        offsets: example i has entries offsets[i] to offsets[i + 1], int64, shape (N + 1,).
        hidden: the model's last hidden states at the target tokens of each example, shape (n, H), if they were stored.
            They stay on disk until they are read.
        doubt: the model's doubt there (`core.head.doubt_of`), fp32, shape (M, 3), with the hidden states.
        model: the model's `identity`, if they were stored.
        abstained: whether a tool has no answer, bool, shape (M,); None if the model never abstains.
        predicted: the model's argmax, int32, shape (M,); None for a tool, a model on a server, or segments.
    """

    logprobs: Tensor
    corrects: Tensor
    offsets: Tensor
    fingerprint: str
    hidden: Sequence[Tensor] | None = None
    doubt: Tensor | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    abstained: Tensor | None = None
    predicted: Tensor | None = None

    def of(self, index: int, values: Tensor) -> Tensor:
        """The values (M, ..) of one example's target tokens, shape (n, ..)."""
        return values[self.offsets[index] : self.offsets[index + 1]]

    def logprob(self, index: int) -> Tensor:
        """Log-probabilities of one example's target tokens, shape (n,)."""
        return self.of(index, self.logprobs)

    def correct(self, index: int) -> Tensor:
        """Whether each target token of one example is the model's argmax, shape (n,)."""
        return self.of(index, self.corrects)


@dataclass(frozen=True)
class Header:
    """The content of scores.json: everything the scores depend on, and library versions."""

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
    def of(cls, examples: Sequence[Example], spec: AssistantSpec, **options: Any) -> Header:
        """The header of these scores. `options` are vocab_size, shard_size and hidden_states."""
        counts: dict[str, Any] = {
            "num_examples": len(examples),
            "num_targets": sum(example.num_targets for example in examples),
        }
        versions = {"collm": __version__, **{name: version(name) for name in ("torch", "transformers")}}
        return cls(fingerprint(examples), **spec.identity(), **counts, versions=versions, **options)

    @property
    def identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    def check_same(self, wanted: Mapping[str, Any], directory: Path) -> None:
        """Raise a ConfigError that names the first differing field."""
        for name, value in wanted.items():
            own = getattr(self, name)
            if own != value:
                difference = f"{_FIELDS[name]}: {name} is {own!r}, now {value!r}"
                advice = "choose another directory, or delete that one to score again"
                raise ConfigError(f"{directory} has scores of another {difference}; {advice}")

    def write(self, directory: Path) -> None:
        """Write scores.json, or check that an existing one is the same."""
        if (found := read_header(directory)) is not None:
            found.check_same(self.identity, directory)
        else:
            write_text(directory / HEADER, json.dumps(asdict(self), indent=2) + "\n")


def read_header(directory: Path) -> Header | None:
    """Read scores.json; None if it does not exist. An ArtefactError if it is damaged or has another format."""
    path = directory / HEADER
    if not path.exists():
        return None
    try:
        content = json.loads(read_text(path))
        if content["format"] != FORMAT:
            raise ArtefactError(f"{path} has format {content['format']!r}, this version reads {FORMAT}; score again")
        header = Header(**content)
        check_fields(header)
        if min(header.shard_size, header.num_examples) < 1:
            raise ValueError(f"shard_size is {header.shard_size}, num_examples {header.num_examples}")
        return header
    except (*DAMAGED, ConfigError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); delete {directory} and score again") from error


def write_shard(directory: Path, header: Header, shard: int, tensors: Mapping[str, Tensor]) -> None:
    """Write scores at target tokens: logprob, correct; abstained or predicted; hidden and doubt if the header says so.

    The tensors also have examples, the indices of the examples, and offsets into the others.
    """
    assert ("hidden" in tensors) == ("doubt" in tensors) == header.hidden_states
    stored = {name: values.contiguous() for name, values in tensors.items()}
    stored |= {name: values.to(torch.uint8) for name, values in stored.items() if values.dtype == torch.bool}
    stored["logprob"] = stored["logprob"].float()
    content = save(stored, metadata={"sha256": _digest(header, stored)})
    with atomic_file(shard_path(directory, shard)) as temporary:
        temporary.write_bytes(content)


def read_shard(directory: Path, header: Header, shard: int) -> dict[str, Tensor]:
    """Read one shard and verify its checksum. An ArtefactError if it is missing or damaged."""
    path = shard_path(directory, shard)
    if not path.exists():
        raise ArtefactError(f"the scores in {directory} are incomplete: {path.name} is missing; {_ADVICE}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            intact = (file.metadata() or {}).get("sha256") == _digest(header, tensors)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); {_ADVICE}") from error
    if not intact:
        raise ArtefactError(f"{path} is damaged: its content does not match its checksum; {_ADVICE}")
    return tensors


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"scores-{shard:05d}.safetensors"


def _digest(header: Header, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([*header.identity.values()]).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_scores(
    directory: Path, examples: Sequence[Example], spec: AssistantSpec | None = None, *, hidden_states: bool = False
) -> Scores | None:
    """Load scores as `load_scores` does, or return None if there are none or a shard is missing or damaged."""
    if read_header(directory) is None:
        return None
    try:
        return load_scores(directory, examples, spec, hidden_states=hidden_states)
    except ArtefactError:  # scoring computes the shard again, and warns if it was damaged
        return None


def load_scores(
    directory: Path,
    examples: Sequence[Example] | None = None,
    spec: AssistantSpec | None = None,
    *,
    hidden_states: bool = False,
) -> Scores:
    """Load the complete scores in a directory. They must be of these examples and this model, as far as given."""
    header = read_header(directory)
    if header is None:
        raise ArtefactError(f"there are no scores in {directory}: no {HEADER}; run 'collm score' first")
    wanted: dict[str, Any] = {"hidden_states": True} if hidden_states else {}
    wanted |= {} if examples is None else {"fingerprint": fingerprint(examples)}
    header.check_same(wanted | ({} if spec is None else spec.identity()), directory)
    shards = [read_shard(directory, header, at) for at in range(-(-header.num_examples // header.shard_size))]
    if torch.cat([shard["examples"] for shard in shards]).sort().values.tolist() != [*range(header.num_examples)]:
        raise ArtefactError(f"{directory / HEADER} is damaged: the shards hold other examples; {_ADVICE}")

    def by_example(name: str) -> list[Tensor]:
        parts = dict[int, Tensor]()
        for shard in shards:
            counts = shard["offsets"].diff().tolist()
            parts.update(zip(shard["examples"].tolist(), torch.split(shard[name], counts), strict=True))
        return [parts[index] for index in range(len(parts))]

    logprobs = by_example("logprob")
    return Scores(
        torch.cat(logprobs),
        torch.cat(by_example("correct")).bool(),
        torch.tensor([0, *map(len, logprobs)]).cumsum(0),
        header.fingerprint,
        by_example("hidden") if header.hidden_states else None,
        torch.cat(by_example("doubt")) if header.hidden_states else None,
        {name: getattr(header, name) for name in _MODEL},
        torch.cat(by_example("abstained")).bool() if "abstained" in shards[0] else None,
        torch.cat(by_example("predicted")) if "predicted" in shards[0] else None,
    )


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Examples with the scores of assistants 1..K, and for a warm start of the base before training. K may be 0."""

    def __init__(
        self,
        examples: Sequence[Example],
        assistant_scores: Sequence[Scores],
        base_scores: Scores | None = None,
    ) -> None:
        self.examples = examples
        self.assistant_scores = list(assistant_scores)
        self.base_scores = base_scores
        self.fingerprint = fingerprint(examples)
        for scores in filter(None, (*assistant_scores, base_scores)):
            if scores.fingerprint != self.fingerprint:
                mine, theirs = self.fingerprint[:12], scores.fingerprint[:12]
                raise ConfigError(f"the scores belong to other examples ({theirs}, expected {mine}); score this data")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example as `shift` gives it, with assistant_logprobs and assistant_correct, shape (T, K), 0 off targets.

        With the base's scores also base_correct, shape (T,): that of the base before training.
        """
        shifted = shift(self.examples[index])
        scores = _of_assistants(self.assistant_scores, index, self.examples[index].num_targets)
        if self.base_scores is not None:
            scores["base_correct"] = self.base_scores.correct(index)
        return shifted | {name: scatter(values, shifted["target_mask"]) for name, values in scores.items()}


def stored_examples(base: Scores | None, assistants: Sequence[Scores]) -> list[dict[str, Tensor]]:
    """What a head can be fitted to without the base, of each example's n target tokens.

    Returns:
        hidden (n, H), doubt (n, 3), base_logprob and base_correct (n,), assistant_logprobs and assistant_correct
        (n, K).

    Raises:
        ConfigError: the base's scores have no hidden states.
    """
    if base is None or base.hidden is None or base.doubt is None:
        raise ConfigError("the base's scores have no hidden states; score it with hidden_states=True")
    return [
        {
            "hidden": hidden,
            "doubt": base.of(index, base.doubt),
            "base_logprob": base.logprob(index),
            "base_correct": base.correct(index),
            **_of_assistants(assistants, index, len(hidden)),
        }
        for index, hidden in enumerate(base.hidden)
    ]


def _of_assistants(assistants: Sequence[Scores], index: int, count: int) -> dict[str, Tensor]:
    logprobs = torch.empty(count, len(assistants))
    correct = torch.empty(count, len(assistants), dtype=torch.bool)
    for k, scores in enumerate(assistants):
        logprobs[:, k], correct[:, k] = scores.logprob(index), scores.correct(index)
    return {"assistant_logprobs": logprobs, "assistant_correct": correct}
