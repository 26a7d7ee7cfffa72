"""JSON without what Python's decoder lets pass: keys that stand twice in an object, NaN and Infinity."""

import json


def object_of(pairs: list[tuple[str, object]]) -> dict:
    """An object of its keys and values.

    Raises:
        ValueError: a key stands twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return row


def _no_constant(name):
    raise ValueError(f"{name} is no value of JSON")


DECODER = json.JSONDecoder(object_pairs_hook=object_of, parse_constant=_no_constant)
# for JSON in a string, as other programs write it: Python writes infinity so
WRITTEN = json.JSONDecoder(object_pairs_hook=object_of)
