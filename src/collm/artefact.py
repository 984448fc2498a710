"""The artefact: reading, writing and checking the files of a collaboration on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from collm.atomic import atomic_file
from collm.core.calibration import Calibration, threshold_text
from collm.core.head import DeferralHead
from collm.core.types import author_name, check_threshold
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.guards import TokenizerIdentity
from collm.models.loading import ModelSpec, load_with_adapter
from collm.models.members import AssistantSpec, Member
from collm.models.names import looks_like_path
from collm.models.template import PromptTemplate
from collm.tools.spec import ToolSpec, not_trusted
from collm.untrusted import check_fields, read_text
from collm.version import __version__

FORMAT = 1
CONFIG, HEAD, CALIBRATION, CARD = "collm.json", "head.safetensors", "calibration.json", "README.md"
TABLES = "tables"
ENTRIES = (CONFIG, HEAD, CALIBRATION, CARD, TABLES, "base", "adapter")
"""Everything in a collaboration's directory that saving writes, replaces or removes."""

SavedBase = Literal["base", "adapter"]
"""Directory of the tuned base or of its adapter."""


@dataclass(frozen=True)
class Manifest:
    """The content of collm.json.

    Attributes:
        base, assistants: specs of models and tools.
        saved_base: directory of the tuned base in the artefact, None for a frozen base.
        tokenizer_hash, chat_template_hash: hashes of the base's tokenizer.
        default_threshold: threshold chosen by calibration, None before it.
        training: training options and measurements for the model card.
    """

    base: ModelSpec
    assistants: list[AssistantSpec]
    saved_base: SavedBase | None
    head: dict[str, int]
    tokenizer_hash: str
    chat_template_hash: str | None
    template: PromptTemplate
    accept_differences: list[str]
    default_threshold: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    format: int = FORMAT

    def to_json(self) -> str:
        content = asdict(self)
        content["base"] = {**self.base.to_dict(), "engine": "transformers"}
        names = {kind: engine for engine, kind in _ENGINES.items()}
        content["assistants"] = [{**spec.to_dict(), "engine": names[type(spec)]} for spec in self.assistants]
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse collm.json.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, ConfigError: the content is invalid.
        """
        content = json.loads(text)
        unknown = content.keys() - {one.name for one in fields(cls)}
        if unknown:
            raise ValueError(f"it has the unknown field {min(unknown)!r}")
        content["base"] = _spec(content["base"])
        content["assistants"] = [_spec(spec) for spec in content["assistants"]]
        template = content["template"]
        content["template"] = PromptTemplate(**{**template, "turn_ends": tuple(template.get("turn_ends", ()))})
        manifest = cls(**content)
        for record in (manifest, manifest.base, *manifest.assistants, manifest.template):
            check_fields(record)
        if manifest.default_threshold is not None:
            check_threshold(manifest.default_threshold)
        if manifest.head.keys() != {"hidden_size", "num_assistants"} or min(manifest.head.values()) < 1:
            raise ValueError(f"head is {manifest.head!r:.80}, expected hidden_size and num_assistants")
        ends = manifest.template.turn_ends
        if not all(0 <= end < 1 << 31 for end in ends):
            raise ValueError(f"turn_ends is {ends!r:.80}, expected token ids")
        return manifest


_ENGINES: dict[str, type[ModelSpec] | type[ToolSpec]] = {"transformers": ModelSpec, "python": ToolSpec}


def _spec(content: dict[str, Any]) -> AssistantSpec:
    engine = content.pop("engine")
    if engine not in _ENGINES:
        raise ValueError(f"engine {engine!r} is not known to this version")
    return _ENGINES[engine](**content)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {"collm": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def read_manifest(directory: Path) -> Manifest:
    """Read collm.json.

    Raises:
        ArtefactError: the file is missing, damaged or has another format.
    """
    path = directory / CONFIG
    if not directory.exists():
        raise ArtefactError(f"there is no collaboration at {directory}: no such directory")
    if not path.exists():
        raise ArtefactError(f"{directory} is not a collaboration, as it has no {CONFIG}; save_pretrained writes one")
    try:
        text = read_text(path)
        if json.loads(text).get("format") != FORMAT:
            raise ArtefactError(f"{path} has format {json.loads(text).get('format')!r}, this version reads {FORMAT}")
        return Manifest.from_json(text)
    except (*DAMAGED, ConfigError) as error:
        raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {error}); restore it or retrain") from error


def local_directory(path: str | Path, revision: str | None) -> Path:
    """The local directory of a collaboration, which is downloaded if `path` is a Hub repository id.

    Raises:
        ArtefactError: `path` is neither a directory nor a repository.
    """
    if isinstance(path, Path) or Path(path).exists() or "/" not in path or looks_like_path(path):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(path, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtefactError(
            f"there is no collaboration at {path}: no such directory, and the Hub responds: {first_line}"
        ) from error


def check_trusted(manifest: Manifest, directory: Path) -> None:
    """Check that a collaboration has no user functions as tools.

    Raises:
        ArtefactError: there is a user function; the message names the first.
    """
    for spec in manifest.assistants:
        if isinstance(spec, ToolSpec) and spec.foreign:
            raise ArtefactError(not_trusted(directory, str(spec)))


def save_tables(directory: Path, assistants: Sequence[AssistantSpec]) -> list[AssistantSpec]:
    """Copy the tables of tools into the artefact, and return the assistants with paths of the copies."""
    saved = []
    for number, spec in enumerate(assistants, start=1):
        if isinstance(spec, ToolSpec) and spec.table is not None:
            name = author_name(number)
            copy = Path(TABLES) / f"{name}{spec.table.suffix}"
            (directory / TABLES).mkdir(exist_ok=True)
            try:
                shutil.copyfile(spec.table, directory / copy)
            except FileNotFoundError as error:
                raise ArtefactError(f"the table {spec.table} of {name} is missing; restore it") from error
            spec = spec.with_table(copy)
        saved.append(spec)
    return saved


def base_of(manifest: Manifest, directory: Path) -> ModelSpec:
    """The spec of the base's weights; with an adapter, of the model that the adapter modifies.

    Saved weights of a quantized model are quantized, and their config says how.
    """
    if manifest.saved_base == "base":
        return replace(manifest.base, path=str(directory / "base"), revision=None, quantization=None)
    return manifest.base


def with_adapter(spec: ModelSpec, manifest: Manifest, directory: Path) -> Member:
    """Load the base with the artefact's adapter, or return the spec if there is no adapter."""
    return load_with_adapter(spec, directory / "adapter") if manifest.saved_base == "adapter" else spec


def placed(spec: AssistantSpec, directory: Path, **options: str) -> AssistantSpec:
    """Complete a spec of the artefact in `directory`: a tool with the path of its table, a model with `options`.

    Raises:
        ArtefactError: a table is outside of the artefact.
    """
    if isinstance(spec, ModelSpec):
        return replace(spec, **options)
    if spec.table is None:
        return spec
    if spec.table.is_absolute() or ".." in spec.table.parts:
        raise ArtefactError(f"{directory} has the table {spec.table}, expected a path inside of it ({TABLES}/..)")
    return spec.with_table(directory / spec.table)


def check_tokenizer(identity: TokenizerIdentity, manifest: Manifest, directory: Path) -> None:
    """Check that the base's tokenizer is the one that the collaboration was made with.

    Raises:
        ArtefactError: vocabulary, special tokens or chat template changed.
    """
    if identity.hash != manifest.tokenizer_hash:
        raise ArtefactError(
            f"the tokenizer of {manifest.base.path} is not the one {directory} was made with "
            f"({identity.hash[:15]}, expected {manifest.tokenizer_hash[:15]}), which its head requires; "
            "restore the model's revision or train again"
        )
    if identity.chat_template_hash != manifest.chat_template_hash:
        raise ArtefactError(
            f"the chat template of {manifest.base.path} changed since {directory} was made; "
            "restore the model's revision or train again"
        )


def write_head(directory: Path, head: DeferralHead) -> None:
    """Write head.safetensors with weight (K, H) and bias (K,)."""
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, directory / HEAD)


def read_head(directory: Path, expected: dict[str, int]) -> DeferralHead:
    """Read head.safetensors.

    Args:
        expected: hidden_size and num_assistants.

    Raises:
        ArtefactError: the file is missing or corrupt, or has other shapes.
    """
    path = directory / HEAD
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ArtefactError(f"{directory} has no {HEAD}; the collaboration is incomplete, train it again") from error
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is corrupt ({error}); restore it or train it again") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {"weight": (expected["num_assistants"], expected["hidden_size"]), "bias": (expected["num_assistants"],)}
    if shapes != wanted:
        raise ArtefactError(f"{path} has {shapes}, expected {wanted} for these models; it belongs to another pair")
    head = DeferralHead(**expected)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ArtefactError(f"{path} has values that are not finite, because its training diverged; train again")
    head.load_state_dict(tensors)
    return head


def read_calibration(directory: Path) -> Calibration | None:
    """Read calibration.json; None if the collaboration was not calibrated.

    Raises:
        ArtefactError: the file is damaged.
    """
    path = directory / CALIBRATION
    if not path.exists():
        return None
    try:
        return Calibration.from_dict(json.loads(read_text(path)))
    except (*DAMAGED, ConfigError) as error:
        raise ArtefactError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it and calibrate again"
        ) from error


def write_text_files(directory: Path, manifest: Manifest, calibration: Calibration | None) -> None:
    """Write collm.json, calibration.json and the model card, each atomically."""
    texts = {CARD: model_card(manifest, calibration), CONFIG: manifest.to_json()}
    if calibration is not None:
        texts[CALIBRATION] = json.dumps(calibration.to_dict(), indent=2) + "\n"
    for name, text in texts.items():
        with atomic_file(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def model_card(manifest: Manifest, calibration: Calibration | None) -> str:
    """The model card (README.md) of an artefact."""
    saved = {None: "frozen, referenced", "base": "tuned, in `base/`", "adapter": "LoRA adapter, in `adapter/`"}
    lines = [
        "---",
        "library_name: collm",
        "tags: [collm, collaborative-decoding]",
        "---",
        "",
        "# A collaboration of language models",
        "",
        f"- base: `{manifest.base.path}` ({saved[manifest.saved_base]})",
        *(f"- {author_name(k)}: {_described(spec)}" for k, spec in enumerate(manifest.assistants, start=1)),
        f"- prompt template: `{manifest.template.text!r}`" + (", chats too" if manifest.template.chat else ""),
        "",
        "The base writes the text. Where its deferral head exceeds the threshold, an assistant writes the next token",
        "([Co-LLM](https://arxiv.org/abs/2403.03870)).",
        "",
        "```python",
        "from collm import CoLLM",
        "",
        'out = CoLLM.from_pretrained("this-directory").generate(["..."])',
        "```",
        "",
        *_training_lines(manifest.training),
        *_calibration_lines(calibration),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _described(spec: AssistantSpec) -> str:
    if isinstance(spec, ModelSpec):
        return f"`{spec.path}`"
    return f"`{spec}`, code that is not included and runs on this machine" if spec.foreign else f"`{spec}`"


def _training_lines(training: dict[str, Any]) -> list[str]:
    if not training:
        return []
    return ["## Training", "", *(f"- {name}: {value}" for name, value in training.items()), ""]


def _calibration_lines(calibration: Calibration | None) -> list[str]:
    if calibration is None:
        return ["Not calibrated: pass a threshold, or run `collm calibrate`.", ""]
    best = calibration.best()
    return [
        "## Calibration",
        "",
        f"{calibration.metric_name} on {calibration.num_prompts} validation prompts; default threshold "
        f"{threshold_text(best.threshold)}. At threshold 1 only the base writes, below 0 only the assistants.",
        "",
        f"| threshold | deferral rate | interval | {calibration.metric_name} | interval | best |",
        "|--:|--:|--:|--:|--:|---|",
        *(
            f"| {threshold_text(p.threshold)} | {p.deferral_rate:.1%} | {p.rate_low:.1%} - {p.rate_high:.1%} "
            f"| {p.metric:.3f} | {p.low:.3f} - {p.high:.3f} | {', '.join(calibration.uses(p))} |"
            for p in calibration.points
        ),
        "",
        *(f"{check.summary(calibration.metric_name)}\n" for check in calibration.checks),
    ]
