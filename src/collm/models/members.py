"""Members of a collaboration: models, specs of models to load, and tools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from collm.core.types import author_name
from collm.errors import ConfigError, MismatchError
from collm.models.language_model import LanguageModel, without_adapter
from collm.models.loading import ModelSpec, load_model, saved_eos_ids
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
    """Convert a Python function to the spec of a tool; return any other member unchanged.

    Raises:
        ConfigError: the function cannot be imported by name, or `given` is no member.
    """
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


def aligned(
    base: Member,
    assistants: Sequence[Member],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    template: PromptTemplate,
    *,
    accept_differences: Collection[str] = (),
) -> Alignment | None:
    """Align authors that do not share a tokenizer. Returns None if all of them share the base's.

    Args:
        tokenizers: the tokenizer of each author, the base first; a tool has the base's.
        template: the base's template. An assistant with another tokenizer uses its own chat template, if it has one.
        accept_differences: accepted differences between models that share the base's vocabulary.

    Raises:
        MismatchError: there are differences that are not accepted, or the tokenizers cannot be aligned.
    """
    own = TokenizerIdentity.of(tokenizers[0])
    names = [author_name(number) for number in range(1, len(assistants) + 1)]
    differences = []
    for name, tokenizer in zip(names, tokenizers[1:], strict=True):
        other = own if tokenizer is tokenizers[0] else TokenizerIdentity.of(tokenizer)
        differences.append(token_difference(own, other, name))
        if differences[-1] is None:
            check_tokenizers(own, other, name, accept=accept_differences)
    if not any(differences):
        return None
    try:
        texts = [TextTokenizer(tokenizers[0], template=template, eos_ids=_eos_ids(tokenizers[0], base))]
        for name, member, tokenizer, same in zip(names, assistants, tokenizers[1:], differences, strict=True):
            if same is None:
                texts.append(texts[0])
                continue
            eos_ids, its = _eos_ids(tokenizer, member), PromptTemplate.of(tokenizer, template.text)
            its = (template if its.chat is None else its).with_turn_ends(tokenizer, eos_ids)
            texts.append(TextTokenizer(tokenizer, name=name, template=its, eos_ids=eos_ids))
        return Alignment(texts)
    except MismatchError as error:
        difference = next(filter(None, differences))
        raise MismatchError(f"{difference}. Their tokens cannot be aligned either: {error}") from error


def _eos_ids(tokenizer: PreTrainedTokenizerBase, member: Member) -> frozenset[int]:
    """Tokens that end a model's texts."""
    eos = cast("int | None", tokenizer.eos_token_id)
    own = frozenset[int]() if eos is None else frozenset({eos})
    if isinstance(member, ToolSpec):
        return own
    return own | (
        saved_eos_ids(member) if isinstance(member, ModelSpec) else LanguageModel(member, name="").eos_token_ids
    )


def load_members(
    members: Sequence[Member],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    alignment: Alignment | None = None,
    packed: bool = True,
) -> list[LanguageModel | ToolModel]:
    """Load all members, the base first, and limit their logits to the tokenizer's vocabulary.

    Args:
        tokenizer, vocab_size: of all members, or of the base if there is an alignment.
        alignment: alignment of members that do not share a tokenizer.
        packed: pack the linear layers of models loaded here if that is faster.

    Raises:
        LoadError: a model or a tool cannot be loaded.
        DataError: a tool's table cannot be read.
        MismatchError: a model's vocabulary is smaller than the tokenizer's.
    """

    def size_of(author: int) -> int:
        return vocab_size if alignment is None else alignment.tokenizers[author].vocab_size

    loaded: list[LanguageModel | ToolModel] = []
    for author, member in enumerate(members):
        name = author_name(author)
        if isinstance(member, ToolSpec):
            loaded.append(ToolModel(member, tokenizer, name=name, vocab_size=vocab_size))
            continue
        module: nn.Module = load_model(member) if isinstance(member, ModelSpec) else member
        if packed and isinstance(member, ModelSpec) and can_pack(module):
            pack_linears(module)
        model = LanguageModel(module.eval(), name=name, vocab_size=size_of(author))
        check_vocab_sizes([model], size_of(author))
        loaded.append(model)
    return loaded


def check_vocab_sizes(models: Sequence[LanguageModel], vocab_size: int) -> None:
    """Check that every model has logits for all of the tokenizer's ids. Further logits are padding.

    Raises:
        MismatchError: a model has fewer logits.
    """
    for model in models:
        if model.padded_vocab_size < vocab_size:
            raise MismatchError(
                f"{model.name} has logits for {model.padded_vocab_size} token ids, but the tokenizer has {vocab_size}; "
                "use the tokenizer the model was trained with"
            )
