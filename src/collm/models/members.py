"""Members of a collaboration: models, specs of models to load, and tools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from collm.core.types import author_name
from collm.errors import ConfigError, MismatchError
from collm.models.language_model import LanguageModel, without_adapter
from collm.models.loading import ModelSpec, load_model, load_tokenizer, saved_eos_ids
from collm.models.packing import can_pack, pack_linears
from collm.models.tools import ToolModel
from collm.text.alignment import Alignment
from collm.text.guards import TokenizerIdentity, check_tokenizers, token_difference
from collm.text.template import PromptTemplate
from collm.text.text_tokenizer import TextTokenizer
from collm.tools.spec import ToolFunction, ToolSpec

AssistantSpec = ModelSpec | ToolSpec
"""The source of an assistant."""
Member = nn.Module | AssistantSpec
"""A model in memory, or the spec of a model or tool that is loaded on first use."""


def as_member(given: Member | ToolFunction) -> Member:
    """Convert a Python function to the spec of a tool; return any other member unchanged."""
    if isinstance(given, nn.Module | ModelSpec | ToolSpec):
        return given
    if not callable(given):
        raise ConfigError(f"an assistant is a {type(given).__name__}, expected a model, a spec or a function")
    return ToolSpec.of(given)


def spec_of(member: Member) -> AssistantSpec | None:
    """The spec of a member; None for a model created in memory."""
    if isinstance(member, ModelSpec | ToolSpec):
        return member
    inner = without_adapter(member)
    path = getattr(inner.config, "_name_or_path", "")
    if not path:
        return None
    revision = getattr(inner.config, "_commit_hash", None)
    quantized = getattr(inner.config, "quantization_config", None)
    if isinstance(quantized, BitsAndBytesConfig) and not cast(Any, inner).hf_quantizer.pre_quantized:
        kind = "int8" if quantized.load_in_8bit else "nf4"
        return ModelSpec(path, revision, str(inner.dtype).removeprefix("torch."), quantization=kind)
    return ModelSpec(path, revision)


def eos_ids_of(member: Member) -> frozenset[int]:
    """The EOS token ids of a model's generation config; empty for a tool."""
    if isinstance(member, nn.Module):
        return LanguageModel(member, name="").eos_token_ids
    return saved_eos_ids(member) if isinstance(member, ModelSpec) else frozenset()


def stop_ids(tokenizer: PreTrainedTokenizerBase, member: Member) -> frozenset[int]:
    """Tokens that end a member's texts: its EOS token ids and the tokenizer's EOS."""
    eos = cast("int | None", tokenizer.eos_token_id)
    return eos_ids_of(member) | (frozenset() if eos is None else {eos})


def aligned(
    base: Member,
    assistants: Sequence[Member],
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    *,
    tokenizers: Sequence[PreTrainedTokenizerBase] | None = None,
    accept_differences: Collection[str] = (),
) -> Alignment | None:
    """Align authors that do not share a tokenizer. Returns None if all of them share the base's.

    Args:
        tokenizer, template: the base's. An assistant with another tokenizer uses its own chat template if it has one.
        tokenizers: the tokenizer of each assistant, by default a spec's own, and the base's for modules and tools.
        accept_differences: accepted differences between models that share the base's vocabulary.
    """
    if tokenizers is None:
        tokenizers = [load_tokenizer(one) if isinstance(one, ModelSpec) else tokenizer for one in assistants]
    own = TokenizerIdentity.of(tokenizer)
    named = [(author_name(number), one) for number, one in enumerate(tokenizers, start=1)]
    differences = []
    for name, other in named:
        identity = own if other is tokenizer else TokenizerIdentity.of(other)
        differences.append(token_difference(own, identity, name))
        if differences[-1] is None:
            check_tokenizers(own, identity, name, accept=accept_differences)
    if not any(differences):
        return None
    try:
        texts = [TextTokenizer(tokenizer, template=template, eos_ids=stop_ids(tokenizer, base))]
        for (name, other), member, difference in zip(named, assistants, differences, strict=True):
            if difference is None:
                texts.append(texts[0])
                continue
            eos_ids, its = stop_ids(other, member), PromptTemplate.of(other, template.text)
            its = (template if its.chat is None else its).with_turn_ends(other, eos_ids)
            texts.append(TextTokenizer(other, name=name, template=its, eos_ids=eos_ids))
        return Alignment(texts)
    except MismatchError as error:
        first = next(filter(None, differences))
        raise MismatchError(f"{first}. Their tokens cannot be aligned either: {error}") from error


def load_members(
    members: Sequence[Member],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    alignment: Alignment | None = None,
) -> list[LanguageModel | ToolModel]:
    """Load all members, the base first, and limit their logits to the vocabulary, with an alignment to each one's."""
    loaded: list[LanguageModel | ToolModel] = []
    for author, member in enumerate(members):
        name = author_name(author)
        if isinstance(member, ToolSpec):
            loaded.append(ToolModel(member, tokenizer, name=name, vocab_size=vocab_size))
            continue
        module: nn.Module = load_model(member) if isinstance(member, ModelSpec) else member
        if isinstance(member, ModelSpec) and can_pack(module):
            pack_linears(module)
        size = vocab_size if alignment is None else alignment.tokenizers[author].vocab_size
        model = LanguageModel(module.eval(), name=name, vocab_size=size)
        if model.padded_vocab_size < size:
            sizes = f"logits for {model.padded_vocab_size} token ids, but the tokenizer has {size}"
            raise MismatchError(f"{name} has {sizes}; use the tokenizer the model was trained with")
        loaded.append(model)
    return loaded
