"""Policies: strict, never empty, nothing unconstrained by silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.appraise.policy import parse_policy
from holdfast.errors import InvalidInput
from holdfast.tpm2.algorithms import Alg
from tests.unit.evidence_maker import HardwareMaker, Host, Site, policy_text

HOST = Host(Site())
TEXT = policy_text(HOST)
DIGEST = "sha256:" + "a" * 64


def test_a_policy_is_read_to_frozen_values() -> None:
    policy = parse_policy(TEXT)
    assert policy.host is not None
    assert set(policy.host.pcrs) == {0, 4, 7, 8, 9}
    assert policy.audience == "verifier.example"
    assert (policy.max_clears, policy.max_unclean, policy.max_recoveries) == (0, None, None)
    assert policy.banks == {Alg.SHA256}
    assert not policy.unsafe_unlinked
    assert policy.digest != parse_policy(TEXT + "\n# a comment\n").digest


@pytest.mark.parametrize("text", ["", "# nothing\n", "version = 1", "[trust]\n"])
def test_the_empty_policy_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_policy(text)


SECTION_KEYS = {
    "host": "any = true",
    "provider": "any = true",
    "image": "any = true",
    "config": "any = true",
    "exec": "any = true",
    "identity": "any = true",
}
HEAD = TEXT[: TEXT.index("[host]")]


def with_sections(**changed: str | None) -> str:
    sections = {**SECTION_KEYS, **changed}
    return HEAD + "\n".join(f"[{k}]\n{v}" for k, v in sections.items() if v is not None)


def test_a_policy_may_constrain_nothing_but_has_to_say_so_everywhere() -> None:
    policy = parse_policy(with_sections())
    assert (policy.host, policy.image, policy.exec, policy.config) == (None,) * 4


@pytest.mark.parametrize("section", SECTION_KEYS)
def test_a_section_left_out_is_named(section: str) -> None:
    with pytest.raises(InvalidInput, match=rf"no \[{section}\]: say any = true"):
        parse_policy(with_sections(**{section: None}))


@pytest.mark.parametrize("section", SECTION_KEYS)
def test_a_section_that_says_nothing_is_refused(section: str) -> None:
    with pytest.raises(InvalidInput, match="any = true"):
        parse_policy(with_sections(**{section: ""}))
    with pytest.raises(InvalidInput):
        parse_policy(with_sections(**{section: "any = false"}))


@pytest.mark.parametrize("section", SECTION_KEYS)
def test_an_unknown_key_is_named_with_the_known_ones(section: str) -> None:
    with pytest.raises(InvalidInput, match="bogus"):
        parse_policy(with_sections(**{section: "any = true\nbogus = 1"}))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("version = 1", "version = 2", "version"),
        ("version = 1", "version = true", "version"),
        ("version = 1", "version = 1\nelse = 1", "else"),
        ("[limits]", "[limits]\nmax_clear = 1", "max_clears"),
        ("[limits]", "[limits]\nmax_clears = -1", "max_clears"),
        ("[limits]", "[limits]\nmax_unclean = true", "max_unclean"),
        ("[limits]", "[limits]\nmax_recoveries = -1", "max_recoveries"),
        ("[limits]", "[limits]\nunsafe_unlinked = 1", "true or false"),
        ("[limits]", '[limits]\nbanks = ["sha1"]', "sha1"),
        ("verifier.example", "", "audience"),
        ("site_roots", "roots", "site_roots"),
        ("sha256:", "sha1:", "PEM"),
        ("software_host_tpm", "software", "neither ek_roots nor software_host_tpm"),
        ("software_host_tpm", "ek_roots", "PEM"),
        ("[host.pcrs]", "[host.pcrs]\n24 = []", "24"),
        ("[host.pcrs]", "[host.pcrs]\n01 = []", "01"),
        ("[host.pcrs]", "[host.pcrs]\n5 = []", "no value at all"),
        ("[host.pcrs]", '[host.pcrs]\n5 = ["AA"]', "64 lower-case"),
        ("[host]\n", "[host]\nverity_root_in = [5]\n", "verity_root_in"),
        ('python = "3.11.2"', "", "python"),
        ('policy = "any"', "policy = 3", "policy"),
        ('policy = "any"', 'policy = "any"\nelse = 1', "else"),
        ("layers = ", 'kind = "vm"\nlayers = ', "kind"),
        ('upper = "empty"', "", "upper"),
        ('upper = "empty"', 'upper = "full"', "upper"),
        ('upper = "empty"', 'upper = "empty"\nmanifest = "x"', "manifest"),
        ("not_measured = true", 'files = ["x"]', "files"),
        ('names = ["web"]', 'names = [".."]', "instance name"),
        ('names = ["web"]', 'ids = ["1"]', "UUID"),
        ('names = ["web"]', "names = [3]", "list of texts"),
        ('names = ["web"]', 'names = "web"', "list"),
    ],
)
def test_what_is_wrong_with_a_policy_is_named(old: str, new: str, why: str) -> None:
    assert old in TEXT
    with pytest.raises(InvalidInput, match=why):
        parse_policy(TEXT.replace(old, new))


def test_a_claimed_manifest_alone_is_no_image() -> None:
    image = f'[[image.allowed]]\nmanifest = "{DIGEST}"\nupper = "empty"\n'
    text = with_sections(image=None) + "\n" + image
    with pytest.raises(InvalidInput, match="proves nothing"):
        parse_policy(text)


def test_roots_are_pem_in_the_text_files_or_fingerprints() -> None:
    maker = HardwareMaker()
    pem = maker.pem.replace("\n", "\\n")
    inline = parse_policy(
        TEXT.replace("software_host_tpm", f'ek_roots = ["{pem}"]\nsoftware_host_tpm')
    )
    assert inline.trust.ek_roots == (maker.anchor,)
    named = TEXT.replace("[trust]", '[trust]\nek_roots = ["file:vendor.pem"]')
    given_file = parse_policy(named, {"vendor.pem": maker.pem.encode() * 2})
    assert given_file.trust.ek_roots == (maker.anchor, maker.anchor)
    with pytest.raises(InvalidInput, match=r"vendor\.pem"):
        parse_policy(named)
    with pytest.raises(InvalidInput, match="PEM"):
        parse_policy(named, {"vendor.pem": b"junk"})


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_invalid_input(text: str) -> None:
    for prefix in ("", "version = 1\n", HEAD):
        with pytest.raises(InvalidInput):
            parse_policy(prefix + text)


@given(st.data())
def test_an_edited_policy_is_a_policy_or_invalid_input(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TEXT) - 1))
    end = data.draw(st.integers(start, min(len(TEXT), start + 20)))
    try:
        parse_policy(TEXT[:start] + data.draw(st.text(max_size=5)) + TEXT[end:])
    except InvalidInput:
        return
