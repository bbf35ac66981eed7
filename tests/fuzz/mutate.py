"""Seeded damage to files: what disks, networks and ill will do to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from letheon.sealed import SEAL, seal

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = (
    b"../../x", b"/etc/passwd", b"\0", b"-1", b"1e999", b"NaN", b"999999999999999999999", b"\xff",
    b"\xed\xa0\x80", b"null", b"[]", b"{}", b'"', b"\r", b"\n", b",", b"\t", b" ", b"\xe2\x80\xa8",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), "", "x", "../../x", "/etc/passwd",
    "a\0b", "\ud800", [], [None], [[]], {}, {"x": None}, ["a"] * 3, [1, 2], [-1], "1",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage; the head, where the formats keep their numbers, is hit more."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        rng.choice(DAMAGES)(out, rng)
    return bytes(out)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in a JSON text; a sealed one is sealed anew, half of the time."""
    content = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in list(items):
            places.append((value, key))
            if isinstance(one, dict | list):
                visit(one)

    visit(content)
    for _ in range(rng.randint(1, 2)):
        holder, key = rng.choice(places)
        try:
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = rng.choice(VALUES)
        except (KeyError, IndexError):
            continue
    if SEAL in content and rng.random() < 0.7:
        try:
            return seal(content)
        except UnicodeEncodeError:
            pass
    return json.dumps(content).encode()


def _place(out: bytearray, rng: random.Random) -> int:
    near = rng.random() < 0.5
    return rng.randrange(max(1, min(len(out), 600 if near else len(out))))


def _flip(out: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if out:
            out[_place(out, rng)] ^= 1 << rng.randrange(8)


def _cut(out: bytearray, rng: random.Random) -> None:
    del out[_place(out, rng) if rng.random() < 0.5 else rng.randrange(len(out) + 1) :]


def _insert(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    out[at:at] = (
        rng.randbytes(rng.choice((1, 2, 7, 64))) if rng.random() < 0.4 else rng.choice(WORDS)
    )


def _remove(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    del out[at : at + rng.choice((1, 4, 100))]


def _number(out: bytearray, rng: random.Random) -> None:
    at, width = _place(out, rng), rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % 256**width
    out[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))


def _repeat(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    out[at:at] = out[at : at + rng.choice((1, 16, 256))] * rng.choice((1, 3))


def _digits(out: bytearray, rng: random.Random) -> None:
    places = [k for k in range(min(len(out), 4000)) if 48 <= out[k] < 58]
    if places:
        out[rng.choice(places)] = rng.choice(b"0123456789-.e")


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _cut, _insert, _remove, _number, _number, _repeat, _digits,
)  # fmt: skip
