"""The artefact: the files of a collaboration on disk, and its parts in memory that they hold."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from collm.artefact.card import model_card
from collm.artefact.manifest import CONFIG, GGUF_BASE, Manifest, SavedBase, read_manifest
from collm.atomic import atomic_directory, write_text
from collm.core.calibration import Calibration
from collm.core.devices import check_device
from collm.core.head import DeferralHead
from collm.core.types import BASE, author_name
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.adapters import check_adapter
from collm.models.loading import ModelSpec, load_tokenizer, quiet_if_small
from collm.models.members import AssistantSpec, Member, spec_of, stop_ids
from collm.models.names import looks_like_path
from collm.text.guards import TokenizerIdentity
from collm.text.template import PromptTemplate
from collm.tools.spec import PREFIX, ToolFunction, ToolSpec, not_trusted
from collm.untrusted import read_text
from collm.version import __version__

if TYPE_CHECKING:
    from collm.models.gguf_export import GgufType

HEAD, CALIBRATION, CARD = "head.safetensors", "calibration.json", "README.md"
TABLES, MODELS = "tables", "models"
ENTRIES = (CONFIG, HEAD, CALIBRATION, CARD, TABLES, MODELS, *get_args(SavedBase))
"""Everything in a collaboration's directory that saving writes, replaces or removes."""


@dataclass(eq=False, repr=False)
class Parts:
    """The parts of a collaboration that an artefact stores; `CoLLM` documents them.

    Attributes:
        source: the artefact that the parts come from; None if its base was replaced.
    """

    base: Member
    assistants: Sequence[Member | ToolFunction]
    head: DeferralHead
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    template: PromptTemplate = None  # type: ignore[assignment]  # by default the tokenizer's
    calibration: Calibration | None = None
    accept_differences: Sequence[str] = ()
    training: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None

    def save_pretrained(self, path: str | Path, *, gguf: GgufType | None = None) -> None:
        """Write the artefact. An existing artefact at `path` is replaced atomically; other files beside it are kept.

        The weights of a base that is a module are saved, of a PEFT model only the adapter. A base that is a spec is
        referenced by its path, unless it is in the artefact that the parts come from (`pack`).

        Args:
            gguf: write the base as a GGUF file with matrices of this type, with its adapter merged. The calibration
                stays, although it was made with other weights.

        Raises:
            ArtefactError: `path` is not a collaboration, or an assistant has no path to reference.
            LoadError: the base's adapter is not LoRA, so it could not be loaded again.
            ConfigError, UnsupportedModel: the base cannot be written as GGUF (`models.gguf_export.write_gguf`).
            WriteError: the disk is full or not writable. `path` is unchanged.
        """
        path = Path(path)
        if path.exists() and not (path.is_dir() and ((path / CONFIG).exists() or not any(path.iterdir()))):
            raise ArtefactError(f"{path} exists and is not a collaboration; choose another directory or remove it")
        with atomic_directory(path.resolve(), replaces=ENTRIES) as directory:
            saved_base = _save_base(self, directory) if gguf is None else _save_gguf(self, directory, gguf)
            head = self.head.state_dict().items()
            save_file({name: values.cpu().float().contiguous() for name, values in head}, directory / HEAD)
            base = cast("ModelSpec | None", spec_of(self.base))
            if base is None and saved_base == "adapter":
                raise ArtefactError("the base under the adapter has no path to reference; load it with from_pretrained")
            if base is not None and saved_base is not None:
                base = replace(base, adapter=None)  # what is saved has it
            identity, source, copies = TokenizerIdentity.of(self.tokenizer), self.source, dict[Path, Path]()
            if base is not None and saved_base in (None, "adapter"):
                base = save_model(base, author_name(BASE), directory, source, copies)
            numbered = enumerate(self.assistants, start=1)
            manifest = Manifest(
                base=base or ModelSpec(path="base"),
                assistants=[save_assistant(one, author_name(k), directory, source, copies) for k, one in numbered],
                saved_base=saved_base,
                head=self.head.shape,
                predicts_gain=self.head.predicts_gain,
                weights=None if base is None or saved_base in ("base", "gguf") else base.identity()["weights"],
                tokenizer_hash=identity.hash,
                chat_template_hash=identity.chat_template_hash,
                template=self.template if gguf is None else _with_eos(self),
                accept_differences=list(self.accept_differences),
                default_threshold=default_threshold(self.calibration),
                training=self.training,
                versions=library_versions(),
            )
            write_texts(directory, manifest, self.calibration)

    def save_calibration(self, path: str | Path) -> None:
        """Write the calibration, the default threshold and the model card into an existing artefact."""
        manifest = replace(read_manifest(Path(path)), default_threshold=default_threshold(self.calibration))
        write_texts(Path(path), manifest, self.calibration)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, commit_message: str = "Add collaboration"
    ) -> str:
        """Upload the artefact to the Hub and return its URL."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "collaboration"
            self.save_pretrained(directory)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message)
        return str(address)


def local_directory(path: str | Path, revision: str | None) -> Path:
    """The local directory of a collaboration, which is downloaded if `path` is a Hub repository id."""
    if isinstance(path, Path) or Path(path).exists() or "/" not in path or looks_like_path(path):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(path, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtefactError(
            f"there is no collaboration at {path}: no such directory, and the Hub responds: {reason}"
        ) from error


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {"collm": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def load_parts(
    directory: Path,
    *,
    base: Member | None = None,
    assistants: Sequence[Member | ToolFunction | str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_code: bool = False,
    dequantize: bool = False,
) -> Parts:
    """Read an artefact as `CoLLM.from_pretrained` does.

    With `dequantize`, models of the artefact that are GGUF files run in transformers.
    """
    manifest = read_manifest(directory)
    functions = [str(one) for one in manifest.assistants if one.is_user_function]
    if functions and not trust_code and assistants is None:
        raise ArtefactError(not_trusted(directory, functions[0]))
    head = read_head(directory, manifest)
    base_device, *devices = _devices(device, 1 + len(manifest.assistants))
    weights = cast(ModelSpec, _placed(manifest.base_weights(directory), base_device, dtype, dequantize))
    given = base if isinstance(base, ModelSpec) else weights
    if base is None or base is given:
        check_weights(given, manifest, directory)
    tokenizer = load_tokenizer(base if isinstance(base, ModelSpec) else manifest.tokenizer_source(directory))
    _check_tokenizer(TokenizerIdentity.of(tokenizer), manifest, directory)
    source = directory if base is None else None
    if base is None:
        base = weights
        if manifest.saved_base == "adapter":
            base = replace(weights, adapter=str(directory / "adapter"))
            check_adapter(directory / "adapter")
    pairs = zip(manifest.assistants, devices, strict=True)
    own = [_placed(spec, device, dtype, dequantize) for spec, device in pairs]
    return Parts(
        base,
        own if assistants is None else list(map(_given, assistants, chain(own, repeat(None)))),
        head,
        tokenizer,
        template=manifest.template,
        calibration=read_calibration(directory),
        accept_differences=manifest.accept_differences,
        training=manifest.training,
        source=source,
    )


def _devices(device: str | None, models: int) -> Sequence[str | None]:
    """The device of each model, where it replaces that of the artefact."""
    devices = [None] if device is None else device.split(",")
    for one in devices:
        check_device(one)
    if len(devices) not in (1, models):
        raise ConfigError(
            f"device names {len(devices)} devices ({device}), expected one, or one for each of {models} models"
        )
    return devices if len(devices) == models else devices * models


def _placed(spec: AssistantSpec, device: str | None, dtype: str | None, dequantize: bool) -> AssistantSpec:
    """The spec with its place in this process."""
    if not isinstance(spec, ModelSpec):
        return spec
    spec = replace(spec, device=device or spec.device, dtype=dtype or spec.dtype)
    return spec.dequantized() if dequantize else spec


def _given(assistant: Member | ToolFunction | str, own: AssistantSpec | None) -> Member | ToolFunction:
    """An assistant in place of the artefact's `own`. A text is the path of a model, which is loaded as its own is."""
    if not isinstance(assistant, str):
        return assistant
    if assistant.startswith(PREFIX):
        return ToolSpec.parse(assistant)
    given = ModelSpec.parse(assistant)
    if not isinstance(own, ModelSpec):
        return given
    return replace(own, path=given.path, revision=given.revision, adapter=given.adapter or own.adapter)


def check_weights(base: ModelSpec, manifest: Manifest, directory: Path) -> None:
    """Check that the head was trained on the base's weights."""
    found = base.identity()["weights"] if manifest.weights is not None else None
    if found != manifest.weights and found is not None:
        what = f"the weights of {base.path!r} have the digest {found:.12}, but {directory} has a head for"
        raise ArtefactError(f"{what} {manifest.weights:.12}; restore these weights, or train the head again")


def read_head(directory: Path, manifest: Manifest) -> DeferralHead:
    path, expected = directory / HEAD, manifest.head
    if not path.exists():
        raise ArtefactError(f"{directory} has no {HEAD}; the collaboration is incomplete, train it again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is corrupt ({error}); restore it or train it again") from error
    with torch.device("meta"):  # a damaged file cannot claim memory
        empty = DeferralHead(**cast(Any, expected))
    shapes, wanted = (
        {name: tuple(one.shape) for name, one in state.items()} for state in (tensors, empty.state_dict())
    )
    if shapes != wanted:
        raise ArtefactError(f"{path} has {shapes}, expected {wanted} for these models; it belongs to another pair")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArtefactError(f"{path} has values that are not finite, because its training diverged; train again")
    head = DeferralHead(**cast(Any, expected), predicts_gain=manifest.predicts_gain)
    head.load_state_dict(tensors)
    return head


def _check_tokenizer(identity: TokenizerIdentity, manifest: Manifest, directory: Path) -> None:
    for what, found, expected in (
        ("tokenizer", identity.hash, manifest.tokenizer_hash),
        ("chat template", identity.chat_template_hash, manifest.chat_template_hash),
    ):
        if found != expected:
            hashes = f"({found!s:.15}, expected {expected!s:.15})"
            what = f"the {what} of {manifest.base.path} is not the one {directory} was made with {hashes}"
            raise ArtefactError(f"{what}, which its head requires; restore the model's revision or train again")


def read_calibration(directory: Path) -> Calibration | None:
    path = directory / CALIBRATION
    if not path.exists():
        return None
    try:
        return Calibration.from_dict(json.loads(read_text(path)))
    except (*DAMAGED, ConfigError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArtefactError(f"{path} is damaged ({reason}); remove it and calibrate again") from error


def default_threshold(calibration: Calibration | None) -> float | None:
    """The best threshold of a calibration."""
    return calibration.best().threshold if calibration else None


def _save_base(parts: Parts, directory: Path) -> SavedBase | None:
    """Write the base's weights or its adapter, unless the base is a reference to a model elsewhere."""
    base: Any = parts.base
    folder: SavedBase = "adapter" if hasattr(base, "peft_config") else "base"
    if isinstance(base, nn.Module):
        # Without the option, peft looks for the config of a base that is no directory, to compare vocabulary sizes.
        options = {"save_embedding_layers": False} if folder == "adapter" else {}
        with quiet_if_small(base):
            cast(Any, base).save_pretrained(directory / folder, **options)
    else:
        source = parts.source or directory  # which has none yet
        here = [one for one in get_args(SavedBase) if (source / one).exists()]
        if not here:
            return None
        (folder,) = here
        shutil.copytree(source / folder, directory / folder)
    if folder == "base":
        parts.tokenizer.save_pretrained(directory / folder)
    elif folder == "adapter":
        check_adapter(directory / folder)  # An adapter that cannot be loaded again is not saved.
    return folder


def _save_gguf(parts: Parts, directory: Path, kind: GgufType) -> SavedBase:
    """Write the base as a GGUF file, with its config and the tokenizer beside it, which the head requires."""
    from collm.models.gguf_export import write_gguf

    base, folder = cast("nn.Module | ModelSpec", parts.base), directory / "gguf"
    write_gguf(base, parts.tokenizer, folder / GGUF_BASE, kind).save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    return "gguf"


def _with_eos(parts: Parts) -> PromptTemplate:
    """The template with all tokens that end a text, as a GGUF file has no generation config."""
    ends = [*parts.template.turn_ends, *sorted(stop_ids(parts.tokenizer, parts.base))]
    return replace(parts.template, turn_ends=tuple(dict.fromkeys(ends)))


def save_assistant(
    assistant: Member | ToolFunction, name: str, directory: Path, source: Path | None, copies: dict[Path, Path]
) -> AssistantSpec:
    """The spec of an assistant. The table of a tool is copied into the artefact."""
    spec = spec_of(cast(Member, assistant))
    if spec is None or hasattr(assistant, "peft_config"):
        what = "was made in memory and has no path to reference"
        raise ArtefactError(f"{name} {what}; save it, or its adapter, and load it from there")
    if isinstance(spec, ModelSpec):
        return save_model(spec, name, directory, source, copies)
    if spec.table is None:
        return spec
    copy = directory / TABLES / f"{name}{spec.table.suffix}"
    copy.parent.mkdir(exist_ok=True)
    if not spec.table.exists():
        raise ArtefactError(f"the table {spec.table} of {name} is missing; restore it")
    shutil.copyfile(spec.table, copy)
    return replace(spec, argument=str(copy))


def save_model(spec: ModelSpec, name: str, directory: Path, within: Path | None, copies: dict[Path, Path]) -> ModelSpec:
    """The spec of a model that is only referenced; of a copy in the artefact, if its files are `within` a directory.

    Args:
        copies: what has been copied already -> its copy. Authors that share a model share its copy.
    """
    changed = {}
    for part, path in (("path", Path(spec.path)), ("adapter", spec.adapter and Path(spec.adapter))):
        # names on the Hub are relative
        if within is None or not path or not path.is_relative_to(within.resolve()):
            continue
        if not path.exists():
            raise ArtefactError(f"{name} is {path}, which does not exist; restore it, or name another directory for it")
        if path not in copies:
            author = name if part == "path" else f"{name}-adapter"
            copy = copies[path] = directory / MODELS / author / path.name
            copy.parent.mkdir(parents=True)
            if path.is_dir():
                shutil.copytree(path, copy, ignore=_not_of_a_model)
            else:
                shutil.copyfile(path, copy)
        changed[part] = str(copies[path])
    return replace(spec, **changed)


def _not_of_a_model(directory: str, names: list[str]) -> set[str]:
    """What beside a model is not read, such as checkpoints of its training."""
    kept = ("additional_chat_templates",)
    return {name for name in names if name.startswith(".") or (Path(directory, name).is_dir() and name not in kept)}


def write_texts(directory: Path, manifest: Manifest, calibration: Calibration | None) -> None:
    """Write collm.json, calibration.json and the model card, each atomically."""
    write_text(directory / CARD, model_card(manifest, calibration).replace(f"{directory.resolve()}/", ""))
    write_text(directory / CONFIG, manifest.to_json(directory))
    if calibration is not None:
        write_text(directory / CALIBRATION, json.dumps(calibration.to_dict(), indent=2) + "\n")
