"""Load and save a collaboration: its parts in memory, its files on disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from collm import artefact
from collm.artefact import Manifest, SavedBase
from collm.atomic import atomic_directory
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.core.types import author_name
from collm.errors import ArtefactError, ConfigError
from collm.models.adapters import check_adapter
from collm.models.guards import TokenizerIdentity
from collm.models.loading import ModelSpec, load_tokenizer
from collm.models.members import AssistantSpec, Member, spec_of
from collm.models.progress import quiet_if_small
from collm.models.template import PromptTemplate
from collm.tools.spec import ToolFunction
from collm.untrusted import contained


@dataclass(frozen=True)
class Parts:
    """The parts of a collaboration that an artefact stores. They are arguments and attributes of `CoLLM`."""

    base: Member
    assistants: Sequence[Member | ToolFunction]
    head: DeferralHead
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    calibration: Calibration | None = None
    accept_differences: Sequence[str] = ()
    training: dict[str, Any] = field(default_factory=dict)


def load_parts(
    directory: Path,
    *,
    base: Member | None = None,
    assistants: Sequence[Member | ToolFunction] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_code: bool = False,
    load_adapter: bool = True,
) -> Parts:
    """Read an artefact. The arguments are those of `CoLLM.from_pretrained`, which also lists the errors.

    Args:
        load_adapter: load a base that has an adapter; without it such a base stays a spec.
    """
    manifest = artefact.read_manifest(contained(directory))
    if not trust_code and assistants is None:
        artefact.check_trusted(manifest, directory)
    head = artefact.read_head(directory, manifest.head)
    placements = _placements(device, dtype, 1 + len(manifest.assistants))
    saved_base = artefact.base_of(manifest, directory)
    tokenizer = load_tokenizer(base if isinstance(base, ModelSpec) else saved_base)
    artefact.check_tokenizer(TokenizerIdentity.of(tokenizer), manifest, directory)
    if base is None:
        base = replace(saved_base, **placements[0])
        base = artefact.with_adapter(base, manifest, directory) if load_adapter else base
    if assistants is None:
        pairs = zip(manifest.assistants, placements[1:], strict=True)
        assistants = [artefact.placed(spec, directory, **placement) for spec, placement in pairs]
    return Parts(
        base,
        assistants,
        head,
        tokenizer,
        manifest.template,
        artefact.read_calibration(directory),
        manifest.accept_differences,
        manifest.training,
    )


def _placements(device: str | None, dtype: str | None, models: int) -> list[dict[str, str]]:
    """The device and dtype of each model, where they replace those of the artefact.

    Raises:
        ConfigError: the number of devices is neither one nor the number of models.
    """
    devices = [None] * models if device is None else device.split(",")
    if len(devices) == 1:
        devices *= models
    if len(devices) != models:
        raise ConfigError(
            f"device names {len(devices)} devices ({device}), expected one, or one for each of {models} models"
        )
    given = [{"device": each, "dtype": dtype} for each in devices]
    return [{key: value for key, value in options.items() if value is not None} for options in given]


def save_parts(parts: Parts, path: str | Path, source: Path | None = None) -> None:
    """Write an artefact, as `CoLLM.save_pretrained` describes it.

    Args:
        source: the artefact that the base was loaded from, whose weights are copied.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and ((path / artefact.CONFIG).exists() or not any(path.iterdir()))):
        raise ArtefactError(f"{path} exists and is no collaboration; choose another directory or remove it")
    with atomic_directory(path.resolve(), replaces=artefact.ENTRIES) as directory:
        saved = _save_base(parts, directory, source)
        artefact.write_head(directory, parts.head)
        manifest = _manifest(parts, saved)
        manifest = replace(manifest, assistants=artefact.save_tables(directory, manifest.assistants))
        artefact.write_text_files(directory, manifest, parts.calibration)


def save_calibration(calibration: Calibration | None, path: str | Path) -> None:
    """Write a calibration, its default threshold and the model card into an existing artefact."""
    manifest = replace(artefact.read_manifest(contained(Path(path))), default_threshold=default_threshold(calibration))
    artefact.write_text_files(Path(path), manifest, calibration)


def default_threshold(calibration: Calibration | None) -> float | None:
    """The best threshold of a calibration."""
    return calibration.best().threshold if calibration else None


def _save_base(parts: Parts, directory: Path, source: Path | None) -> SavedBase | None:
    """Write the base's weights or its adapter, unless the base is a reference to a model elsewhere."""
    base: Any = parts.base
    folder: SavedBase = "adapter" if hasattr(base, "peft_config") else "base"
    if isinstance(base, nn.Module):
        # Without the option, peft looks for the config of a base that is no directory, to compare vocabulary sizes.
        options = {"save_embedding_layers": False} if folder == "adapter" else {}
        with quiet_if_small(base):
            cast(Any, base).save_pretrained(directory / folder, **options)
    else:
        here = [one for one in get_args(SavedBase) if source is not None and (source / one).exists()]
        if not here:
            return None
        (folder,) = here
        shutil.copytree(cast(Path, source) / folder, directory / folder)
    if folder == "base":
        parts.tokenizer.save_pretrained(directory / folder)
    else:
        check_adapter(directory / folder)  # An adapter that cannot be loaded again is not saved.
    return folder


def _manifest(parts: Parts, saved: SavedBase | None) -> Manifest:
    base = spec_of(parts.base)
    if base is None and saved == "adapter":
        raise ArtefactError("the base under the adapter has no path to reference; load it with from_pretrained")
    identity = TokenizerIdentity.of(parts.tokenizer)
    return Manifest(
        base=cast("ModelSpec | None", base) or ModelSpec(path="base"),
        assistants=_assistant_specs(cast("Sequence[Member]", parts.assistants)),
        saved_base=saved,
        head={"hidden_size": parts.head.hidden_size, "num_assistants": parts.head.num_assistants},
        tokenizer_hash=identity.hash,
        chat_template_hash=identity.chat_template_hash,
        template=parts.template,
        accept_differences=list(parts.accept_differences),
        default_threshold=default_threshold(parts.calibration),
        training=parts.training,
    )


def _assistant_specs(assistants: Sequence[Member]) -> list[AssistantSpec]:
    specs = [spec_of(assistant) for assistant in assistants]
    for number, spec in enumerate(specs, start=1):
        if spec is None:
            raise ArtefactError(
                f"{author_name(number)} was made in memory and has no path to reference; save it with "
                "save_pretrained and load it from there"
            )
    return cast("list[AssistantSpec]", specs)
