"""The facts are complete and right where known by hand, and its splits keep entities apart."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from collm.errors import ConfigError
from recipes.facts import world as world_of_facts
from recipes.facts.world import DemoWorld, Statement, Template, chemistry, fill, geography, split_words

CONTINENTS = {"Africa": 54, "Asia": 48, "Europe": 44, "North America": 23, "Oceania": 14, "South America": 12}


def read(name: str) -> list[dict[str, str]]:
    text = (Path(world_of_facts.__file__).parent / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="module", params=[1, 2])
def world(request: pytest.FixtureRequest) -> DemoWorld:
    return DemoWorld(num_assistants=request.param, seed=3)


def test_countries_are_complete() -> None:
    rows = read("countries.csv")
    assert len(rows) == 195
    for column in ("code", "name", "capital"):
        assert len({row[column] for row in rows}) == 195, column
    assert Counter(row["continent"] for row in rows) == CONTINENTS
    for row in rows:
        assert all(row[column].strip() == row[column] != "" for column in row if column != "article"), row
        assert row["article"] in ("", "the")
        assert len(row["code"]) == 2
        assert len(row["currency_code"]) == 3


def test_a_currency_code_has_one_name() -> None:
    names = {(row["currency_code"], row["currency"]) for row in read("countries.csv")}
    assert len({code for code, _ in names}) == len({name for _, name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "capital", "currency", "continent"),
    [
        ("Australia", "Canberra", "Australian dollar", "Oceania"),
        ("Brazil", "Brasília", "Brazilian real", "South America"),
        ("Bulgaria", "Sofia", "Bulgarian lev", "Europe"),
        ("Burundi", "Gitega", "Burundi franc", "Africa"),
        ("Cambodia", "Phnom Penh", "riel", "Asia"),
        ("Canada", "Ottawa", "Canadian dollar", "North America"),
        ("Croatia", "Zagreb", "euro", "Europe"),
        ("Cyprus", "Nicosia", "euro", "Asia"),
        ("Ecuador", "Quito", "US dollar", "South America"),
        ("Equatorial Guinea", "Malabo", "CFA franc BEAC", "Africa"),
        ("Guinea", "Conakry", "Guinean franc", "Africa"),
        ("Guinea-Bissau", "Bissau", "CFA franc BCEAO", "Africa"),
        ("Kazakhstan", "Astana", "tenge", "Asia"),
        ("Malaysia", "Kuala Lumpur", "Malaysian ringgit", "Asia"),
        ("Myanmar", "Naypyidaw", "kyat", "Asia"),
        ("Niger", "Niamey", "CFA franc BCEAO", "Africa"),
        ("Nigeria", "Abuja", "naira", "Africa"),
        ("Papua New Guinea", "Port Moresby", "kina", "Oceania"),
        ("Russia", "Moscow", "Russian ruble", "Europe"),
        ("Slovakia", "Bratislava", "euro", "Europe"),
        ("Slovenia", "Ljubljana", "euro", "Europe"),
        ("South Africa", "Pretoria", "rand", "Africa"),
        ("Türkiye", "Ankara", "Turkish lira", "Asia"),
        ("Zimbabwe", "Harare", "Zimbabwe gold", "Africa"),
        ("the Gambia", "Banjul", "dalasi", "Africa"),
        ("the Republic of the Congo", "Brazzaville", "CFA franc BEAC", "Africa"),
        ("the Democratic Republic of the Congo", "Kinshasa", "Congolese franc", "Africa"),
        ("the United Kingdom", "London", "pound sterling", "Europe"),
    ],
)
def test_known_countries(name: str, capital: str, currency: str, continent: str) -> None:
    facts = {entity.name: entity.facts for entity in geography().entities}
    assert facts[name] == {"capital": capital, "currency": currency, "continent": continent}


def test_elements_are_complete() -> None:
    rows = read("elements.csv")
    assert [row["number"] for row in rows] == [str(number) for number in range(1, 119)]
    assert len({row["symbol"] for row in rows}) == len({row["name"] for row in rows}) == 118
    assert all(row["symbol"].isalpha() and row["symbol"].istitle() and len(row["symbol"]) <= 2 for row in rows)
    # Seven periods; the first leaves out 16 columns, the next two 10 each, and two rows of 15 stand apart.
    sizes = Counter(row["group"] for row in rows)
    assert sizes.pop("lanthanide") == sizes.pop("actinide") == 15
    assert sizes == {"1": 7, "2": 6, "3": 2} | {str(group): 4 for group in range(4, 13)} | {
        str(group): 6 for group in range(13, 18)
    } | {"18": 7}


@pytest.mark.parametrize(
    ("name", "symbol", "number", "group"),
    [
        ("hydrogen", "H", "1", "1"),
        ("helium", "He", "2", "18"),
        ("carbon", "C", "6", "14"),
        ("sodium", "Na", "11", "1"),
        ("chlorine", "Cl", "17", "17"),
        ("iron", "Fe", "26", "8"),
        ("silver", "Ag", "47", "11"),
        ("tin", "Sn", "50", "14"),
        ("tungsten", "W", "74", "6"),
        ("gold", "Au", "79", "11"),
        ("mercury", "Hg", "80", "12"),
        ("lead", "Pb", "82", "14"),
        ("uranium", "U", "92", "actinide"),
        ("europium", "Eu", "63", "lanthanide"),
        ("hafnium", "Hf", "72", "4"),
        ("lawrencium", "Lr", "103", "actinide"),
        ("oganesson", "Og", "118", "18"),
    ],
)
def test_known_elements(name: str, symbol: str, number: str, group: str) -> None:
    facts = {entity.name: entity.facts for entity in chemistry().entities}
    assert facts[name] == {"symbol": symbol, "number": number, "group": group}


def test_splits_share_no_entity(world: DemoWorld) -> None:
    name_of = {s.prompt: (d.name, e.name) for d in world.domains for e in d.entities for s in d.statements([e])}
    splits = [{name_of[row["prompt"]] for row in rows} for rows in (world.train, world.validation, world.test)]
    assert sum(len(split) for split in splits) == len(set().union(*splits))
    assert set().union(*splits) == {(d.name, e.name) for d in world.domains for e in d.entities}
    for rows, names in zip((world.validation, world.test), splits[1:], strict=True):
        assert len(rows) == 3 * len(names)


def test_rows_are_true_and_come_once(world: DemoWorld) -> None:
    rows = world.train + world.validation + world.test
    truth = {s.prompt: s.completion for s in world.statements}
    assert all(truth[row["prompt"]] == row["completion"] for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.parametrize("seed", range(3))
def test_every_continent_is_in_the_held_out_splits_in_proportion(seed: int) -> None:
    world = DemoWorld(seed=seed)
    fact_of = {s.prompt: s.fact for s in world.statements}
    for rows in (world.validation, world.test):
        counts = Counter(fact_of[row["prompt"]] for row in rows)
        for continent, countries in CONTINENTS.items():
            assert abs(counts[continent] - countries / 5) <= 1


def test_a_prompt_determines_the_answer_but_for_the_fact(world: DemoWorld) -> None:
    for domain in world.domains:
        assert len({t.question for t in domain.templates}) == len({t.answer for t in domain.templates})
        assert {t.kind for t in domain.templates} == set(domain.entities[0].facts)
    assert len({s.prompt for s in world.statements}) == len(world.statements)


def test_facts_are_a_small_share_of_the_target_tokens(world: DemoWorld) -> None:
    assert 0.06 <= world.fact_share() <= 0.10


def test_fact_share_counts_words_marks_and_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    statement = Statement("Which?", "It is ", "Phnom Penh", ", yes.")
    assert split_words(statement.completion) == ["It", "is", "Phnom", "Penh", ",", "yes", "."]
    monkeypatch.setattr(DemoWorld, "statements", [statement])
    assert DemoWorld().fact_share() == 2 / 8


def test_fill_cuts_at_the_fact() -> None:
    statement = fill(Template("capital", "Capital of {name}?", "It is {fact}, yes."), "Chad", "N'Djamena")
    assert statement == Statement("Capital of Chad?", "It is ", "N'Djamena", ", yes.")
    assert statement.row == {"prompt": "Capital of Chad?", "completion": "It is N'Djamena, yes."}


def test_the_seed_decides() -> None:
    def rows(seed: int) -> list[list[dict[str, str]]]:
        world = DemoWorld(num_assistants=2, seed=seed)
        return [world.train, world.validation, world.test]

    assert rows(5) == rows(5)
    assert rows(5) != rows(6)


@pytest.mark.parametrize("num_assistants", [0, 3])
def test_other_numbers_of_assistants_are_refused(num_assistants: int) -> None:
    with pytest.raises(ConfigError, match="1 or 2"):
        DemoWorld(num_assistants=num_assistants)
