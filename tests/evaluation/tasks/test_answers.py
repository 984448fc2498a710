"""Answers are found in whatever a model writes, in time proportional to it, and nothing it writes raises."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collm.evaluation.tasks.gsm8k import before_next_question, final_number, first_line, stated_answer
from recipes.paper.bioasq import names_in, split_answer, yes_or_no
from recipes.paper.hendrycks_math import boxed, final_answer

PLAIN = (before_next_question, first_line, stated_answer, boxed, final_number, final_answer, split_answer, yes_or_no)
READERS = {**{one.__name__: one for one in PLAIN}, "names_in": lambda text: names_in(text, several=True)}
PIECES = [
    *("\\boxed{", "\\boxed ", "\\fbox", "{", "}", "\\", "\\{", "$", "(", ")", "A", "(B)", "a dog"),
    *(
        "The final answer is:",
        "the answer is",
        "Final answer:",
        "\n",
        "\n\nQuestion:",
        "\nQ:",
        " ",
        "\t",
        "-",
        "\u2212",
    ),
    *("1,234", "1,", "$-5", ".", "=", "5", "e9", "\x00", "\x85", "\u2028", "- name\n", "yes", "no", "*", "_", "\u0663"),
    *("-", "\u2212"),
]


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_nothing_raises(read, text):
    read(text)


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("piece", PIECES)
def test_a_huge_text_is_read_at_once(read, piece):
    text = piece * (200_000 // len(piece))
    before = time.process_time()
    read(text)
    assert time.process_time() - before < 2  # what takes the square of the length would take minutes


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It is 5.\n\nQuestion: And then?", "It is 5.\n\n"),
        ("It is 5.\n  Q: next\nQ: over", "It is 5.\n"),
        ("5\nProblem 12: next", "5\n"),
        ("Question: repeated?\nAnswer: 5", "Question: repeated?\nAnswer: 5"),
        ("\n\nQuestion: repeated?\nAnswer: 5\n\nQuestion: next?", "\n\nQuestion: repeated?\nAnswer: 5\n\n"),
        ("The question: is it 5?", "The question: is it 5?"),
        ("", ""),
    ],
)
def test_what_a_model_asks_itself_is_left_out(text, kept):
    assert before_next_question(text) == kept


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 5. Done.\nBye", "5. Done."),
        ("The answer is 4. No, the final answer is: **5**", "5"),
        ("**Final Answer:** 5", "5"),
        ("The final answer is:\n\n  5 apples\n6", "5 apples"),
        ("The answer is", ""),
        ("Answer: let me think", None),
        ("answer isolated", None),
        ("", None),
    ],
)
def test_stated_answers(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"$\boxed{5}$", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{1}, then \boxed{ 2 }.", "2"),
        (r"\boxed{3} and \boxed{\frac{1}{2", "3"),  # the last was cut off
        (r"\boxed{\frac{1 and \boxed{3}", "3"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x \} y}", r"x \} y"),
        (r"\fbox{4}", "4"),
        (r"\boxed 2$.", "2"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"\boxed{}", ""),
        (r"}}} \boxed {5} {", "5"),
        (r"\boxed{", None),
        (r"\boxedness{5}", None),
        ("5", None),
    ],
)
def test_boxes(text, content):
    assert boxed(text) == content


@pytest.mark.slow
@given(st.recursive(st.text("ab12 "), lambda inner: st.lists(inner, max_size=3).map(lambda p: "{" + "".join(p) + "}")))
def test_a_box_gives_back_what_was_put_in(content):
    assert boxed(f"so $\\boxed{{{content}}}$ {{and}} more") == content.strip()
