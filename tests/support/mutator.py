"""Change bytes and json values in ways that files are broken in, drawn from a seeded generator; for test_fuzz.py."""

import contextlib
import copy
import json
import random

HOSTILE = [None, True, False, -1, 0, 1, 7, 3.5, 1e308, 10**30, 10**9, -(2**63), "", "auto", "12", "x" * 50, [], [1, 2]]
HOSTILE += [["a"], {}, {"a": 1}, [[[]]], "\ud83d", "\0", "../../x", float("nan"), float("inf"), "lora_A", "2" * 500]
SYNTAX = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
]
SYNTAX += [b"\\ud83d", b"\\u0000", b"null", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, "水".encode(), "水".encode()[:2]]


def mutate_bytes(chance: random.Random, content: bytes, times: int = 1) -> bytes:
    """Flip, drop, repeat, insert or cut something."""
    for _ in range(times):
        start = chance.randrange(len(content) + 1)
        end = min(len(content), start + chance.choice((1, 1, 2, 8, 100)))
        part = content[start:end]
        new = chance.choice(
            (
                lambda part: bytes([part[0] ^ 1 << chance.randrange(8)]) + part[1:] if part else b"",
                lambda part: b"",
                lambda part: part * 2,
                lambda part: chance.choice(SYNTAX),
                lambda part: chance.choice(SYNTAX) + part,
                lambda part: chance.randbytes(len(part)),
                lambda part: part[::-1],
            )
        )(part)
        content = content[:start] + new + content[end:]
        if chance.random() < 0.05:
            content = content[: chance.randrange(len(content) + 1)]
    return content


def nodes(value, found=None) -> list[tuple]:
    """(container, key) of all that stands in a value."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def mutate_json(chance: random.Random, value: dict, keys: list[str]) -> dict:
    """Replace, drop, rename, wrap or swap values; `keys` are names that mean something to the reader."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        if not (places := nodes(value)):
            break
        container, key = chance.choice(places)
        action = chance.randrange(6)
        if action <= 1:
            container[key] = copy.deepcopy(chance.choice(HOSTILE))
        elif action == 2:
            del container[key]
        elif action == 3 and isinstance(container, dict):
            container[chance.choice(keys)] = copy.deepcopy(chance.choice(HOSTILE))
        elif action == 4:
            container[key] = chance.choice(([container[key]], {"a": container[key]}, str(container[key])))
        else:
            other, name = chance.choice(places)
            with contextlib.suppress(LookupError):  # it may be gone with what held it
                container[key] = copy.deepcopy(other[name])
    return value


def mutate_json_file(chance: random.Random, value: dict, keys: list[str]) -> bytes:
    """The bytes of a json file that is wrong in what it says, in how it is written, or both."""
    if chance.random() < 0.75:
        value = mutate_json(chance, value, keys)
    content = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate_bytes(chance, content) if chance.random() < 0.3 else content
