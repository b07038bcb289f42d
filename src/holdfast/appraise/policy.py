"""What a verifier wants: TOML text to a frozen `Policy`.

Rules: version 1; unknown sections and keys are refused by name; nothing is unconstrained silently:
every section stands there, and one that constrains nothing says `any = true`. What weakens is
named so (`unsafe_unlinked`, `software_host_tpm`). The empty policy is refused.

Not here: whether evidence satisfies it (`verifier`, `reference`), writing one (`learn`).
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from holdfast.appraise.certificates import fingerprint
from holdfast.errors import InvalidInput
from holdfast.evidence.round import check_challenge
from holdfast.ids import InstanceId, InstanceName, instance_id, instance_name
from holdfast.tpm2.algorithms import HASH_SIZES, HASHES_BY_NAME, Alg
from holdfast.tpm2.constants import HOST_PCRS, PCR_COUNT

VERSION: Final = 1
POLICY_MAX: Final = 4 << 20  # bytes of policy text
ITEMS_MAX: Final = 10_000  # of one list
NO_UPPER: Final = "none"
EMPTY_UPPER: Final = "empty"
ANY: Final = "any"
ALL_PCRS: Final = range(PCR_COUNT)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_HEX_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[0-9a-f]{4}(?:[0-9a-f]{2}){20,64}")
_FILE_DIGEST: Final = re.compile(r"[a-z0-9]{1,16}:(?:[0-9a-f]{2}){16,64}")
_NONCE: Final = bytes(8)


@dataclass(frozen=True)
class Trust:
    """Whom to believe: site roots by SHA-256 fingerprint, and which TPM a host may have.

    `ek_roots` are the CAs that issue host EK certificates; `software_host_tpm` are Names of host
    AKs whose TPM is not hardware and is accepted nevertheless.
    """

    site_roots: frozenset[bytes]
    ek_roots: tuple[x509.Certificate, ...] = ()
    software_host_tpm: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class HostEvents:
    """The SHA-256 digests a PCR of the host may be extended with, and those it must be."""

    allowed: frozenset[bytes]
    required: frozenset[bytes]


@dataclass(frozen=True)
class HostRule:
    """Accepted boot of the host; `verity_root_in` are PCRs that fix its user space."""

    pcrs: Mapping[int, frozenset[bytes]]
    events: Mapping[int, HostEvents]
    verity_root_in: tuple[int, ...]


@dataclass(frozen=True)
class ProviderRule:
    """One accepted provider of vTPMs (PCR 11); None where any will do."""

    package: str | None
    libtpms: str | None
    python: str | None
    policy: str | None


@dataclass(frozen=True)
class ImageRule:
    """One accepted image (PCR 13): layers from the bottom, the writable layer, its kind, and the
    manifest digest that must be claimed as well (None: whatever is)."""

    layers: tuple[str, ...]
    upper: str
    kind: str
    manifest: str | None


@dataclass(frozen=True)
class ExecRule:
    """PCR 10: whether execution may be unmeasured, and which files ("sha256:…") may run."""

    not_measured: bool
    files: frozenset[str]


@dataclass(frozen=True)
class IdentityRule:
    """PCR 15 and the certificates: whose vTPM; an empty set allows all."""

    names: frozenset[InstanceName]
    ids: frozenset[InstanceId]


@dataclass(frozen=True)
class Policy:
    """A whole policy; None for a section that says `any = true`. `digest` is that of its text."""

    trust: Trust
    host: HostRule | None
    provider: tuple[ProviderRule, ...] | None
    image: tuple[ImageRule, ...] | None
    config: frozenset[str] | None
    exec: ExecRule | None
    identity: IdentityRule | None
    audience: str | None = None
    banks: frozenset[Alg] = frozenset({Alg.SHA256})
    max_clears: int = 0
    max_unclean: int | None = None
    max_recoveries: int | None = None
    unsafe_unlinked: bool = False
    safe_clock: bool = False
    digest: bytes = field(default=b"", compare=False)


def parse_policy(text: str, files: Mapping[str, bytes] | None = None) -> Policy:
    """Read a policy; InvalidInput says which key is wrong, and what belongs there.

    `files` are contents of the PEM files that the text names as "file:NAME".
    """
    if len(text) > POLICY_MAX:
        raise InvalidInput(f"a policy has at most {POLICY_MAX} characters")
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"the policy is not TOML: {error}") from None
    if not table:
        raise InvalidInput("the policy is empty: it would accept nothing or everything")
    top = _Section("the policy", table)
    if top.take("version", int) != VERSION:
        raise InvalidInput(f"the policy does not say version = {VERSION}")
    sections = {name: top.section(name) for name in _SECTIONS}
    limits = top.section("limits") if "limits" in table else _Section("[limits]", {})
    top.end()
    policy = Policy(
        trust=_trust(sections["trust"], files or {}),
        host=_host(sections["host"]),
        provider=_provider(sections["provider"]),
        image=_image(sections["image"]),
        config=_config(sections["config"]),
        exec=_exec(sections["exec"]),
        identity=_identity(sections["identity"]),
        audience=_audience(limits),
        banks=_banks(limits),
        max_clears=limits.number("max_clears") or 0,
        max_unclean=limits.number("max_unclean"),
        max_recoveries=limits.number("max_recoveries"),
        unsafe_unlinked=limits.flag("unsafe_unlinked"),
        safe_clock=limits.flag("safe_clock"),
        digest=hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(),
    )
    for section in (*sections.values(), limits):
        section.end()
    return policy


_SECTIONS: Final = ("trust", "host", "provider", "image", "config", "exec", "identity")


class _Section:
    """A table of the policy whose keys are taken one by one; `end` refuses what is left."""

    def __init__(self, where: str, table: Mapping[str, Any]) -> None:
        self.where = where
        self._left = dict(table)
        self._known: list[str] = []

    def names(self) -> tuple[str, ...]:
        return tuple(self._left)

    def has(self, key: str) -> bool:
        self._known.append(key)
        return key in self._left

    def take(self, key: str, kind: type) -> Any:
        self._known.append(key)
        if key not in self._left:
            raise InvalidInput(f"{self.where} has no {key}")
        value = self._left.pop(key)
        if type(value) is not kind:
            raise InvalidInput(f"{key} of {self.where} is not {_KINDS[kind]}")
        return value

    def section(self, key: str) -> _Section:
        if key not in self._left:
            hint = "" if key == "trust" else ": say any = true there if it is not to count"
            raise InvalidInput(f"the policy has no [{key}]{hint}")
        return _Section(f"[{key}]", self.take(key, dict))

    def is_any(self) -> bool:
        """Whether the section says `any = true`, and then nothing else."""
        if not self.flag("any"):
            return False
        if self._left:
            raise InvalidInput(f"{self.where} says any = true, and yet {min(self._left)}")
        return True

    def flag(self, key: str) -> bool:
        return bool(self.take(key, bool)) if self.has(key) else False

    def number(self, key: str) -> int | None:
        """A number that may be left out."""
        if not self.has(key):
            return None
        value = int(self.take(key, int))
        if not 0 <= value < 1 << 63:
            raise InvalidInput(f"{key} of {self.where} is not a number from 0 on")
        return value

    def texts(self, key: str, pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
        """A list of texts that may be left out; with a pattern, each must match it."""
        if not self.has(key):
            return ()
        values = self.take(key, list)
        if len(values) > ITEMS_MAX or not all(isinstance(value, str) for value in values):
            raise InvalidInput(f"{key} of {self.where} is not a list of texts")
        for value in values:
            if pattern is not None and not pattern.fullmatch(value):
                form = _FORMS[pattern]
                raise InvalidInput(f"{value[:80]!a} in {key} of {self.where} is not {form}")
        return tuple(values)

    def text(self, key: str, pattern: re.Pattern[str]) -> str:
        value = str(self.take(key, str))
        if not pattern.fullmatch(value):
            raise InvalidInput(f"{key} of {self.where} is not {_FORMS[pattern]}")
        return value

    def digest_or_any(self, key: str) -> str | None:
        if self._left.get(key) == ANY:
            self.take(key, str)
            return None
        return self.text(key, _DIGEST)

    def tables(self, key: str) -> tuple[_Section, ...]:
        """A list of tables, at least one."""
        where = f"[[{self.where.strip('[]')}.{key}]]"
        values = self.take(key, list) if self.has(key) else []
        if len(values) > ITEMS_MAX or not all(isinstance(value, dict) for value in values):
            raise InvalidInput(f"{where} is not a list of tables")
        if not values:
            raise InvalidInput(f"{self.where} has no {where}, and does not say any = true")
        return tuple(_Section(where, value) for value in values)

    def end(self) -> None:
        for key in sorted(self._left):
            known = ", ".join(sorted(set(self._known)))
            raise InvalidInput(f"{self.where} has no key {key!a}; it has {known}")


_KINDS: Final[Mapping[type, str]] = {
    bool: "true or false",
    int: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
}
_FORMS: Final[Mapping[re.Pattern[str], str]] = {
    _DIGEST: "sha256: and 64 lower-case hexadecimal digits",
    _HEX_DIGEST: "64 lower-case hexadecimal digits",
    _NAME: "a TPM Name in lower-case hexadecimal",
    _FILE_DIGEST: "an algorithm, a colon and lower-case hexadecimal digits",
}


def _trust(section: _Section, files: Mapping[str, bytes]) -> Trust:
    roots: set[bytes] = set()
    for entry in section.texts("site_roots"):
        if _DIGEST.fullmatch(entry):
            roots.add(bytes.fromhex(entry.removeprefix("sha256:")))
        else:
            certificates = _pem(entry, files, "site_roots")
            roots |= {fingerprint(c.public_bytes(Encoding.DER)) for c in certificates}
    if not roots:
        raise InvalidInput("[trust] has no site_roots: nothing would be believed")
    anchors: list[x509.Certificate] = []
    for entry in section.texts("ek_roots"):
        anchors += _pem(entry, files, "ek_roots")
    names = section.texts("software_host_tpm", _NAME)
    if not anchors and not names:
        raise InvalidInput("[trust] has neither ek_roots nor software_host_tpm: no host would do")
    return Trust(frozenset(roots), tuple(anchors), frozenset(map(bytes.fromhex, names)))


def _pem(entry: str, files: Mapping[str, bytes], key: str) -> Sequence[x509.Certificate]:
    data = entry.encode()
    if entry.startswith("file:"):
        name = entry.removeprefix("file:")
        if name not in files:
            raise InvalidInput(f"{key} of [trust] names the file {name!a}, which was not given")
        data = files[name]
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise InvalidInput(
            f"{entry[:40]!a} in {key} of [trust] is neither PEM nor file:NAME"
            + (" nor sha256: and a fingerprint" if key == "site_roots" else "")
        ) from None


def _host(section: _Section) -> HostRule | None:
    if section.is_any():
        return None
    pcrs = {
        pcr: frozenset(map(bytes.fromhex, values))
        for pcr, values in _by_pcr(section, "pcrs", ALL_PCRS)
    }
    events = {}
    table = _Section("[host.events]", section.take("events", dict) if section.has("events") else {})
    for key in table.names():
        pcr = _pcr(key, HOST_PCRS, table.where)
        rule = _Section(f"[host.events.{key}]", table.take(key, dict))
        allowed, required = (
            frozenset(map(bytes.fromhex, rule.texts(name, _HEX_DIGEST)))
            for name in ("allowed", "required")
        )
        rule.end()
        events[pcr] = HostEvents(allowed | required, required)
    if not pcrs and not events:
        raise InvalidInput("[host] has neither pcrs nor events, and does not say any = true")
    verity = section.take("verity_root_in", list) if section.has("verity_root_in") else []
    if not all(type(pcr) is int and pcr in pcrs for pcr in verity):
        raise InvalidInput("verity_root_in of [host] lists PCRs that pcrs gives values for")
    return HostRule(pcrs, events, tuple(verity))


def _by_pcr(
    section: _Section, key: str, allowed: Collection[int]
) -> list[tuple[int, tuple[str, ...]]]:
    table = section.take(key, dict) if section.has(key) else {}
    inner = _Section(f"[{section.where.strip('[]')}.{key}]", table)
    found = []
    for name in table:
        values = inner.texts(name, _HEX_DIGEST)
        if not values:
            raise InvalidInput(f"{name} of {inner.where} allows no value at all")
        found.append((_pcr(name, allowed, inner.where), values))
    return found


def _pcr(key: str, allowed: Collection[int], where: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]?", key, re.ASCII) or int(key) not in allowed:
        numbers = ", ".join(map(str, sorted(allowed)))
        raise InvalidInput(f"{key[:20]!a} in {where} is not one of the PCRs {numbers}")
    return int(key)


def _provider(section: _Section) -> tuple[ProviderRule, ...] | None:
    if section.is_any():
        return None
    rules = []
    for table in section.tables("allowed"):
        python = str(table.take("python", str))
        rules.append(
            ProviderRule(
                table.digest_or_any("package"),
                table.digest_or_any("libtpms"),
                None if python == ANY else python,
                table.digest_or_any("policy"),
            )
        )
        table.end()
    return tuple(rules)


def _image(section: _Section) -> tuple[ImageRule, ...] | None:
    if section.is_any():
        return None
    rules = []
    for table in section.tables("allowed"):
        layers = table.texts("layers", _DIGEST)
        if not layers:
            raise InvalidInput(f"{table.where} has no layers: a claimed manifest proves nothing")
        upper = str(table.take("upper", str))
        if upper not in (EMPTY_UPPER, NO_UPPER) and not _DIGEST.fullmatch(upper):
            raise InvalidInput(f"upper of {table.where} is empty, none or a sha256: digest")
        kind = str(table.take("kind", str)) if table.has("kind") else "overlay"
        if kind not in ("overlay", "plain"):
            raise InvalidInput(f"kind of {table.where} is overlay or plain")
        manifest = table.text("manifest", _DIGEST) if table.has("manifest") else None
        table.end()
        rules.append(ImageRule(layers, upper, kind, manifest))
    return tuple(rules)


def _config(section: _Section) -> frozenset[str] | None:
    if section.is_any():
        return None
    allowed = section.texts("allowed", _DIGEST)
    if not allowed:
        raise InvalidInput("[config] has no allowed digests, and does not say any = true")
    return frozenset(allowed)


def _exec(section: _Section) -> ExecRule | None:
    if section.is_any():
        return None
    not_measured = section.flag("not_measured")
    files = section.texts("files", _FILE_DIGEST)
    if not files and not not_measured:
        raise InvalidInput("[exec] has neither files nor not_measured = true nor any = true")
    return ExecRule(not_measured, frozenset(files))


def _identity(section: _Section) -> IdentityRule | None:
    if section.is_any():
        return None
    names, ids = section.texts("names"), section.texts("ids")
    if not names and not ids:
        raise InvalidInput("[identity] has neither names nor ids, and does not say any = true")
    return IdentityRule(frozenset(map(instance_name, names)), frozenset(map(instance_id, ids)))


def _audience(section: _Section) -> str | None:
    if not section.has("audience"):
        return None
    audience = str(section.take("audience", str))
    check_challenge(_NONCE, audience, b"")
    return audience


def _banks(section: _Section) -> frozenset[Alg]:
    names = section.texts("banks") or ("sha256",)
    for name in names:
        if name not in HASHES_BY_NAME or HASH_SIZES[HASHES_BY_NAME[name]] < HASH_SIZES[Alg.SHA256]:
            raise InvalidInput(f"{name[:20]!a} in banks of [limits] is not a bank to rely on")
    return frozenset(HASHES_BY_NAME[name] for name in names)
