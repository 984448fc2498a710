"""Tuned weights on disk: a file for the head, and a directory for the base model or adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from collm.core.head import DeferralHead
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.models.loading import ModelSpec, load_adapted, quiet_if_small
from collm.models.members import spec_of
from collm.training.module import JointModule

HEAD = "head.safetensors"
FOLDERS = {"full": "base", "lora": "adapter"}  # of the tuned base; a frozen base is not saved
STATE = "trainer_state.json"
ORIGIN = "trained_on.json"
_ORIGIN = {
    "examples": "rows (or another tokenizer, template or max_length)",
    "evaluation": "evaluation rows",
    "base": "weights of the base",
    "assistants": "assistants",
}
"""What a checkpoint depends on besides the options of its run."""


def save_tuned(directory: Path, joint: JointModule, method: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the head, and the tuned base as a plain model or an adapter. `state` has weights gathered from devices."""
    directory.mkdir(parents=True, exist_ok=True)
    state = joint.state_dict() if state is None else state
    head = {name: state[f"head.{name}"].detach().cpu().contiguous() for name in joint.head.state_dict()}
    save_file(head, directory / HEAD)
    if method in FOLDERS:
        base_state = {name.removeprefix("base."): tensor for name, tensor in state.items() if name.startswith("base.")}
        # otherwise peft would query the Hub to check whether the vocabulary grew, which never happens here
        options = {"save_embedding_layers": False} if method == "lora" else {}
        base = cast(Any, joint.base)
        with quiet_if_small(base):
            base.save_pretrained(directory / FOLDERS[method], state_dict=base_state, **options)


def load_tuned(directory: Path, joint: JointModule, method: str) -> None:
    """Load weights written by `save_tuned` into the joint model."""
    base = cast(Any, joint.base)
    try:
        _load(joint.head, load_file(directory / HEAD))
        if method == "lora":
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(base, load_peft_weights(str(directory / FOLDERS[method]), device="cpu"))
        elif method == "full":
            _load(base, _plain(base, directory).state_dict())
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = f"{error}; they are damaged or belong to another model or method"
        raise ArtefactError(f"the weights in {directory} cannot be read for method {method!r}: {reason}") from error


def read_tuned(directory: Path, joint: JointModule, method: str) -> tuple[nn.Module, DeferralHead]:
    """Load weights written by `save_tuned` as new models on the CPU. A frozen base is returned as it is."""
    head = DeferralHead(**joint.head.shape)
    head.load_state_dict(load_file(directory / HEAD))
    if method == "full":
        return _plain(joint.base, directory).eval(), head
    if method == "lora":
        spec = cast(ModelSpec, spec_of(joint.base))
        return load_adapted(replace(spec, adapter=str(directory / FOLDERS[method]))), head
    return joint.base, head


def _plain(base: Any, directory: Path) -> nn.Module:
    """Load the tuned base as a model of the same class and dtype."""
    with quiet_if_small(base):
        return cast(nn.Module, type(base).from_pretrained(directory / FOLDERS["full"], dtype=base.dtype))


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load full tensors into a module whose parameters may be sharded over processes."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Checkpoints that were interrupted are ignored."""
    steps = {path.name.removeprefix("checkpoint-"): path for path in directory.glob("checkpoint-*")}
    whole = {int(step): path for step, path in steps.items() if step.isdigit() and _is_whole(path)}
    return whole[max(whole)] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, which its state shows because Trainer writes it last."""
    try:
        return bool(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def check_origin(checkpoint: Path, origin: Mapping[str, Any]) -> None:
    """Check that a checkpoint is complete and of the same rows and models, as far as `CoLLMTrainer.origin` is known."""
    if not _is_whole(checkpoint):
        raise ArtefactError(f"{checkpoint} is not a complete checkpoint: no readable {STATE}; resume from another one")
    try:
        found = json.loads((checkpoint / ORIGIN).read_text(encoding="utf-8"))
        different = [what for name, what in _ORIGIN.items() if name in origin and found[name] != origin[name]]
    except DAMAGED as error:
        raise ArtefactError(
            f"{checkpoint / ORIGIN} is damaged ({error}); delete this checkpoint to resume from an earlier one"
        ) from error
    if different:
        advice = f"choose another output_dir, or delete the checkpoints in {checkpoint.parent} to start again"
        raise ConfigError(f"{checkpoint} was trained with different {different[0]}; {advice}")
