"""The report page: well formed, alone in the world, everything escaped, readable without colour or a mouse."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import pytest

from collm.errors import DataError, MissingExtra, WriteError
from collm.evaluation.report import (
    Chart,
    ChartPoint,
    Report,
    ShownAnswer,
    SystemRow,
    Token,
    deferral_chart,
    render_page,
    write_report,
)

VOID = {"meta", "link", "br", "img", "hr", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    def every(self, tag: str, css_class: str | None = None) -> list[Element]:
        here = [self] if self.tag == tag and (css_class is None or css_class in self.classes) else []
        return here + [e for child in self.children if isinstance(child, Element) for e in child.every(tag, css_class)]

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """Builds the tree and fails on a tag that is not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = self.open = Element("root", {})
        self.feed(page)
        self.close()
        assert self.open is self.root, f"<{self.open.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self.open)
        self.open.children.append(element)
        if tag not in VOID:
            self.open = element

    def handle_startendtag(self, tag, attrs):
        self.open.children.append(Element(tag, dict(attrs), self.open))

    def handle_endtag(self, tag):
        assert tag == self.open.tag, f"</{tag}> closes <{self.open.tag}>"
        assert self.open.parent is not None
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.children.append(data)


def tree(report: Report) -> Element:
    return Tree(render_page(report)).root


def drawn(chart: Chart) -> str:
    """A chart's <svg> element."""
    (svg,) = re.findall("<svg.*?</svg>", render_page(Report("", "", charts=[chart])), flags=re.DOTALL)
    return svg


HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text' $title </li></svg>"
TOKENS = [
    Token("The", 0, 0.01),
    Token(" capital", 0, 0.034),
    Token(" <script>alert(1)</script>", 1, 0.987),
    Token("\n", 0, 0.2),
    Token("", 2, 0.6),
    Token("\x00\r\x9f\ud800", 0, 0.0),
    Token("&amp;", 2, 1.0),
]


ROWS = [
    SystemRow("Base alone", 0.083, 0.046, 0.147, 0.0, 512.3, "0.12 M parameters"),
    SystemRow("Expert alone", 0.0, 0.0, 0.031, 1.0, 1301.2),
    SystemRow("Random deferral", 0.075, 0.04, 0.136, 0.081, 39.07),
    SystemRow("Collaboration", 0.983, 0.941, 0.995, 0.081, 402),
]
CURVE = [
    ChartPoint("threshold -1", 1.0, 0.0, 0.0, 0.031),
    ChartPoint("threshold 1", 0.0, 0.083, 0.046, 0.147),
    ChartPoint("threshold 0.51", 0.081, 0.983, 0.941, 0.995),
]
DIAGONAL = {"whole answers at random": [(0.0, 0.083), (1.0, 0.0)]}


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(
        title="A pair of models",
        summary="The collaboration is right.\n\nNothing else is.",
        rows=ROWS,
        charts=[
            deferral_chart(CURVE, ROWS, 0.081, DIAGONAL),
            Chart("cost", "Accuracy against cost", "", "GFLOP", "Accuracy", CURVE, in_use=0.7, unit="GFLOP"),
        ],
        examples=[
            ShownAnswer("Tell me about Kenya.", "It is right.", TOKENS, 1.0),
            ShownAnswer("And Chad?", "It is wrong.", [Token("No", 1, 0.7)], 0.0),
            ShownAnswer("And Peru?", "It is unjudged.", [], None),
            ShownAnswer("And Togo?", "It is half right.", [], 0.5),
        ],
        authors=["generalist", "geography expert", "chemistry expert"],
        details={"command": "collm demo --out demo", "torch": "2.13.0"},
    )


@pytest.fixture(scope="module")
def page(report: Report) -> Element:
    return tree(report)


def test_has_one_heading_of_its_rank_and_a_language(page, report):
    assert [h1.text for h1 in page.every("h1")] == [report.title]
    assert page.every("title")[0].text == report.title
    assert page.every("html")[0].attributes["lang"] == "en"
    assert [p.text for p in page.every("div", "summary")[0].every("p")] == report.summary.split("\n\n")
    assert not tree(Report("Nothing yet", "")).every("section")  # what is empty is left out


def test_every_section_and_article_is_named_by_its_heading(page):
    ids = [e.attributes["id"] for tag in ("h2", "h3") for e in page.every(tag) if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in page.every("section") + page.every("article"):
        assert set((element.attributes["aria-labelledby"] or "").split()) <= set(ids)


def test_asks_nothing_of_the_network(page, report):
    assert not re.search(r"https?:|@import|url\((?!#)", render_page(report))
    assert not page.every("img") + page.every("iframe") + page.every("object")

    def links(element: Element) -> list[str | None]:
        own = [value for name, value in element.attributes.items() if name in ("src", "href", "xlink:href")]
        return own + [link for child in element.children if isinstance(child, Element) for link in links(child)]

    assert all(link is not None and link.startswith(("#", "data:")) for link in links(page))
    policy = next(m for m in page.every("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert (policy.attributes["content"] or "").startswith("default-src 'none'")


def test_the_table_has_a_row_per_system_with_its_numbers(page, report):
    results, curve, cost = page.every("table")
    rows = results.every("tbody")[0].every("tr")
    assert [row.every("th")[0].text for row in rows] == [row.name + row.note for row in report.rows]
    assert [td.text for td in rows[0].every("td")] == ["8.3% 4.6% to 14.7%", "0.0%", "512"]
    assert [row.every("td")[-1].text for row in rows] == ["512", "1,301", "39.1", "402"]
    *numbered, diagonal = curve.every("tbody")[0].every("tr")
    assert len(numbered) == len(CURVE) + len(ROWS)
    assert diagonal.text == "whole answers at random0.0% to 100.0%8.3% to 0.0%"
    assert [th.text for th in cost.every("tbody")[0].every("th")] == ["threshold 1", "threshold 0.51", "threshold -1"]
    costs = [row.every("td")[0].text for row in cost.every("tbody")[0].every("tr")]
    assert costs == ["0 GFLOP", "0.081 GFLOP", "1 GFLOP"]


def test_tables_are_marked_up_for_screen_readers(page):
    for table in page.every("table"):
        assert table.every("caption")[0].text
        assert {th.attributes["scope"] for th in table.every("thead")[0].every("th")} == {"col"}
        for row in table.every("tbody")[0].every("tr"):
            assert [th.attributes["scope"] for th in row.every("th")] == ["row"]
            assert len(row.every("th") + row.every("td")) == len(table.every("thead")[0].every("th"))


def test_every_token_is_there_with_its_author_and_defer_prob(page, report):
    shown = page.every("article")[0].every("li", "token")
    texts = ["The", " capital", " <script>alert(1)</script>", "⏎\n", "◌", "␀␍\ufffd\ufffd", "&amp;"]
    for element, token, text in zip(shown, TOKENS, texts, strict=True):
        assert element.text == f"{text} {report.authors[token.author]} · defer prob {token.defer_prob:.3f} "
        assert element.attributes["tabindex"] == "0"
    assert len(page.every("script")) == 1  # the page's own


def test_a_token_shows_what_each_author_would_have_written(report):
    candidates = [[(" Rome", 0.5), ("</s>", 0.25)], []]
    example = ShownAnswer("p", "r", [Token("Paris", 1, 0.9, candidates)])
    (token,) = tree(replace(report, examples=[example])).every("li", "token")
    (line,) = token.every("span", "line")  # the expert had nothing to say
    assert line.text == "generalist: \u00a0Rome 50.0% · </s> 25.0% "


def test_verdicts_are_words_and_only_where_somebody_judged(page):
    verdicts = [[v.text for v in article.every("span", "verdict")] for article in page.every("article")]
    assert verdicts == [["✓ right"], ["✗ wrong"], [], ["score 0.5"]]


@pytest.mark.slow
def test_assistants_are_told_apart_without_colour(page, report):
    marks = [span for li in page.every("ul", "legend")[0].every("li") for span in li.every("span")]
    assert [mark.text for mark in marks] == report.authors
    assert "assistant" not in marks[0].classes
    underlines = [{c for c in mark.classes if c.startswith("underline")} for mark in marks]
    assert underlines[0] == set()
    assert underlines[1] != underlines[2]
    style = page.every("style")[0].text
    drawn = {re.search(rf"\.underline-{i} {{ text-decoration-style: (\w+)", style)[1] for i in range(5)}
    assert len(drawn) == 5
    crowd = replace(report, authors=[f"author {number}" for number in range(31)])
    marks = [li.every("span")[0].attributes["class"] for li in tree(crowd).every("ul", "legend")[0].every("li")]
    assert len(set(marks)) == 31


def test_every_text_is_escaped():
    rows = [SystemRow(HOSTILE, 0.5, 0.4, 0.6, 0.5, 1, HOSTILE)]
    report = Report(
        HOSTILE,
        HOSTILE,
        rows=rows,
        charts=[deferral_chart([ChartPoint(HOSTILE, 0.5, 0.5, 0.4, 0.6)], rows, 0.1)],
        examples=[ShownAnswer(HOSTILE, HOSTILE, [Token(HOSTILE, 1, 0.5, [[], [(HOSTILE, 0.5)]])])],
        authors=["base", HOSTILE],
        details={HOSTILE: HOSTILE},
    )
    page = tree(report)
    assert len(page.every("script")) == 1
    # title twice, summary, row name and note, the chart's mark in its label, its mark and point in the numbers (3),
    # prompt, reference, token, author thrice, candidate, detail name and value
    assert page.text.count(HOSTILE) == 17


def test_the_plot_is_labelled_text_in_the_colours_of_the_page(page, report):
    pictures = page.every("div", "chart")
    assert [one.attributes["role"] for one in pictures] == ["img", "img"]
    assert pictures[0].attributes["aria-label"].startswith("Accuracy against deferral rate.")
    (svg,) = pictures[0].every("svg")
    words = [text.text.strip() for text in svg.every("text")]
    assert {row.name for row in report.rows} < set(words)
    assert {"Accuracy", "Deferral rate", "in use: 8.1%", "100%", *DIAGONAL} < set(words)
    colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", drawn(report.charts[0])))
    assert colours == {"none", "currentColor", "var(--curve)"}
    assert not svg.every("style")  # it would style the whole page


@pytest.mark.slow
def test_charts_of_any_range_have_ticks():
    for low, high, furthest in ((0.0, 1.0, 1.0), (0.52, 0.53, 3e-4), (0.4, 0.4, 1234.0), (0.1, 0.8, 0.0)):
        points = [ChartPoint("a", 0.0, low, low, low), ChartPoint("b", furthest, high, high, high)]
        svg = Tree(drawn(Chart("c", "c", "", "x", "y", points, unit="GFLOP"))).root
        words = [text.text.strip() for text in svg.every("text")]
        percents = [word for word in words if word.endswith("%")]
        assert len(set(percents)) == len(percents) >= 2
        assert len([word for word in words if re.fullmatch(r"[\u2212\d.,e-]+", word)]) >= 2


def test_rows_at_one_place_all_keep_their_name(report):
    twins = [replace(ROWS[-1], name=name) for name in ("full", "head only", "costs $5 to $6", "名前")]
    chart = deferral_chart(CURVE, [*ROWS, *twins], 0.0)
    svg = Tree(drawn(replace(chart, in_use=None))).root
    words = [text.text.strip() for text in svg.every("text")]
    assert [words.count(row.name) for row in [*ROWS, *twins]] == [1] * 8
    assert not any("in use" in word for word in words)


@pytest.mark.slow
def test_the_same_report_gives_the_same_bytes(tmp_path, report):
    assert drawn(deferral_chart(CURVE, ROWS, 0.081)) == drawn(deferral_chart(CURVE[::-1], ROWS, 0.081))
    for name in ("a.html", "folder/b.html"):
        write_report(tmp_path / name, report)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "folder/b.html").read_bytes()


@pytest.mark.slow
def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, report, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(WriteError, match="No space"):
        write_report(target, report)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def test_a_chart_without_matplotlib_names_the_extra(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"matplotlib is not installed; .* 'collm\[eval\]'"):
        render_page(report)
    assert render_page(replace(report, charts=[]))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda report: SystemRow("base", 95.0, 0.9, 0.97, 0.1, 1), "expected a share from 0 to 1"),
        (lambda report: Token("a", 0, -0.1), "expected a share from 0 to 1"),
        (lambda report: deferral_chart([], [], 8.1), "expected a share from 0 to 1"),
        (lambda report: replace(report, authors=["base", "x"]), "by author 2, but the report names 2 authors"),
    ],
)
def test_a_percentage_is_no_share_and_every_author_has_a_name(report, make, complaint):
    with pytest.raises(DataError, match=complaint):
        make(report)


def _luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: list[float], b: list[float]) -> float:
    """WCAG 2 contrast ratio of two colours in sRGB, channels in [0, 1]."""
    dark, light = sorted((_luminance(a), _luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_meets_wcag_aa_in_light_and_dark(page):
    style = page.every("style")[0].text
    schemes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(schemes) == 2
    (tint,) = (int(share) / 100 for share in re.findall(r"color-mix\(in srgb, var\(--hue\) (\d+)%", style))
    for scheme in schemes:
        found = re.findall(r"--([\w-]+): #(\w{6})", scheme)
        colours = {name: [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for name, code in found}
        for ground in (colours["page"], colours["card"]):
            for name in ("ink", "muted", "right", "wrong", "curve"):
                assert _contrast(colours[name], ground) >= 4.5, name
            for number in range(6):
                hue = colours[f"hue-{number}"]
                marked = [tint * h + (1 - tint) * g for h, g in zip(hue, ground, strict=True)]
                assert _contrast(colours["ink"], marked) >= 4.5
                assert _contrast(colours["muted"], marked) >= 4.5  # the sign for a line break
                assert _contrast(hue, marked) >= 3  # the underline
