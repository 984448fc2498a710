"""The artefact: the files of a collaboration on disk, and its parts in memory that they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from collm.artefact.card import model_card
from collm.artefact.manifest import CONFIG, Manifest, SavedBase, library_versions, local_directory, read_manifest
from collm.atomic import atomic_directory, write_text
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.core.types import author_name
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.adapters import check_adapter
from collm.models.loading import ModelSpec, load_tokenizer, load_with_adapter
from collm.models.members import AssistantSpec, Member, spec_of
from collm.models.progress import quiet_if_small
from collm.text.guards import TokenizerIdentity
from collm.text.template import PromptTemplate
from collm.tools.spec import ToolFunction, ToolSpec, not_trusted
from collm.untrusted import read_text

__all__ = [
    "Parts",
    "default_threshold",
    "library_versions",
    "load_parts",
    "local_directory",
    "read_manifest",
    "save_calibration",
    "save_parts",
]

HEAD, CALIBRATION, CARD, TABLES = "head.safetensors", "calibration.json", "README.md", "tables"
ENTRIES = (CONFIG, HEAD, CALIBRATION, CARD, TABLES, *get_args(SavedBase))
"""Everything in a collaboration's directory that saving writes, replaces or removes."""


def _check_tokenizer(identity: TokenizerIdentity, manifest: Manifest, directory: Path) -> None:
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


def _read_head(directory: Path, expected: dict[str, int]) -> DeferralHead:
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


def _read_calibration(directory: Path) -> Calibration | None:
    path = directory / CALIBRATION
    if not path.exists():
        return None
    try:
        return Calibration.from_dict(json.loads(read_text(path)))
    except (*DAMAGED, ConfigError) as error:
        raise ArtefactError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it and calibrate again"
        ) from error


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
    manifest = read_manifest(directory)
    foreign = [str(spec) for spec in manifest.assistants if isinstance(spec, ToolSpec) and spec.is_user_function]
    if foreign and not trust_code and assistants is None:
        raise ArtefactError(not_trusted(directory, foreign[0]))
    head = _read_head(directory, manifest.head)
    placements = _placements(device, dtype, 1 + len(manifest.assistants))
    weights = manifest.base_weights(directory)
    tokenizer = load_tokenizer(base if isinstance(base, ModelSpec) else weights)
    _check_tokenizer(TokenizerIdentity.of(tokenizer), manifest, directory)
    if base is None:
        base = replace(weights, **placements[0])
        if load_adapter and manifest.saved_base == "adapter":
            base = load_with_adapter(base, directory / "adapter")
    if assistants is None:
        pairs = zip(manifest.assistants, placements[1:], strict=True)
        assistants = [_placed(spec, directory, placement) for spec, placement in pairs]
    return Parts(
        base,
        assistants,
        head,
        tokenizer,
        manifest.template,
        _read_calibration(directory),
        manifest.accept_differences,
        manifest.training,
    )


def _placements(device: str | None, dtype: str | None, models: int) -> list[dict[str, str]]:
    """The device and dtype of each model, where they replace those of the artefact."""
    devices = [None] * models if device is None else device.split(",")
    if len(devices) == 1:
        devices *= models
    if len(devices) != models:
        raise ConfigError(
            f"device names {len(devices)} devices ({device}), expected one, or one for each of {models} models"
        )
    given = [{"device": each, "dtype": dtype} for each in devices]
    return [{key: value for key, value in options.items() if value is not None} for options in given]


def _placed(spec: AssistantSpec, directory: Path, options: dict[str, str]) -> AssistantSpec:
    """Complete a spec of the artefact in `directory`: a tool with the path of its table, a model with `options`."""
    if isinstance(spec, ModelSpec):
        return replace(spec, **options)
    if spec.table is None:
        return spec
    if spec.table.is_absolute() or ".." in spec.table.parts:
        raise ArtefactError(f"{directory} has the table {spec.table}, expected a path inside of it ({TABLES}/..)")
    return replace(spec, argument=str(directory / spec.table))


def save_parts(parts: Parts, path: str | Path, source: Path | None = None) -> None:
    """Write an artefact, as `CoLLM.save_pretrained` describes it.

    Args:
        source: the artefact that the base was loaded from, whose weights are copied.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and ((path / CONFIG).exists() or not any(path.iterdir()))):
        raise ArtefactError(f"{path} exists and is no collaboration; choose another directory or remove it")
    with atomic_directory(path.resolve(), replaces=ENTRIES) as directory:
        saved = _save_base(parts, directory, source)
        tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in parts.head.state_dict().items()}
        save_file(tensors, directory / HEAD)
        _write_texts(directory, _manifest(parts, saved, directory), parts.calibration)


def save_calibration(calibration: Calibration | None, path: str | Path) -> None:
    """Write a calibration, its default threshold and the model card into an existing artefact."""
    manifest = replace(read_manifest(Path(path)), default_threshold=default_threshold(calibration))
    _write_texts(Path(path), manifest, calibration)


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


def _manifest(parts: Parts, saved: SavedBase | None, directory: Path) -> Manifest:
    base = spec_of(parts.base)
    if base is None and saved == "adapter":
        raise ArtefactError("the base under the adapter has no path to reference; load it with from_pretrained")
    identity = TokenizerIdentity.of(parts.tokenizer)
    return Manifest(
        base=cast("ModelSpec | None", base) or ModelSpec(path="base"),
        assistants=_save_assistants(parts, directory),
        saved_base=saved,
        head={"hidden_size": parts.head.hidden_size, "num_assistants": parts.head.num_assistants},
        tokenizer_hash=identity.hash,
        chat_template_hash=identity.chat_template_hash,
        template=parts.template,
        accept_differences=list(parts.accept_differences),
        default_threshold=default_threshold(parts.calibration),
        training=parts.training,
    )


def _save_assistants(parts: Parts, directory: Path) -> list[AssistantSpec]:
    """Copy the tables of tools into the artefact, and return the specs of all assistants, with the copies' paths."""
    saved = []
    for number, assistant in enumerate(cast("Sequence[Member]", parts.assistants), start=1):
        spec, name = spec_of(assistant), author_name(number)
        if spec is None:
            raise ArtefactError(
                f"{name} was made in memory and has no path to reference; save it with save_pretrained and load it "
                "from there"
            )
        if isinstance(spec, ToolSpec) and spec.table is not None:
            copy = Path(TABLES) / f"{name}{spec.table.suffix}"
            (directory / TABLES).mkdir(exist_ok=True)
            try:
                shutil.copyfile(spec.table, directory / copy)
            except FileNotFoundError as error:
                raise ArtefactError(f"the table {spec.table} of {name} is missing; restore it") from error
            spec = replace(spec, argument=str(copy))
        saved.append(spec)
    return saved


def _write_texts(directory: Path, manifest: Manifest, calibration: Calibration | None) -> None:
    """Write collm.json, calibration.json and the model card, each atomically."""
    write_text(directory / CARD, model_card(manifest, calibration))
    write_text(directory / CONFIG, manifest.to_json())
    if calibration is not None:
        write_text(directory / CALIBRATION, json.dumps(calibration.to_dict(), indent=2) + "\n")
