"""Profiles as values: how they are told apart on a command line, and what a state says of its own.

What they do is shown where libtpms has them, in lab/test_newer_libtpms.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.engine.origin import PERMANENT, VOLATILE, Origin, Profile, origin, refusal
from holdfast.errors import DecodeError, InvalidInput
from holdfast.protocol.stateblob import decode_file
from holdfast.swtpm.options import ProfileSource, profile_source

FIXTURES = Path(__file__).parents[1] / "fixtures" / "swtpm-0.10.2"
JSON = st.dictionaries(st.text("abc,=x", max_size=5), st.text("abc,=x", max_size=9), max_size=3)


def state(profile: str, name: str) -> bytes:
    return decode_file((FIXTURES / profile / f"tpm2-00.{name}").read_bytes(), None)


@given(JSON.map(lambda value: json.dumps({"Name": value})), st.booleans())
def test_a_profile_is_one_member_whatever_commas_are_in_it(text: str, first: bool) -> None:
    members = [f"profile={text}", "remove-disabled=check"]
    source = profile_source(",".join(members if first else reversed(members)))
    assert source == ProfileSource(text=text, remove_disabled="check")


@given(st.text("{}=,nameprofid", max_size=30))
@example("profile={,fd")
@example("={}")
def test_an_option_is_read_or_refused(text: str) -> None:
    try:
        source = profile_source(text)
    except InvalidInput:
        return
    assert sum((bool(source.name), bool(source.text), bool(source.file), source.fd > 2)) == 1


def test_a_state_says_where_it_is_from() -> None:
    assert origin(PERMANENT, state("null", "permall")) == Origin(3)
    profile = Profile("default-v1", 7)
    assert origin(PERMANENT, state("default-v1", "permall")) == Origin(4, profile)
    assert origin(VOLATILE, state("null", "volatilestate")) == Origin(1)
    with pytest.raises(DecodeError, match="does not begin a volatile state"):
        origin(VOLATILE, state("null", "permall"))


HEADER = bytes.fromhex("0004ab3647230004")


@given(st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(lambda tail: HEADER + tail)))
@example(HEADER + b"\0\x2c" + b'{"Name":"x","StateFormatLevel":Infinity}    ')
@example(HEADER + b"\0\x02[]")
def test_a_refused_state_has_its_reason_in_one_line_whatever_it_is(blob: bytes) -> None:
    for version in ((0, 9, 2), (0, 10, 2)):
        for kind in (PERMANENT, VOLATILE):
            said = refusal(kind, blob, version)
            assert said.startswith(f"libtpms {'.'.join(map(str, version))} does not accept this")
            assert said.isprintable()
