"""The members of a collaboration: models in memory or still to be loaded, and tools, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from collm.errors import ConfigError
from collm.models.guards import check_vocab_sizes
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model
from collm.models.packing import can_pack, pack_linears
from collm.models.tools import ToolModel
from collm.tools.spec import ToolFunction, ToolSpec

AssistantSpec = ModelSpec | ToolSpec
"""Where an assistant comes from."""
Member = nn.Module | AssistantSpec
"""A model in memory, where to load it from when it is first needed, or which program it is."""


def author_name(author: int, num_assistants: int) -> str:
    """What errors and counts call author 0, 1, .."""
    if author == 0:
        return "base"
    return "assistant" if num_assistants == 1 else f"assistant {author}"


def as_member(given: Member | ToolFunction) -> Member:
    """A member as it is; a function of the user's as the tool it is.

    Raises:
        ConfigError: a function that cannot be imported by a name, or something else.
    """
    if isinstance(given, nn.Module | ModelSpec | ToolSpec):
        return given
    if not callable(given):
        raise ConfigError(f"an assistant is a {type(given).__name__}, expected a model, a spec or a function")
    return ToolSpec.of(given)


def spec_of(member: Member) -> AssistantSpec | None:
    """Where a member came from; None if it was made in memory."""
    if isinstance(member, ModelSpec | ToolSpec):
        return member
    inner = cast(Any, member).get_base_model() if hasattr(member, "peft_config") else member
    path = getattr(inner.config, "_name_or_path", "")
    if not path:
        return None
    revision = getattr(inner.config, "_commit_hash", None)
    quantized = getattr(inner.config, "quantization_config", None)
    if isinstance(quantized, BitsAndBytesConfig) and not cast(Any, inner).hf_quantizer.pre_quantized:
        kind = "int8" if quantized.load_in_8bit else "nf4"
        return ModelSpec(path, revision, str(inner.dtype).removeprefix("torch."), quantization=kind)
    return ModelSpec(path, revision)


def load_members(
    members: Sequence[Member], tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, packed: bool = True
) -> list[LanguageModel | ToolModel]:
    """All members in memory, the base first, each cut to the tokenizer's ids.

    Args:
        packed: pack the linear layers of what is loaded here, where that makes it faster.

    Raises:
        LoadError: a model or a tool cannot be loaded.
        DataError: a tool's table cannot be read.
        MismatchError: a model scores fewer ids than the tokenizer has.
    """
    loaded: list[LanguageModel | ToolModel] = []
    for author, member in enumerate(members):
        name = author_name(author, len(members) - 1)
        if isinstance(member, ToolSpec):
            loaded.append(ToolModel(member, tokenizer, name=name, vocab_size=vocab_size))
            continue
        module: nn.Module = load_model(member) if isinstance(member, ModelSpec) else member
        if packed and isinstance(member, ModelSpec) and can_pack(module):
            pack_linears(module)
        loaded.append(LanguageModel(module.eval(), name=name, vocab_size=vocab_size))
    check_vocab_sizes([model for model in loaded if isinstance(model, LanguageModel)], vocab_size)
    return loaded
