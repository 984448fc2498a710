"""Each assistant turn is learned up to a token that decoding stops at, whatever the template writes behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.errors import DataError, RequestError
from collm.models.loading import ModelSpec
from collm.models.members import stop_ids
from collm.run.data import prompt_template
from collm.run.options import RowFormat
from collm.text.chats import Chat
from collm.text.template import PromptTemplate
from collm.training.data import Row
from collm.training.examples import encode
from tests.text.test_template import BYTE_LEVEL, CHAT, CHATML, targets_of, turns_of

EOS, START = BYTE_LEVEL.eos_token_id, BYTE_LEVEL.convert_tokens_to_ids("<|start|>")
OPENED_BY_ROLES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m.role == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def with_roles() -> PreTrainedTokenizerFast:
    made = copy.deepcopy(BYTE_LEVEL)
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|tool|>"]})
    return made


ROLES = with_roles()
USER, TOOL = ROLES.convert_tokens_to_ids(["<|user|>", "<|tool|>"])


def test_what_opens_the_next_message_ends_a_turn_that_has_no_end() -> None:
    template = PromptTemplate(chat=OPENED_BY_ROLES).with_turn_ends(ROLES, [EOS])
    assert template.turn_ends == (USER, TOOL, EOS)
    (encoded,) = template.encode_chat(ROLES, CHAT)
    assert [ROLES.decode(turn) for _, turn in turns_of(encoded)] == ["on the mat<|user|>", "sat on the cat<|user|>"]
    (encoded,) = template.encode_chat(ROLES, [*CHAT[:2], {"role": "tool", "content": "12"}, CHAT[3]])
    assert [ROLES.decode(turn) for _, turn in turns_of(encoded)] == ["on the mat<|tool|>", "sat on the cat<|user|>"]


def test_a_special_token_behind_the_content_ends_a_turn_though_it_is_no_eos() -> None:
    tokenizer = copy.deepcopy(ROLES)
    tokenizer.eos_token = "<|tool|>"
    template = PromptTemplate(chat=CHATML).with_turn_ends(tokenizer, [TOOL])
    assert template.turn_ends == (EOS, TOOL)
    (encoded,) = template.encode_chat(tokenizer, CHAT)
    assert [turn[-1] for _, turn in turns_of(encoded)] == [EOS, EOS]


def test_turns_with_tools_end_as_their_own_template_says() -> None:
    with_tools = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + CHATML.replace("<|end|>", "<|tool|>")
    tools = [{"type": "function", "function": {"name": "f"}}]
    tokenizer = copy.deepcopy(ROLES)
    for named, ends in (
        ({"default": CHATML, "tool_use": with_tools}, (EOS, TOOL)),
        ({"default": PLAIN, "tool_use": with_tools}, (TOOL, EOS)),
        ({"default": CHATML, "tool_use": "{{ raise_exception('no') }}"}, (EOS,)),
        ({"tool_use": with_tools}, (TOOL, EOS)),
    ):
        tokenizer.chat_template = named
        template = PromptTemplate.of(tokenizer).with_turn_ends(tokenizer, [EOS])
        assert template.turn_ends == ends
        if TOOL in ends:
            (encoded,) = template.encode_chat(tokenizer, Chat(CHAT, tools))
            assert [turn[-1] for _, turn in turns_of(encoded)] == [TOOL, TOOL]
    with pytest.raises(RequestError, match="there is no chat template"):
        template.encode_prompt(tokenizer, CHAT[:1])


def test_a_template_of_plain_text_gets_eos_behind_every_turn() -> None:
    template = PromptTemplate(chat=PLAIN).with_turn_ends(BYTE_LEVEL, [EOS])
    first, second = template.encode_chat(BYTE_LEVEL, CHAT)
    assert BYTE_LEVEL.decode(targets_of(first)) == "on the mat\n<|end|>"
    assert BYTE_LEVEL.decode(targets_of(second)) == "sat on the cat\n<|end|>"
    assert "on the mat\nuser" in BYTE_LEVEL.decode(second.token_ids)  # as decoding would see it


def test_without_any_end_training_is_refused() -> None:
    bare = copy.deepcopy(BYTE_LEVEL)
    bare.eos_token = None
    with pytest.raises(DataError, match=r"no token ends an assistant's turn, .* set eos_token"):
        PromptTemplate(chat=PLAIN).with_turn_ends(bare, [])


def test_generation_marks_change_nothing() -> None:
    marked, unmarked = (PromptTemplate(chat=chat).encode_chat(BYTE_LEVEL, CHAT) for chat in (GENERATION, CHATML))
    assert marked == unmarked


def test_several_eos_ids_and_padding_that_is_eos_hide_no_end() -> None:
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    tokenizer.pad_token = tokenizer.eos_token
    several = PromptTemplate(chat=CHATML).with_turn_ends(BYTE_LEVEL, [START, EOS])
    for template in (several, PromptTemplate(chat=CHATML)):
        (encoded,) = template.encode_chat(tokenizer, CHAT)
        assert [turn[-1] for _, turn in turns_of(encoded)] == [EOS, EOS]


@pytest.mark.parametrize("chat", [CHATML, OPENED_BY_ROLES, PLAIN, GENERATION])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_every_turn_ends_in_a_token_that_decoding_stops_at(chat: str, num_turns: int) -> None:
    template = PromptTemplate(chat=chat).with_turn_ends(ROLES, [EOS])
    encoded = template.encode_chat(ROLES, CHAT[:2] * num_turns)
    turns = [turn for one in encoded for _, turn in turns_of(one)]
    assert len(turns) == num_turns
    for turn in turns:
        assert turn[-1] in template.turn_ends
        assert not set(turn[:-1]) & set(template.turn_ends)


def test_the_base_s_eos_set_counts(saved_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> None:
    spec = ModelSpec(str(saved_model("base", 0, eos_token_id=[1, 5])))
    assert stop_ids(tokenizer, spec) == {1, 5}
    rows = [Row([{"role": "user", "content": "w1"}], "w2", [{"role": "assistant", "content": "w2"}], "here")]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w2 {% endfor %}"
    assert prompt_template(RowFormat(), tokenizer, spec, rows).turn_ends == (5, 1)
    plain = [Row("w1", "w2", None, "here")]
    assert prompt_template(RowFormat(), tokenizer, spec, plain).turn_ends == ()


def test_examples_whose_end_was_cut_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    template = PromptTemplate(chat=CHATML)
    rows = [
        Row(CHAT[:1], "", CHAT[:2], "one"),
        Row(CHAT[:1], "", [CHAT[0], {**CHAT[1], "content": "the mat " * 9}], "two"),
    ]
    (whole,) = template.encode_chat(BYTE_LEVEL, CHAT[:2])
    length = len(whole.token_ids)
    for max_length in (length, length - 1):  # what follows an end may be lost
        caplog.clear()
        encode(rows, template, BYTE_LEVEL, max_length=max_length)
        assert "1 lost the token that ends their last target" in caplog.text


def test_decoding_stops_at_it(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> None:
    models = [tiny_model(0), tiny_model(1)]
    torch.manual_seed(0)
    free = CoLLM(models[0], models[1:], DeferralHead(32, 1), tokenizer)
    ids = free.generate("w1 w2", SamplingParams(max_tokens=8), threshold=1)[0].token_ids
    ending = CoLLM(models[0], models[1:], DeferralHead(32, 1), tokenizer, template=PromptTemplate(turn_ends=(ids[3],)))
    out = ending.generate("w1 w2", SamplingParams(max_tokens=8), threshold=1)[0]
    assert out.finish_reason == "eos"
    assert list(out.token_ids) == list(ids[: ids.index(ids[3]) + 1])


def test_what_ends_a_turn_is_kept_in_the_artefact(
    saved_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    specs = [ModelSpec(str(saved_model(name, seed))) for name, seed in (("base", 0), ("assistant", 1))]
    template = PromptTemplate(chat="x", turn_ends=(7, 1))
    CoLLM(specs[0], specs[1:], DeferralHead(32, 1), tokenizer, template=template).save_pretrained(tmp_path / "saved")
    assert CoLLM.from_pretrained(tmp_path / "saved").template == template
