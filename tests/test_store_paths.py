"""Any file name becomes a text that both databases can store, and no two become the same."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrbatch.store.paths import LONGEST, path_to_text, plain, text_to_path, under

# Difficult bytes: NUL (in keys of buckets), backslashes, x, hex digits, invalid UTF-8, a valid two-byte character.
NAMES = st.binary(max_size=40) | st.lists(
    st.sampled_from([b"\0", b"\\", b"x", b"\\x", b"f", b"0", b"\xff", b"\x80", b"\xc3\xa9", b"/", b"a"]), max_size=12
).map(b"".join)


@given(NAMES)
def test_every_name_comes_back(name: bytes) -> None:
    path = os.fsdecode(name)
    text = path_to_text(path)
    assert b"\0" not in text.encode()  # and no surrogates are left
    assert text_to_path(text) == path


@given(NAMES, NAMES)
def test_no_two_names_share_a_text(one: bytes, other: bytes) -> None:
    texts = path_to_text(os.fsdecode(one)), path_to_text(os.fsdecode(other))
    assert (texts[0] == texts[1]) == (one == other)


@given(NAMES, NAMES)
def test_under_holds_exactly_what_lies_below(folder: bytes, name: bytes) -> None:
    root, path = os.fsdecode(b"/" + folder).rstrip("/"), os.fsdecode(b"/" + name)
    for candidate in (path, root + path, root + "x" + path):
        text = path_to_text(candidate)
        held = any(span.low <= text < span.high and span.escaped in (None, "\\x" in text) for span in under(root))
        assert held == candidate.startswith(root + "/")


def test_usual_names_are_kept_as_they_are() -> None:
    for name in ("/a/b.dcm", "/ü/日本.png", "/C:\\images\\b.dcm", "/=cmd|' /C calc'!A0", "/\x1b[31m", "/a\nb"):
        assert path_to_text(name) == name


def test_escaped_names_look_like_what_they_are() -> None:
    assert path_to_text(os.fsdecode(b"/a\xff\\b")) == "/a\\xff\\\\b"
    assert path_to_text("/a\\x41") == "/a\\\\x41"


def test_a_path_too_long_for_an_index_is_cut_and_stays_unique() -> None:
    long = "/" + "é" * LONGEST
    texts = {path_to_text(long + end) for end in ("", "1", "2")}
    assert len(texts) == 3
    assert all(len(text.encode()) <= LONGEST for text in texts)
    with pytest.raises(ValueError, match="too long"):
        text_to_path(texts.pop())


def test_what_is_no_path_is_refused() -> None:
    for path in ("/\ud800", "/\udc00"):
        with pytest.raises(ValueError):
            path_to_text(path)


def test_header_texts_become_storable() -> None:
    assert plain("A\0B\udcffC") == "A\ufffdB\ufffdC"
    assert plain("x" * 20, 10) == "x" * 9 + "…"
