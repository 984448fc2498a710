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
SavedBase = Literal["base", "adapter", "gguf"]
"""Directory of the tuned base, of its adapter, or of a GGUF file."""
GGUF_BASE = "base.gguf"
HERE = "./"
"""Beginning of the path of a model in the artefact. Other relative paths are names on the Hub."""


@dataclass(frozen=True)
class Manifest:
    """The content of collm.json. Paths inside the artefact are relative in the file, and absolute here.

    Attributes:
        saved_base: directory of the base in the artefact, None for a frozen base.
        weights: digest of the weights of the base (`ModelSpec.identity`) that the head was trained on; None for saved
            weights or those of the Hub.
        head: the shape of the head (`DeferralHead.shape`).
        predicts_gain: whether the head's outputs are gains in nats (`DeferralHead`).
        tokenizer_hash, chat_template_hash: hashes of the base's tokenizer.
        default_threshold: threshold chosen by calibration, None before it.
        training: training options and measurements for the model card.
    """

    base: ModelSpec
    assistants: list[AssistantSpec]
    saved_base: SavedBase | None
    head: dict[str, int | bool]
    tokenizer_hash: str
    chat_template_hash: str | None
    template: PromptTemplate
    accept_differences: list[str]
    weights: str | None = None
    predicts_gain: bool = False
    default_threshold: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def base_weights(self, directory: Path) -> ModelSpec:
        """The spec of the base's weights; with an adapter, of the model that the adapter modifies."""
        if self.saved_base in (None, "adapter"):
            return self.base
        # The config of saved weights says how they are quantized.
        saved = replace(self.base, path=str(directory / "base"), revision=None, quantization=None)
        if self.saved_base == "base":
            return saved
        return replace(saved, path=str(directory / "gguf" / GGUF_BASE), dtype="auto", attention=None)

    def tokenizer_source(self, directory: Path) -> ModelSpec:
        """The spec that the base's tokenizer is loaded from: a directory beside a GGUF file that an export wrote."""
        weights = self.base_weights(directory)
        return weights if self.saved_base != "gguf" else replace(weights, path=str(directory / "gguf"))

    def to_json(self, directory: Path) -> str:
        """The text of the file in this directory."""
        base, *assistants = (_to_dict(spec, directory.resolve()) for spec in (self.base, *self.assistants))
        content = asdict(self) | {"base": base, "assistants": assistants}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


_ENGINES: dict[str, type[ModelSpec] | type[ToolSpec]] = {"transformers": ModelSpec, "python": ToolSpec}


def _to_dict(spec: AssistantSpec, root: Path) -> dict[str, Any]:
    (engine,) = (name for name, kind in _ENGINES.items() if isinstance(spec, kind))
    content = {**{name: value for name, value in asdict(spec).items() if value is not None}, "engine": engine}
    for name, prefix in (("path", HERE), ("adapter", HERE), ("argument", "")):
        if name in content and Path(content[name]).is_relative_to(root):
            content[name] = prefix + Path(content[name]).relative_to(root).as_posix()
    return content


def _spec(content: dict[str, Any], directory: Path) -> AssistantSpec:
    if (engine := content.pop("engine")) not in _ENGINES:
        raise ValueError(f"engine {engine!r} is not known to this version")
    for name in ("path", "adapter"):
        if str(content.get(name)).startswith(HERE):
            content[name] = _inside(directory, content[name], "model")
    spec = _ENGINES[engine](**content)
    return spec if spec.table is None else replace(spec, argument=_inside(directory, spec.table, "table"))


def _inside(directory: Path, path: str | Path, what: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ArtefactError(f"{directory} has the {what} {path}, expected a path inside of it")
    return str(directory.resolve() / path)


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
        return _checked(content, directory)
    except (*DAMAGED, ConfigError) as error:
        raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {error}); restore it or retrain") from error


def _checked(content: dict[str, Any], directory: Path) -> Manifest:
    if unknown := content.keys() - {one.name for one in fields(Manifest)}:
        raise ValueError(f"it has the unknown field {min(unknown)!r}")
    template, (base, *assistants) = (
        content["template"],
        [_spec(spec, directory) for spec in (content["base"], *content["assistants"])],
    )
    template = PromptTemplate(**{**template, "turn_ends": tuple(template.get("turn_ends", ()))})
    manifest = Manifest(**{**content, "base": base, "assistants": assistants, "template": template})
    for record in (manifest, manifest.base, *assistants, template):
        check_fields(record)
    if manifest.default_threshold is not None:
        check_threshold(manifest.default_threshold)
    least = {"hidden_size": 1, "num_assistants": 1, "width": 0, "doubt": 0}
    if manifest.head.keys() != least.keys() or any(manifest.head[name] < low for name, low in least.items()):
        raise ValueError(f"head is {manifest.head!r:.80}, expected {', '.join(least)}")
    if not all(0 <= end < 1 << 31 for end in template.turn_ends):
        raise ValueError(f"turn_ends is {template.turn_ends!r:.80}, expected token ids")
    return manifest
