"""Members of a collaboration: models, specs of models to load, and tools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard, cast

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from collm.core.types import author_name
from collm.errors import ConfigError, MismatchError
from collm.models.adapters import check_adapter, leaves_weights
from collm.models.language_model import LanguageModel, merged, without_adapter
from collm.models.llama import LlamaModel
from collm.models.loading import (
    ModelSpec,
    load_adapted,
    load_model,
    load_tokenizer,
    saved_eos_ids,
    with_shared_weights,
)
from collm.models.names import gguf_file
from collm.models.tools import ToolModel
from collm.text.alignment import Alignment
from collm.text.guards import TokenizerIdentity, check_tokenizers, token_difference
from collm.text.template import PromptTemplate
from collm.text.text_tokenizer import TextTokenizer
from collm.tools.spec import ToolFunction, ToolSpec

AssistantSpec = ModelSpec | ToolSpec
"""The source of an assistant."""
Model = LanguageModel | LlamaModel
"""A loaded language model."""
Member = nn.Module | LlamaModel | AssistantSpec
"""A model in memory, or the spec of a model or tool that is loaded on first use."""


def as_member(given: Member | ToolFunction) -> Member:
    """Convert a Python function to the spec of a tool; return any other member unchanged."""
    if isinstance(given, nn.Module | LlamaModel | ModelSpec | ToolSpec):
        return given
    if not callable(given):
        raise ConfigError(f"an assistant is a {type(given).__name__}, expected a model, a spec or a function")
    return ToolSpec.of(given)


def spec_of(member: Member) -> AssistantSpec | None:
    """The spec of a member; None for a model created in memory."""
    if isinstance(member, ModelSpec | ToolSpec):
        return member
    if isinstance(member, LlamaModel):
        return ModelSpec(str(member.file))
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


def merged_copy(base: nn.Module | ModelSpec) -> Any:
    """A copy of a model on the CPU, with its LoRA adapter merged.

    Raises:
        ConfigError: the model is quantized.
    """
    spec = spec_of(base)
    if isinstance(spec, ModelSpec) and spec.quantization is not None:
        reason = f"the base is quantized ({spec.quantization}), so its weights cannot be exported"
        raise ConfigError(f"{reason}; export a collaboration whose base is not quantized")
    if isinstance(base, ModelSpec):
        return merged(load_adapted(replace(base, device="cpu")))
    return merged(deepcopy(base).to("cpu"))


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


def load_author(member: nn.Module | LlamaModel | ModelSpec, *, name: str, vocab_size: int | None = None) -> Model:
    """Load a language model as an author, unless it is in memory, and limit its logits to the vocabulary.

    Raises:
        LoadError: the model cannot be loaded.
        MismatchError: the model has fewer tokens than the tokenizer.
    """
    if isinstance(member, ModelSpec) and member.in_llama:
        model: Model = LlamaModel(gguf_file(member.path, member.revision), name=name, device=member.device)
    elif isinstance(member, LlamaModel):
        model = member
    else:
        module = load_adapted(member) if isinstance(member, ModelSpec) else member
        model = LanguageModel(module.eval(), name=name, vocab_size=vocab_size)
    if vocab_size is not None and model.padded_vocab_size < vocab_size:
        sizes = f"logits for {model.padded_vocab_size} token ids, but the tokenizer has {vocab_size}"
        raise MismatchError(f"{name} has {sizes}; use the tokenizer the model was trained with")
    return model.named(name, vocab_size) if isinstance(model, LlamaModel) else model


def load_members(
    members: Sequence[Member],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    alignment: Alignment | None = None,
) -> list[Model | ToolModel]:
    """Load all members, the base first, and limit their logits to the vocabulary, with an alignment to each one's.

    Specs that differ in their adapters only share the weights of one load.
    """
    loaded: list[Model | ToolModel] = []
    for author, member in enumerate(_with_one_load(members)):
        name = author_name(author)
        if isinstance(member, ToolSpec):
            loaded.append(ToolModel(member, tokenizer, name=name, vocab_size=vocab_size))
            continue
        size = vocab_size if alignment is None else alignment.tokenizers[author].vocab_size
        model = load_author(member, name=name, vocab_size=size)
        if isinstance(model, LlamaModel):
            own = tokenizer if alignment is None else alignment.tokenizers[author].tokenizer
            model.check_tokens(own.convert_ids_to_tokens(range(size)))
        loaded.append(model)
    return loaded


def _with_one_load(members: Sequence[Member]) -> list[Member]:
    """The members, with models in place of specs that share weights."""
    weights = [replace(one, adapter=None) if _can_share(one) else None for one in members]
    loaded: dict[ModelSpec, nn.Module] = {}
    given = list(members)
    for author, (member, key) in enumerate(zip(members, weights, strict=True)):
        if isinstance(member, ModelSpec) and key is not None and weights.count(key) > 1:
            plain = loaded.get(key) or loaded.setdefault(key, load_model(key))
            given[author] = load_adapted(member, with_shared_weights(plain))
    return given


def _can_share(member: Member) -> TypeGuard[ModelSpec]:
    """Whether a member's weights can be those of others. The first pass moves int8 weights into its modules."""
    if not isinstance(member, ModelSpec) or member.in_llama or member.quantization == "int8":
        return False
    if member.adapter is not None:
        check_adapter(Path(member.adapter))
    return member.adapter is None or leaves_weights(Path(member.adapter))
