"""The world of forty tools: each table answers its own question, and no other."""

from __future__ import annotations

from pathlib import Path

from collm.tools.lookup import Lookup
from recipes.facts.many_tools import TOOLS, make_world, rows_of, write_tables


def test_each_tool_knows_its_own_property(tmp_path: Path) -> None:
    world = make_world(0)
    tables = [Lookup(Path(one.removeprefix("tool:lookup:"))) for one in write_tables(world, tmp_path)[:3]]
    for number, row in enumerate(rows_of(world, range(TOOLS), "test")[:3]):
        before, fact = row["completion"].removesuffix(".").rsplit(" ", 1)
        said = [table(f"{row['prompt']} {before}") for table in tables]
        assert said == [f" {fact}" if tool == number else None for tool in range(3)]
