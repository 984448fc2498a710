"""Imports go one way, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import collm
from collm.core.types import author_name

SOURCE = Path(collm.__file__).parent
BOTTOM = {"errors", "version", "atomic", "untrusted", "redaction", "noise", "http"}
MAY_IMPORT = {
    "core": {"core"},
    "tools": {"tools"},
    "text": {"core", "text"},
    "models": {"core", "tools", "text", "models"},
    "training": {"core", "tools", "text", "models", "training"},
    "engine": {"core", "tools", "text", "models", "engine"},
    "artefact": {"core", "tools", "text", "models", "artefact"},
    "vllm": {"core", "tools", "text", "models", "engine", "artefact", "vllm"},
    "engines": {"core", "tools", "text", "models", "engine", "vllm"},
    "completions": {"core", "tools", "text", "models", "engine"},
    "collaboration": {"core", "tools", "text", "models", "engine", "artefact", "vllm", "engines", "completions"},
    "evaluation": {"core", "tools", "text", "models", "training", "engine", "artefact", "collaboration", "evaluation"},
}
MAY_IMPORT["serving"] = {*MAY_IMPORT["collaboration"], "collaboration", "serving"}
MAY_IMPORT["run"] = {*MAY_IMPORT["evaluation"], "run"}
MAY_IMPORT["demo"] = {*MAY_IMPORT["evaluation"], "run", "demo"}
MAY_IMPORT["cli"] = {*MAY_IMPORT["demo"], "vllm", "serving", "cli"}
MAY_IMPORT["__main__"] = {"cli"}
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "matplotlib", "numpy"}
HTTP_CLIENTS = {"aiohttp", "httpcore", "httpx", "requests"}


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names imported by a file; TYPE_CHECKING blocks aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(tree.body) if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_order_of_the_rooms(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    allowed = MAY_IMPORT.get(room, set()) | BOTTOM
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "collm" and len(parts) > 1:
            is_room = parts[1] in MAY_IMPORT.keys() | BOTTOM  # else a public name of the package
            assert parts[1] in allowed or not is_room, f"{room} imports {name}"


@pytest.mark.slow
def test_no_files_import_each_other() -> None:
    modules = {module_of(path): path for path in FILES}
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)} - {module}
        for module, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises the first cycle


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(MAY_IMPORT) | BOTTOM


def test_core_imports_torch_and_nothing_else_of_weight() -> None:
    for path in (SOURCE / "core").glob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(path)} & (HEAVY - {"torch"})


@pytest.mark.parametrize("path", sorted((SOURCE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_commands_import_nothing_heavy_before_they_run(path: Path) -> None:
    names = imports_of(path, top_level_only=True)
    assert not {name.split(".")[0] for name in names} & HEAVY
    allowed = (
        "collm.atomic",
        "collm.cli",
        "collm.core.calibration",
        "collm.core.params",
        "collm.core.types",
        "collm.errors",
        "collm.redaction",
        "collm.run.options",
        "collm.serving.settings",
        "collm.tools.spec",
        "collm.untrusted",
        "collm.version",
    )
    assert all(name.startswith(allowed) for name in names if name.startswith("collm"))


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["", "--help", "generate --help", "score --help", "serve --help"])
def test_the_package_and_its_help_import_neither_torch_nor_an_http_client(asked: str) -> None:
    program = "from collm.cli.main import main; main()" if asked else "import collm"
    command = [sys.executable, "-X", "importtime", "-c", program, *asked.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "collm" in imported
    assert not imported & (HEAVY | HTTP_CLIENTS)


@pytest.mark.slow
def test_what_the_source_imports_is_declared() -> None:
    pyproject = (SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = pyproject[pyproject.index("dependencies = [") : pyproject.index("\ndev = [")]
    declared = {canonicalize_name(name) for name in re.findall(r'"([\w-]+)', dependencies)}
    found = {name.split(".")[0] for path in FILES for name in imports_of(path)} - sys.stdlib_module_names - {"collm"}
    sold_by = packages_distributions()
    missing = {name for name in found if not declared & set(map(canonicalize_name, sold_by.get(name, [name])))}
    missing.discard("llama_cpp")  # of llama-cpp-python, which is declared, but not installed everywhere
    assert missing == {"deepspeed", "triton", "vllm"}  # imported only where somebody installed them


def test_no_command_has_many_parameters() -> None:
    for path in (SOURCE / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, (path.name, node.name)


def test_names_of_authors_are_made_in_one_function() -> None:
    """No other file makes one, and no document spells one otherwise."""
    made = re.compile(r"\bassistant[ -]1\b|f\"assistant[ -]?\{")
    texts = [*FILES, *(SOURCE.parents[1] / "docs").glob("*.md")]
    assert {path.name for path in texts if made.search(path.read_text(encoding="utf-8"))} == {"types.py"}
    assert [author_name(author) for author in range(4)] == ["base", "assistant", "assistant-2", "assistant-3"]


def test_public_names_are_there() -> None:
    for name in collm.__all__:
        assert getattr(collm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = collm.nothing
