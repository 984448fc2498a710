"""collm.json, which says what a collaboration consists of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from collm.core.types import check_threshold
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.loading import ModelSpec
from collm.models.members import AssistantSpec
from collm.text.template import PromptTemplate
from collm.tools.spec import ToolSpec
from collm.untrusted import check_fields, contained, read_text

FORMAT = 1
CONFIG = "collm.json"
SavedBase = Literal["base", "adapter"]
"""Directory of the tuned base or of its adapter."""


@dataclass(frozen=True)
class Manifest:
    """The content of collm.json.

    Attributes:
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
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def base_weights(self, directory: Path) -> ModelSpec:
        """The spec of the base's weights; with an adapter, of the model that the adapter modifies."""
        if self.saved_base != "base":
            return self.base
        # The config of saved weights says how they are quantized.
        return replace(self.base, path=str(directory / "base"), revision=None, quantization=None)

    def to_json(self) -> str:
        content = asdict(self) | {"base": _to_dict(self.base), "assistants": list(map(_to_dict, self.assistants))}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


_ENGINES: dict[str, type[ModelSpec] | type[ToolSpec]] = {"transformers": ModelSpec, "python": ToolSpec}


def _to_dict(spec: AssistantSpec) -> dict[str, Any]:
    (engine,) = (name for name, kind in _ENGINES.items() if isinstance(spec, kind))
    return {**{name: value for name, value in asdict(spec).items() if value is not None}, "engine": engine}


def _spec(content: dict[str, Any]) -> AssistantSpec:
    if (engine := content.pop("engine")) not in _ENGINES:
        raise ValueError(f"engine {engine!r} is not known to this version")
    return _ENGINES[engine](**content)


def read_manifest(directory: Path) -> Manifest:
    """Read collm.json, unless a link in the directory leads out of it."""
    path = contained(directory) / CONFIG
    if not directory.exists():
        raise ArtefactError(f"there is no collaboration at {directory}: no such directory")
    if not path.exists():
        raise ArtefactError(f"{directory} is not a collaboration, as it has no {CONFIG}; save_pretrained writes one")
    try:
        content = json.loads(read_text(path))
        if content.get("format") != FORMAT:
            raise ArtefactError(f"{path} has format {content.get('format')!r}, this version reads {FORMAT}")
        return _checked(content)
    except (*DAMAGED, ConfigError) as error:
        raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {error}); restore it or retrain") from error


def _checked(content: dict[str, Any]) -> Manifest:
    if unknown := content.keys() - {one.name for one in fields(Manifest)}:
        raise ValueError(f"it has the unknown field {min(unknown)!r}")
    template, assistants = content["template"], [_spec(spec) for spec in content["assistants"]]
    template = PromptTemplate(**{**template, "turn_ends": tuple(template.get("turn_ends", ()))})
    manifest = Manifest(**{**content, "base": _spec(content["base"]), "assistants": assistants, "template": template})
    for record in (manifest, manifest.base, *assistants, template):
        check_fields(record)
    if manifest.default_threshold is not None:
        check_threshold(manifest.default_threshold)
    if manifest.head.keys() != {"hidden_size", "num_assistants"} or min(manifest.head.values()) < 1:
        raise ValueError(f"head is {manifest.head!r:.80}, expected hidden_size and num_assistants")
    if not all(0 <= end < 1 << 31 for end in template.turn_ends):
        raise ValueError(f"turn_ends is {template.turn_ends!r:.80}, expected token ids")
    return manifest
