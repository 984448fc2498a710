"""Losses and scores of segments: against the law written out, and against the loss of tokens where all begin one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from collm import CoLLM, DeferralHead, ModelSpec, ToolSpec
from collm.core.head import doubt_of
from collm.core.segments import SegmentLaw, segment_scores, token_terms
from collm.core.types import BASE
from collm.errors import DataError
from collm.models.language_model import LanguageModel
from collm.models.tools import ToolModel
from collm.run import RunConfig, train_collaboration
from collm.text.alignment import Alignment
from collm.training import scoring
from collm.training.data import load_rows
from collm.training.examples import Example, Examples, collate, encode, fingerprint, scatter, shift
from collm.training.module import JointModule
from collm.training.scoring import read_scores, write_scores
from tests.tiny_models import make_model, tiny_config
from tests.training.conftest import Make
from tests.two_tokenizers import two_aligned, two_tokenizers, writing_model

ROWS = [
    ("what is the capital?", " Sure, the capital is called Gipil."),
    ("Q: 48 miles", " The river runs\n\nto the sea, I think."),
    ("the town?", " a  b\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}caf\N{LATIN SMALL LETTER E WITH ACUTE} 日本語"),
]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = ({"prompt": prompt, "completion": completion} for prompt, completion in ROWS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def aligned(path: Path, alignment: Alignment | None = None, *, max_length: int = 512) -> Examples:
    alignment = alignment or two_aligned()
    base = alignment.tokenizers[0]
    return encode(load_rows(path), base.template, base.tokenizer, alignment, max_length=max_length)


def logits_of(model: Any, example: Example) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([example.token_ids])).logits[0].float()


def slow_segments(model: Any, example: Example) -> tuple[list[float], list[bool], list[float]]:
    """log q of each segment, whether greedy decoding writes it, and log P(START) behind it, from one pass."""
    law, opens = example.law, example.opens
    assert law is not None
    logits = logits_of(model, example).masked_fill(~law.written, -torch.inf)
    places = [t for t, row in enumerate(opens) if row >= 0]
    values, rights, stops = [], [], []
    for place, end in itertools.zip_longest(places, places[1:]):
        if not example.is_target[place]:
            continue
        start = law.openings(torch.tensor([opens[place]]))[0]
        opening = logits[place - 1].masked_fill(~start, -torch.inf)
        total = opening.log_softmax(-1)[example.token_ids[place]].item()
        right = int(opening.argmax()) == example.token_ids[place]
        ends_text = bool(law.ends[example.token_ids[place]])
        for t in range(place + 1, place + 1 if ends_text or end is None else end):
            total += logits[t - 1].log_softmax(-1)[example.token_ids[t]].item()
            right &= int(logits[t - 1].argmax()) == example.token_ids[t]
        if not ends_text:
            stop = law.openings(torch.tensor([opens[end]]))[0]
            stops.append(logits[end - 1].log_softmax(-1)[stop].logsumexp(-1).item())
            total += stops[-1]
            right &= bool(stop[logits[end - 1].argmax()])
        else:
            stops.append(0.0)
        values.append(total)
        rights.append(right)
    return values, rights, stops


@pytest.mark.parametrize("max_length", [512, 30])
def test_scores_are_the_law_written_out(rows_file: Path, max_length: int) -> None:
    examples = aligned(rows_file, max_length=max_length)
    for author, tokenizer in enumerate(two_tokenizers()):
        model, own = writing_model(tokenizer, author), examples.read_by(author)
        assert [one.num_targets for one in own] == [one.num_targets for one in examples]
        assert fingerprint(own) == fingerprint(examples)
        language_model = LanguageModel(model, name="one")
        found = read_scores(language_model, own, hidden_states=True)
        with torch.no_grad():
            torch.testing.assert_close(found["doubt"], doubt_of(language_model.logits(found["hidden"])))
        wanted = [slow_segments(model, example) for example in own]
        torch.testing.assert_close(
            found["logprob"], torch.tensor([value for values, _, _ in wanted for value in values]), atol=1e-4, rtol=1e-5
        )
        assert found["correct"].tolist() == [right for _, rights, _ in wanted for right in rights]


def test_an_assistant_that_writes_past_the_ends_of_segments_is_warned_of(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    examples = aligned(rows_file).read_by(1)
    model = writing_model(two_tokenizers()[1], 1)
    mean = torch.tensor([stop for example in examples for stop in slow_segments(model, example)[2]]).mean().item()
    for number, (floor, warned) in enumerate(((mean - 0.01, False), (mean + 0.01, True))):
        monkeypatch.setattr(scoring, "LOW_STOP", floor)
        write_scores(LanguageModel(model, name="expert"), examples, tmp_path / str(number), spec=ModelSpec("expert"))
        assert ("expert gives the end of a segment" in caplog.text) is warned


@pytest.mark.parametrize("num_ends", [1, 3])
def test_the_probabilities_of_all_segments_sum_to_one(num_ends: int) -> None:
    """Of one token each, and the end of the text, whichever token it is written with."""
    vocab_size, ends = 11, [2, 5, 7][:num_ends]
    model = LanguageModel(make_model(tiny_config(vocab_size=vocab_size, initializer_range=0.5), 0), name="one")
    is_end = torch.tensor([token in ends for token in range(vocab_size)])
    law = SegmentLaw(torch.ones(258, 256, dtype=torch.bool), torch.where(is_end, -1, 65), is_end)
    within = [Example([3, token, 4], [False, True, False], [-1, 0, 0], law) for token in range(vocab_size)]
    last = [Example([3, token], [False, True], [-1, 0], law) for token in ends]
    segments = [one for one in within if one.token_ids[1] not in ends]
    scores = read_scores(model, [*segments, *last])
    probs = scores["logprob"].exp()
    assert probs[:-num_ends].sum().item() + probs[-1].item() == pytest.approx(1, abs=1e-5)
    assert probs[-num_ends:].tolist() == pytest.approx([probs[-1].item()] * num_ends)
    assert scores["correct"].sum() in (1, num_ends)


def test_examples_hold_the_same_answers_in_the_tokens_of_each_author(rows_file: Path) -> None:
    examples = aligned(rows_file)
    for index, (_, completion) in enumerate(ROWS):
        for author, tokenizer in enumerate(two_aligned().tokenizers):
            example = examples.read_by(author)[index]
            learned = [t for t, target in zip(example.token_ids, example.is_target, strict=True) if target]
            assert learned[-1] in tokenizer.eos_ids
            assert tokenizer.spell(learned[:-1]) == completion.encode()


def test_an_answer_that_is_cut_ends_at_a_boundary_and_has_no_end(
    rows_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = aligned(rows_file)
    cut = aligned(rows_file, max_length=30)
    assert "exceed max_length 30 and were truncated" in caplog.text
    for index, example in enumerate(cut):
        full = whole[index]
        assert example.token_ids == full.token_ids[: len(example.token_ids)]
        if len(example.token_ids) < len(full.token_ids):
            assert example.opens[-1] >= 0
            assert not example.is_target[-1]


def everything_opens(example: Example, vocab_size: int) -> Example:
    """A token is a segment, and every token may begin one."""
    law = SegmentLaw(
        torch.ones(258, 256, dtype=torch.bool),
        torch.zeros(vocab_size, dtype=torch.int64),
        torch.zeros(vocab_size).bool(),
    )
    opens = [0 if target else -1 for target in example.is_target]
    return replace(
        example,
        opens=[*opens, 0],
        law=law,
        token_ids=[*example.token_ids, 0],
        is_target=[*example.is_target, False],
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_where_every_token_begins_a_segment_the_loss_is_that_of_tokens(frozen: bool) -> None:
    tokenizer = two_tokenizers()[0]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in ROWS]
    plain = [Example(each, [place > 1 for place in range(len(each))]) for each in ids]
    losses, grads = [], []
    for examples in (plain, [everything_opens(one, len(tokenizer)) for one in plain]):
        base = writing_model(tokenizer, 3).requires_grad_(True)
        head = DeferralHead(32, 1)
        torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        module = JointModule(base, head, frozen=frozen, law=examples[0].law).eval()
        items = list[dict[str, Tensor]]()
        for example in examples:
            shifted = shift(example)
            generator = torch.Generator().manual_seed(len(items))
            mask = shifted["target_mask"]
            logprobs = scatter(-torch.rand(int(mask.sum()), 1, generator=generator) * 5, mask)
            items.append(shifted | {"assistant_logprobs": logprobs, "assistant_correct": logprobs > -1})
        loss = module(**collate(items))["loss"]
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert len(grads[0]) == len(grads[1]) >= (2 if frozen else 10)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_law_sums_to_one_over_all_segments() -> None:
    """Five tokens, of which two begin segments; probabilities depend on the last token."""
    first_byte = torch.tensor([0, 1, 2, 3, 4])
    opens = torch.zeros(258, 256, dtype=torch.bool)
    opens[0, [0, 1]] = True
    law = SegmentLaw(opens, first_byte, torch.tensor([False] * 5))
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    table[:, [2, 3, 4]] -= 2.0  # segments that go on for long are rare
    total = 0.0
    for length in range(1, 8):
        for inner in itertools.product((2, 3, 4), repeat=length - 1):
            for first in (0, 1):
                gold = torch.tensor([first, *inner, 0])
                logits = table[torch.tensor([4, first, *inner])]
                rows = torch.tensor([0, *[-1] * len(inner), 0])
                # within a segment every place could be its end, were the next token one that begins another
                is_target = torch.tensor([True] * length + [False])
                terms = token_terms(logits, gold, rows, law)
                total += segment_scores(terms, gold, rows, is_target, law)["logprob"].exp().item()
    assert total == pytest.approx(1.0, abs=1e-3)


def test_a_tool_is_scored_on_segments(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "how many?", "completion": " 12 * 4 = 48 miles"}) + "\n", encoding="utf-8")
    alignment = two_aligned()
    three = type(alignment)([*alignment.tokenizers, alignment.tokenizers[0]])
    (example,) = aligned(path, three).read_by(2)
    base = alignment.tokenizers[0]
    tool = ToolModel(ToolSpec("calculator"), base.tokenizer, name="tool", vocab_size=base.vocab_size)
    logprobs, corrects, abstained = read_scores(tool, [example]).values()
    places = [t for t, row in enumerate(example.opens) if row >= 0]
    pieces = [base.spell(example.token_ids[a:b]) for a, b in itertools.pairwise(places)]
    (result,) = [i for i, piece in enumerate(pieces) if piece == b" 48"]
    assert corrects.nonzero().squeeze(-1).tolist() == [result]
    assert (~abstained).nonzero().squeeze(-1).tolist() == [result]
    assert logprobs[result] > -0.1
    assert (logprobs[torch.arange(len(logprobs)) != result] < -1).all()


def test_an_answer_with_a_special_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": " b<eos> c"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl.* special token of"):
        aligned(path, max_length=99)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("head", {}),
        ("full", {"objective": "separate"}),
        ("head", {"objective": "gain"}),
        pytest.param("lora", {"lora_target_modules": ["q_proj", "v_proj"]}, marks=pytest.mark.soak),
        pytest.param("full", {"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.soak),
    ],
    ids=["full", "head", "separate", "gain", "lora", "compiled"],
)
def test_a_run_from_rows_to_answers(
    method: str, options: dict[str, Any], rows_file: Path, config: Make, tmp_path: Path
) -> None:
    counters.clear()
    specs = []
    for author, tokenizer in enumerate(two_tokenizers()):
        place = tmp_path / f"model-{author}"
        writing_model(tokenizer, author).save_pretrained(place)
        tokenizer.save_pretrained(place)
        specs.append(str(place))
    models = {"base": specs[0], "assistant": [specs[1], "tool:calculator"], "dtype": "float32"}
    rows = str(rows_file)
    setting = RunConfig(**models, data=rows, validation=rows, max_tokens=8, rates=[0.5], refine=0)
    args = config(method=method, **options, max_length=128, logging_strategy="no", eval_strategy="epoch")
    result = train_collaboration(setting, args, quiet=True)
    model = CoLLM.from_pretrained(tmp_path / "run" / "collaboration")
    assert model.alignment is not None
    assert [one is model.alignment.tokenizers[BASE] for one in model.alignment.tokenizers] == [True, False, True]
    assert result.metrics["eval_loss"] > 0
    prompts = [prompt for prompt, _ in ROWS]
    assert [one.token_ids for one in model.generate(prompts, threshold=0.5)] == [
        one.token_ids for one in result.model.generate(prompts, threshold=0.5)
    ]
    assert isinstance(model.assistants[0], ModelSpec)
    assert not counters["graph_break"], "more than the base was compiled"
