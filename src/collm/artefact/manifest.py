"""collm.json, which says what a collaboration consists of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from collm.core.types import check_threshold
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.loading import ModelSpec
from collm.models.members import AssistantSpec
from collm.models.names import looks_like_path
from collm.text.template import PromptTemplate
from collm.tools.spec import ToolSpec
from collm.untrusted import check_fields, contained, read_text
from collm.version import __version__

FORMAT = 1
CONFIG = "collm.json"
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

    def base_weights(self, directory: Path) -> ModelSpec:
        """The spec of the base's weights; with an adapter, of the model that the adapter modifies.

        Saved weights of a quantized model are quantized, and their config says how.
        """
        if self.saved_base != "base":
            return self.base
        return replace(self.base, path=str(directory / "base"), revision=None, quantization=None)

    def to_json(self) -> str:
        content = asdict(self)
        content["base"] = _to_dict(self.base)
        content["assistants"] = list(map(_to_dict, self.assistants))
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


def _to_dict(spec: AssistantSpec) -> dict[str, Any]:
    (engine,) = (name for name, kind in _ENGINES.items() if isinstance(spec, kind))
    return {**{name: value for name, value in asdict(spec).items() if value is not None}, "engine": engine}


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
        ArtefactError: the file is missing, damaged or has another format, or a link in the directory leads out of it.
    """
    path = contained(directory) / CONFIG
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
