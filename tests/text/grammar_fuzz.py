"""Grammars of growing depth: schemas with all ways of nesting, regular expressions, choices, Lark and GBNF.

As a script it compiles them as the server does, walks through each, and reports: a crash would end it.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from collm.core.params import StructuredOutputs
from collm.errors import RequestError
from collm.text.grammars import Grammars, bit_row
from tests.tokenizers import merging_tokenizer

WRAPS = ("ref", "allOf", "anyOf", "oneOf", "items", "prefixItems", "properties", "additionalProperties", "not")


def schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose definitions are nested in each other by references."""
    wraps = rng.sample(WRAPS, rng.randint(1, 3))

    def wrap(inner: dict[str, Any]) -> dict[str, Any]:
        how = rng.choice(wraps)
        if how == "ref":
            return inner
        if how in ("allOf", "anyOf", "oneOf", "prefixItems"):
            return {how: [inner] * rng.randint(1, 3)}
        if how == "properties":
            names = [f"p{i}" for i in range(rng.randint(1, 3))]
            return {"type": "object", how: dict.fromkeys(names, inner), "required": names[: rng.randint(0, 3)]}
        return {how: inner}

    leaves = [
        {"type": "string", "pattern": rng.choice(["a{1,900}", "(a|b)*c{50}", "[a-z]+@[a-z]+"])},
        {"type": "string", "format": rng.choice(["date-time", "uri", "uuid", "ipv6"])},
        {"enum": [f"v{i}" for i in range(rng.choice([1, 50, 5000]))]},
        {"type": "integer", "minimum": -(10 ** rng.randint(1, 18)), "maximum": 10 ** rng.randint(1, 18)},
        {"type": "number", "multipleOf": rng.choice([0.01, 3, 7.5])},
        {"type": "string", "minLength": 5, "maxLength": rng.choice([10, 100_000])},
        {"type": "array", "minItems": 3, "maxItems": rng.choice([4, 10_000])},
        {"const": {"a": [1] * 50}},
    ]
    definitions = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(depth)}
    definitions[f"d{depth}"] = rng.choice(leaves)
    if rng.random() < 0.2:
        definitions[f"d{depth}"] = {"anyOf": [{"$ref": "#/$defs/d0"}, rng.choice(leaves)]}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def nested(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema that is nested without references."""
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        how = rng.choice(("allOf", "anyOf", "items", "properties", "not"))
        found = {how: [found] if how.endswith("Of") else {"p": found} if how == "properties" else found}
    return found


def regex(rng: random.Random, depth: int) -> str:
    found = rng.choice(["a", "[a-z]", "."])
    for _ in range(depth):
        found = rng.choice(["({})*", "({}|b)", "({})+c", "({}){{1,9}}", "x({})", "({})?", "(?i:{})"]).format(found)
    return found


def lark(rng: random.Random, depth: int) -> str:
    upper = rng.random() < 0.5
    names = [f"R{i}" if upper else f"r{i}" for i in range(depth + 1)]
    shapes = ['{} "a"', '"a" {}', '{} | "b"', "({})+", "{}?", "{}~1..5", '"x" {} "y"', "{}"]
    shapes += (
        ["~{}", "{} & /[a-z]+/", "/[a-z]*/ & ({})"]
        if upper
        else ["{0} {0}", "{0} | {0}", '%json {{"type": "object"}} {}']
    )
    few = rng.sample(shapes, rng.randint(1, 3))
    rules = [f"{name}: {rng.choice(few).format(following)}" for name, following in itertools.pairwise(names)]
    return "\n".join([f"start: {names[0]}", *rules, f'{names[-1]}: "z"'])


def gbnf(rng: random.Random, depth: int) -> str:
    return "\n".join(
        [
            f'root ::= r0 {"(" * depth}"a"{")" * depth}',
            *(f'r{i} ::= r{i + 1} | "b"' for i in range(depth)),
            f'r{depth} ::= "c"',
        ]
    )


def grammars(seed: int, count: int, deepest: int = 3000) -> Iterator[StructuredOutputs]:
    """Grammars of growing depth."""
    rng = random.Random(seed)
    for place in range(count):
        depth = int(deepest ** (place / count) * rng.uniform(0.5, 1)) + 1
        made: dict[str, Any] = {
            "json": rng.choice([schema, schema, nested])(rng, depth),
            "regex": regex(rng, depth),
            "choice": [rng.choice("abc") * rng.randint(1, depth) for _ in range(depth)],
            "grammar": rng.choice([lark, lark, gbnf])(rng, depth),
        }
        form = rng.choice(["json", "json", "json", "regex", "choice", "grammar", "grammar"])
        yield StructuredOutputs(**{form: made[form]})


def main(seed: int, count: int) -> None:
    tokenizer = merging_tokenizer('{"name": "weather", "days": 3}', "the cat sat on a mat")
    compiler = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    rng, done, slowest = random.Random(seed), {"compiled": 0, "refused": 0}, 0.0
    for structured in grammars(seed, count):
        start = time.monotonic()
        try:
            grammar = compiler.compile(structured, trusted=False)
            walk(grammar, len(tokenizer), rng)
            done["compiled"] += 1
        except RequestError:
            done["refused"] += 1
        slowest = max(slowest, time.monotonic() - start)
    print(json.dumps({**done, "slowest_s": round(slowest, 1)}))


def walk(grammar: Any, vocab_size: int, rng: random.Random, steps: int = 30) -> None:
    """Write some tokens that the grammar allows, and take some back."""
    text: list[int] = []
    for _ in range(steps):
        bits = bit_row(vocab_size)
        grammar.go_to(text)
        if grammar.complete:
            return
        grammar.fill(bits)
        allowed = [token for token in range(vocab_size) if bits[token // 32] >> (token % 32) & 1]
        text.append(rng.choice(allowed))
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
