"""Specs of tools."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from collm.errors import ConfigError, LoadError

PREFIX = "tool:"
BUILT_IN = ("calculator", "lookup")
HOW_TO_FIND = "check the name, or add its directory to PYTHONPATH"

ToolFunction = Callable[[str], "str | None"]
"""The text so far -> the text that follows, or None to abstain."""


@dataclass(frozen=True)
class ToolSpec:
    """The spec of a tool: an assistant that is a program.

    Attributes:
        name: "calculator", "lookup", or a user function as "package.module:function".
        argument: argument of a built-in tool: the table of "lookup" (a CSV or JSON file), or "marks" for a calculator
            that only completes `<<..=` marks.
        eps: probability that the tool's distribution gives to all tokens but the next one of its answer, in (0, 1).
        seconds: time limit of one call of a user function. All calls for one token may take four times as long.
        max_answer: largest number of characters of an answer; longer answers are truncated.

    Raises:
        ConfigError: the tool does not exist, its name is malformed, or a value is out of range.
    """

    name: str
    argument: str | None = None
    eps: float = 0.01
    seconds: float = 1.0
    max_answer: int = 64

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ConfigError(f"{name} of a tool is {getattr(self, name)!r}, expected {expected}")

        require(0 < self.eps < 1, "eps", "a number between 0 and 1")
        require(self.seconds > 0, "seconds", "a number above 0")
        require(self.max_answer >= 1, "max_answer", "at least 1 character")
        if self.name == "lookup":
            require(self.argument is not None, "argument", "a table: tool:lookup:facts.csv")
        elif self.name == "calculator":
            require(self.argument in (None, "marks"), "argument", "'marks' or none")
        elif self.is_user_function:
            require(self.argument is None, "argument", "none")
        else:
            known = f"{', '.join(BUILT_IN)}, or your own function as package.module:function"
            raise ConfigError(f"there is no tool {self.name!r}; expected {known}")

    @classmethod
    def parse(cls, text: str, **options: Any) -> ToolSpec:
        """Parse "tool:calculator", "tool:lookup:facts.csv" or "tool:package.module:function"; None is no option."""
        options = {key: value for key, value in options.items() if value is not None}
        name, _, rest = text.removeprefix(PREFIX).partition(":")
        if name not in BUILT_IN:
            return cls(text.removeprefix(PREFIX), **options)
        return cls(name, str(Path(rest).resolve()) if name == "lookup" and rest else rest or None, **options)

    @classmethod
    def of(cls, function: ToolFunction, **options: Any) -> ToolSpec:
        """The spec of a user function, by its import path.

        Raises:
            ConfigError: the function cannot be imported, as it is nested, a lambda or defined in a script.
        """
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if not module or not name or module == "__main__" or not name.isidentifier():
            reason = f"{function!r} cannot be imported by name, so no other process can call it"
            raise ConfigError(f"{reason}; define it at the top level of a module")
        return cls(f"{module}:{name}", **options)

    def __str__(self) -> str:
        return PREFIX + self.name + (f":{self.argument}" if self.argument is not None else "")

    @property
    def is_user_function(self) -> bool:
        """Whether the tool is a user function."""
        module, _, function = self.name.partition(":")
        return all(part.isidentifier() for part in [*module.split("."), function])

    @property
    def table(self) -> Path | None:
        """The file that the tool reads, if any."""
        return Path(str(self.argument)) if self.name == "lookup" else None

    def identity(self) -> dict[str, Any]:
        """The properties that the tool's scores depend on, with a digest of its table or source file."""
        path = self.table
        if path is None:
            module, why = self.name.partition(":")[0] if self.is_user_function else f"collm.tools.{self.name}", ""
            try:
                source = getattr(find_spec(module), "origin", None)
            except (ImportError, ValueError) as error:
                source, why = None, f": {error}"
            if source is None:
                raise LoadError(f"could not find the module {module!r}{why}; {HOW_TO_FIND}")
            path = Path(source)
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise LoadError(f"could not read {path}, which {self} uses: {error}") from error
        described = f"{self} (eps {self.eps:g}, max_answer {self.max_answer})"
        return {"path": described, "revision": None, "dtype": None, "quantization": None, "weights": digest}


def not_trusted(where: object, name: str) -> str:
    """Error message for a file that names a user function without the user's consent to run it."""
    trust = "if you trust this code, pass --trust-code (trust_code=True)"
    return f"{where} would run {name}, which is not part of collm; {trust}"
