"""The artefact: the files of a collaboration on disk, and its parts in memory that they hold."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from collm.artefact.card import model_card
from collm.artefact.manifest import CONFIG, Manifest, SavedBase, read_manifest
from collm.atomic import atomic_directory, write_text
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.core.types import author_name
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.adapters import check_adapter
from collm.models.loading import ModelSpec, load_tokenizer, load_with_adapter, quiet_if_small
from collm.models.members import AssistantSpec, Member, spec_of
from collm.models.names import looks_like_path
from collm.text.guards import TokenizerIdentity
from collm.text.template import PromptTemplate
from collm.tools.spec import ToolFunction, not_trusted
from collm.untrusted import read_text
from collm.version import __version__

HEAD, CALIBRATION, CARD, TABLES = "head.safetensors", "calibration.json", "README.md", "tables"
ENTRIES = (CONFIG, HEAD, CALIBRATION, CARD, TABLES, *get_args(SavedBase))
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

    def save_pretrained(self, path: str | Path) -> None:
        """Write the artefact. An existing artefact at `path` is replaced atomically; other files beside it are kept.

        The weights of a base that is a module are saved, of a PEFT model only the adapter. A base that is a spec is
        referenced by its path.

        Raises:
            ArtefactError: `path` is not a collaboration, or an assistant has no path to reference.
            LoadError: the base's adapter is not LoRA, so it could not be loaded again.
            WriteError: the disk is full or not writable. `path` is unchanged.
        """
        path = Path(path)
        if path.exists() and not (path.is_dir() and ((path / CONFIG).exists() or not any(path.iterdir()))):
            raise ArtefactError(f"{path} exists and is no collaboration; choose another directory or remove it")
        with atomic_directory(path.resolve(), replaces=ENTRIES) as directory:
            saved_base = _save_base(self, directory)
            head = self.head.state_dict().items()
            save_file({name: values.cpu().float().contiguous() for name, values in head}, directory / HEAD)
            base = cast("ModelSpec | None", spec_of(self.base))
            if base is None and saved_base == "adapter":
                raise ArtefactError("the base under the adapter has no path to reference; load it with from_pretrained")
            identity = TokenizerIdentity.of(self.tokenizer)
            manifest = Manifest(
                base=base or ModelSpec(path="base"),
                assistants=[_save_assistant(one, k, directory) for k, one in enumerate(self.assistants, start=1)],
                saved_base=saved_base,
                head={"hidden_size": self.head.hidden_size, "num_assistants": self.head.num_assistants},
                tokenizer_hash=identity.hash,
                chat_template_hash=identity.chat_template_hash,
                template=self.template,
                accept_differences=list(self.accept_differences),
                default_threshold=default_threshold(self.calibration),
                training=self.training,
                versions=library_versions(),
            )
            _write_texts(directory, manifest, self.calibration)

    def save_calibration(self, path: str | Path) -> None:
        """Write the calibration, the default threshold and the model card into an existing artefact."""
        manifest = replace(read_manifest(Path(path)), default_threshold=default_threshold(self.calibration))
        _write_texts(Path(path), manifest, self.calibration)

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
    assistants: Sequence[Member | ToolFunction] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_code: bool = False,
    load_adapter: bool = True,
) -> Parts:
    """Read an artefact as `CoLLM.from_pretrained` does. Without `load_adapter` a base with an adapter stays a spec."""
    manifest = read_manifest(directory)
    functions = [str(one) for one in manifest.assistants if one.is_user_function]
    if functions and not trust_code and assistants is None:
        raise ArtefactError(not_trusted(directory, functions[0]))
    head = _read_head(directory, manifest.head)
    base_device, *devices = _devices(device, 1 + len(manifest.assistants))
    weights = cast(ModelSpec, _placed(manifest.base_weights(directory), directory, base_device, dtype))
    tokenizer = load_tokenizer(base if isinstance(base, ModelSpec) else weights)
    _check_tokenizer(TokenizerIdentity.of(tokenizer), manifest, directory)
    source = directory if base is None else None
    if base is None:
        has_adapter = load_adapter and manifest.saved_base == "adapter"
        base = load_with_adapter(weights, directory / "adapter") if has_adapter else weights
    if assistants is None:
        pairs = zip(manifest.assistants, devices, strict=True)
        assistants = [_placed(spec, directory, device, dtype) for spec, device in pairs]
    return Parts(
        base,
        assistants,
        head,
        tokenizer,
        template=manifest.template,
        calibration=_read_calibration(directory),
        accept_differences=manifest.accept_differences,
        training=manifest.training,
        source=source,
    )


def _devices(device: str | None, models: int) -> Sequence[str | None]:
    """The device of each model, where it replaces that of the artefact."""
    devices = [None] if device is None else device.split(",")
    if len(devices) not in (1, models):
        raise ConfigError(
            f"device names {len(devices)} devices ({device}), expected one, or one for each of {models} models"
        )
    return devices if len(devices) == models else devices * models


def _placed(spec: AssistantSpec, directory: Path, device: str | None, dtype: str | None) -> AssistantSpec:
    """Complete a spec of the artefact in `directory`: a tool with the path of its table, a model with its place."""
    if isinstance(spec, ModelSpec):
        return replace(spec, device=device or spec.device, dtype=dtype or spec.dtype)
    if spec.table is None:
        return spec
    if spec.table.is_absolute() or ".." in spec.table.parts:
        raise ArtefactError(f"{directory} has the table {spec.table}, expected a path inside of it ({TABLES}/..)")
    return replace(spec, argument=str(directory / spec.table))


def _read_head(directory: Path, expected: dict[str, int]) -> DeferralHead:
    path = directory / HEAD
    if not path.exists():
        raise ArtefactError(f"{directory} has no {HEAD}; the collaboration is incomplete, train it again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is corrupt ({error}); restore it or train it again") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {"weight": (expected["num_assistants"], expected["hidden_size"]), "bias": (expected["num_assistants"],)}
    if shapes != wanted:
        raise ArtefactError(f"{path} has {shapes}, expected {wanted} for these models; it belongs to another pair")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArtefactError(f"{path} has values that are not finite, because its training diverged; train again")
    head = DeferralHead(**expected)
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


def _read_calibration(directory: Path) -> Calibration | None:
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
    else:
        check_adapter(directory / folder)  # An adapter that cannot be loaded again is not saved.
    return folder


def _save_assistant(assistant: Member | ToolFunction, number: int, directory: Path) -> AssistantSpec:
    """The spec of an assistant. The table of a tool is copied into the artefact."""
    spec, name = spec_of(cast(Member, assistant)), author_name(number)
    if spec is None:
        raise ArtefactError(f"{name} was made in memory and has no path to reference; save it, and load it from there")
    if spec.table is None:
        return spec
    copy = Path(TABLES) / f"{name}{spec.table.suffix}"
    (directory / TABLES).mkdir(exist_ok=True)
    if not spec.table.exists():
        raise ArtefactError(f"the table {spec.table} of {name} is missing; restore it")
    shutil.copyfile(spec.table, directory / copy)
    return replace(spec, argument=str(copy))


def _write_texts(directory: Path, manifest: Manifest, calibration: Calibration | None) -> None:
    """Write collm.json, calibration.json and the model card, each atomically."""
    write_text(directory / CARD, model_card(manifest, calibration))
    write_text(directory / CONFIG, manifest.to_json())
    if calibration is not None:
        write_text(directory / CALIBRATION, json.dumps(calibration.to_dict(), indent=2) + "\n")
