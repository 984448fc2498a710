"""The models of a collaboration: in memory or still to be loaded, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from collm.models.guards import check_vocab_sizes
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model
from collm.models.packing import pack_linears, packing_pays

Member = nn.Module | ModelSpec
"""A model in memory, or where to load it from when it is first needed."""


def author_name(author: int, num_assistants: int) -> str:
    """What errors and counts call author 0, 1, .."""
    if author == 0:
        return "base"
    return "assistant" if num_assistants == 1 else f"assistant {author}"


def spec_of(member: Member) -> ModelSpec | None:
    """Where a model came from; None if it was made in memory."""
    if isinstance(member, ModelSpec):
        return member
    inner = cast(Any, member).get_base_model() if hasattr(member, "peft_config") else member
    path = getattr(inner.config, "_name_or_path", "")
    if not path:
        return None
    return ModelSpec(path, revision=getattr(inner.config, "_commit_hash", None))


def load_members(members: Sequence[Member], *, vocab_size: int, packed: bool = True) -> list[LanguageModel]:
    """All models in memory, the base first, each cut to the tokenizer's ids.

    Args:
        packed: pack the linear layers of what is loaded here, where that makes it faster.

    Raises:
        LoadError: a model cannot be loaded.
        MismatchError: a model scores fewer ids than the tokenizer has.
    """
    models = []
    for author, member in enumerate(members):
        module: nn.Module = load_model(member) if isinstance(member, ModelSpec) else member
        if packed and isinstance(member, ModelSpec) and packing_pays(module):
            pack_linears(module)
        name = author_name(author, len(members) - 1)
        models.append(LanguageModel(module.eval(), name=name, vocab_size=vocab_size))
    check_vocab_sizes(models, vocab_size)
    return models
