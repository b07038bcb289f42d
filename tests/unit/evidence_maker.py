"""Makes real evidence with keys in software: a site, its hosts, their vTPMs, rounds of quotes.

TPMS_ATTEST structures are written here as a TPM writes them (Part 2, 10.12.12), certificates by
the code that the keeper uses. Whatever a test wants to be wrong is an argument, and then signed:
what a hostile host could do, not only what a hostile carrier could.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from holdfast.appraise.policy import Policy, parse_policy
from holdfast.eventlog import cel, ima, replay, tcg2
from holdfast.eventlog.records import CONFIG, IDENTITY, IMAGE, PROVIDER, Record, make_record
from holdfast.evidence import freshness
from holdfast.evidence.bundle import Anchored, Companions, Evidence, Quote, Statement
from holdfast.evidence.oids import EKU_EK
from holdfast.evidence.pcrs import encode_pcrs, ledger_digest
from holdfast.evidence.round import (
    Leaf,
    inclusion_proofs,
    leaf_hash,
    qualifying_data,
    quote_digest,
    round_extra_data,
    tree_root,
)
from holdfast.ids import InstanceId
from holdfast.keeper import certificates
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import GENERATED_VALUE, ST_ATTEST_NV, ST_ATTEST_QUOTE, NvAttr, Rh
from holdfast.tpm2.keys import one_form
from holdfast.tpm2.structures import NvPublic, PcrSelection, Public, Signature, pcr_composite
from holdfast.tpm2.templates import AK_P256, EK_P256, EK_RSA2048
from holdfast.tpm2.wire import sized, u8, u16, u32, u64

NOW = datetime.datetime(2026, 11, 23, 12, 0, tzinfo=datetime.UTC)
INSTANCE = UUID("6c7a1c62-3a0c-4c7e-9c55-2b1f6d4a9e01")
NONCE = bytes(range(32))
AUDIENCE = "verifier.example"
USER_DATA = b"a channel's key"
SITE = "Example"
OVMF = (files("holdfast.data") / "hostlog" / "ovmf-qemu.bin").read_bytes()
LAYERS = tuple(f"sha256:{n:064x}" for n in (0xA1, 0xA2))
CONFIG_DIGEST = f"sha256:{0xC0:064x}"
MANIFEST = f"sha256:{0xE0:064x}"
DIGEST = {name: f"sha256:{n:064x}" for n, name in enumerate(("package", "libtpms", "policy"), 1)}
QUOTED = range(16)


@cache
def rsa_key(number: int) -> rsa.RSAPrivateKey:
    """RSA keys take long to make: a few for the whole session."""
    return rsa.generate_private_key(65537, 2048)


def ec_public(template: Public, key: ec.EllipticCurvePrivateKey) -> Public:
    numbers = key.public_key().public_numbers()
    point = (numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big"))
    return replace(template, unique=point)


def small_log() -> tcg2.Tcg2Log:
    """A host's boot of a few events, with SHA-256 and SHA-384."""
    banks = (Alg.SHA256, Alg.SHA384)

    def event(pcr: int, kind: int, data: bytes) -> tcg2.Tcg2Event:
        digests = {Alg.SHA256: hashlib.sha256(data).digest()}
        digests[Alg.SHA384] = hashlib.sha384(data).digest()
        return tcg2.Tcg2Event(pcr, kind, digests, data)

    return tcg2.build(
        (
            event(0, tcg2.EV_S_CRTM_VERSION, b"1\0.\0"),
            event(4, 0x80000003, b"boot loader"),
            *(event(pcr, tcg2.EV_SEPARATOR, bytes(4)) for pcr in range(8)),
            event(8, tcg2.EV_IPL, b"kernel_cmdline: quiet\0"),
            event(9, tcg2.EV_IPL, b"initrd"),
        ),
        banks,
    )


@dataclass
class Signer:
    """A TPM's attestation key, and what its quotes say besides."""

    template: Public = AK_P256
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    resets: int = 7
    restarts: int = 2
    clock: int = 100_000
    safe: int = 1
    tag: int = ST_ATTEST_QUOTE
    magic: int = GENERATED_VALUE
    hierarchy: int = Rh.PLATFORM

    @property
    def public(self) -> Public:
        return ec_public(self.template, self.key)

    def quote(self, extra: bytes, values: replay.PcrValues) -> Quote:
        """A quote over all of `values`, as TPM2_Quote makes it."""
        selection = PcrSelection(tuple((alg, tuple(values[alg])) for alg in sorted(values)))
        composite = sized(pcr_composite(Alg.SHA256, selection, values))
        attest = self._attest(self.tag, extra) + selection.encode() + composite
        return Quote(attest, self.sign(attest), encode_pcrs(values))

    def certify(
        self, extra: bytes, name: bytes, contents: bytes, offset: int = 0, tag: int = ST_ATTEST_NV
    ) -> tuple[bytes, bytes]:
        """What an index of this Name holds, as TPM2_NV_Certify says it; and the signature."""
        attest = self._attest(tag, extra) + sized(name) + u16(offset) + sized(contents)
        return attest, self.sign(attest)

    def _attest(self, tag: int, extra: bytes) -> bytes:
        name = self.public.name
        qualified = name[:2] + hashlib.sha256(u32(self.hierarchy) + name).digest()
        return (
            u32(self.magic) + u16(tag) + sized(qualified) + sized(extra)
            + u64(self.clock) + u32(self.resets) + u32(self.restarts) + u8(self.safe) + u64(9)
        )  # fmt: skip

    def sign(self, message: bytes) -> bytes:
        r, s = utils.decode_dss_signature(self.key.sign(message, ec.ECDSA(hashes.SHA256())))
        parts = sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))
        signature = Signature.decode(u16(Alg.ECDSA) + u16(Alg.SHA256) + parts)
        return one_form(self.public, signature)


@dataclass
class Site:
    """A site root; `until` ends its certificates early."""

    name: str = SITE
    made: datetime.datetime = NOW - datetime.timedelta(days=30)
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self.root = certificates.site_root(self.name, self.key, self.made)

    @property
    def fingerprint(self) -> str:
        return f"sha256:{hashlib.sha256(self.root).hexdigest()}"


# The hybrid chain's index as `hwtpm.anchor` makes it; the policy is any.
INDEX = NvPublic(
    0x01804849,
    NvAttr.EXTEND | NvAttr.POLICYWRITE | NvAttr.AUTHREAD | NvAttr.NO_DA | NvAttr.ORDERLY
    | NvAttr.CLEAR_STCLEAR | NvAttr.WRITTEN,
    hashlib.sha256(b"policy").digest(),
    32,
)  # fmt: skip


@dataclass
class Host:
    """A host of a site: AK, issuing CA, event log, PCRs."""

    site: Site
    name: str = "host-1"
    log: bytes = b""
    ak: Signer = field(default_factory=Signer)
    ca: Signer = field(default_factory=Signer)
    ek_certificate: bytes = b""
    ek: bytes = b""
    ak_certificate: bytes = b""

    def __post_init__(self) -> None:
        self.log = self.log or tcg2.encode(small_log())
        site = self.site
        self.ca_certificate = certificates.host_ca(
            site.name, self.name, self.ca.public, self.ak.public, site.root, site.key, site.made
        )
        if not self.ak_certificate:
            ek = Public.decode(self.ek) if self.ek else EK_P256
            self.ak_certificate = certificates.host_ak(
                site.name, self.name, self.ak.public, ek, site.root, site.key, site.made
            )

    @property
    def pcrs(self) -> dict[Alg, Mapping[int, bytes]]:
        return {Alg.SHA256: replay.pcr_values(tcg2.parse(self.log))[Alg.SHA256]}

    @property
    def ak_name(self) -> str:
        return self.ak.public.name.hex()


@dataclass
class Vtpm:
    """A vTPM made on a host, and what its container's log says."""

    host: Host
    name: str = "web"
    id: UUID = INSTANCE
    run: int = 3
    rsa: int = 0
    ak: Signer = field(default_factory=Signer)
    ek: Signer = field(default_factory=lambda: Signer(EK_P256))
    banks: tuple[Alg, ...] = (Alg.SHA256, Alg.SHA384)
    made: datetime.datetime = NOW - datetime.timedelta(days=20)

    def __post_init__(self) -> None:
        modulus = rsa_key(self.rsa).public_key().public_numbers().n.to_bytes(256, "big")
        self.ek_rsa = replace(EK_RSA2048, unique=(modulus,))
        host = self.host
        issuer = x509.load_der_x509_certificate(host.ca_certificate)
        subject = certificates.vtpm_subject(host.site.name, self.name, str(self.id))
        key, urn = host.ca.key, f"urn:holdfast:{host.name}"
        self.ek_rsa_certificate, self.ek_ecc_certificate = (
            certificates.vtpm_ek(subject, public, issuer, key, urn, "", self.made)
            for public in (self.ek_rsa, self.ek.public)
        )
        self.ak_certificate = certificates.vtpm_ak(
            subject, self.ak.public, issuer, key, "", self.made
        )

    def records(
        self,
        *,
        files: Sequence[tuple[str, bytes]] | None = None,
        upper: str | None = "empty",
        layers: Sequence[str] = LAYERS,
        unlinked: bool = False,
        **identity: Any,
    ) -> tuple[Record, ...]:
        """The log of a start, in the order of `daemon.starting`."""
        banks = self.banks
        if files is None:
            records = [ima.not_measured_record(0, banks)]
        else:
            log = None if unlinked else tcg2.parse(self.host.log)
            start = replay.pcr_values(log, (), banks)
            records = [ima.boot_aggregate_record(0, start, banks)]
        for content_type, content in self.contents(upper, layers, identity):
            records.append(make_record(len(records), content_type, content, banks))
        for path, digest in files or ():
            records.append(ima.ima_record(len(records), path, digest, banks))
        return tuple(records)

    def contents(
        self, upper: str | None, layers: Sequence[str], identity: Mapping[str, Any]
    ) -> list[tuple[str, dict[str, Any]]]:
        claim = {
            "source": "containers-storage",
            "image_id": None,
            "manifest_digest": MANIFEST,
            "reference": "example.org/web:1",
        }
        tree = {"format": "holdfast.tree/1"}
        return [
            (
                PROVIDER,
                {
                    "package": {**tree, "digest": DIGEST["package"]},
                    "libtpms": {
                        "path": "/usr/lib/libtpms.so.0.9.2",
                        "version": "0.9.2",
                        "digest": DIGEST["libtpms"],
                    },
                    "python": "3.11.2",
                    "policy": DIGEST["policy"],
                },
            ),
            (CONFIG, {"normalised": CONFIG_DIGEST}),
            (IMAGE, {"part": "claimed", "kind": "overlay", "claimed": claim}),
            *(
                (IMAGE, {"part": "layer", "index": n, **tree, "digest": layer})
                for n, layer in enumerate(layers)
            ),
            (IMAGE, {"part": "upper", **tree, "digest": upper}),
            (
                IDENTITY,
                {
                    "instance": str(self.id),
                    "container": "ab" * 32,
                    "name": self.name,
                    "run": self.run,
                    "config": f"sha256:{0xCF:064x}",
                    **identity,
                },
            ),
        ]


@dataclass(frozen=True)
class Given:
    """What goes into one piece of evidence. What is None is what an honest host would give."""

    vtpm: Vtpm
    nonce: bytes = NONCE
    audience: str = AUDIENCE
    user_data: bytes = USER_DATA
    host: Host | None = None
    records: tuple[Record, ...] | None = None
    measured: tuple[Record, ...] | None = None  # what was extended, if not what the log says
    host_log: bytes | None = None  # the log given, if not the one that was booted
    followed: int | None = None  # how many host events the vTPM has followed
    unlinked: bool = False
    vtpm_pcrs: replay.PcrValues | None = None  # what the vTPM quotes, if not its PCRs
    host_pcrs: replay.PcrValues | None = None
    quoted_banks: tuple[Alg, ...] = (Alg.SHA256, Alg.SHA384)
    extra: bytes | None = None  # the vTPM quote's qualifying data
    host_extra: bytes | None = None
    leaf: Mapping[str, Any] = field(default_factory=dict)
    newest: Mapping[str, Any] = field(default_factory=dict)  # of its leaf in the host's map
    anchor: Mapping[str, Any] = field(default_factory=dict)  # of what the host counts
    certified: Mapping[str, Any] = field(default_factory=dict)  # of what the host AK certifies
    index: NvPublic = INDEX
    certifier: Signer | None = None  # who certifies, if not the host's AK
    companions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    neighbours: int = 4
    place: int = 2


def make(given: Given) -> Evidence:
    """A whole round with one real leaf among neighbours'."""
    vtpm, host = given.vtpm, given.host or given.vtpm.host
    log = tcg2.parse(host.log)
    records = given.records
    if records is None:
        records = vtpm.records(unlinked=given.unlinked)
    followed = len(log.extends()) if given.followed is None else given.followed
    pcrs = vtpm_pcrs(given, log, followed, given.measured or records)
    extra = given.extra
    if extra is None:
        extra = qualifying_data(given.nonce, given.audience, given.user_data)
    quoted = given.vtpm_pcrs
    if quoted is None:
        quoted = {a: {p: pcrs[a][p] for p in QUOTED} for a in given.quoted_banks}
    quote = vtpm.ak.quote(extra, quoted)
    companions = companions_of(given, host, records)
    said = Leaf(**{
        "nonce": given.nonce,
        "audience": given.audience,
        "user_data": hashlib.sha256(given.user_data).digest(),
        "instance": InstanceId(vtpm.id),
        "ek_name": vtpm.ek.public.name,
        "ak_name": vtpm.ak.public.name,
        "quote": quote_digest(quote.attest, quote.signature),
        "ledger": ledger_digest(pcrs),
        "host_log_index": 0 if given.unlinked else followed,
        "epoch": 11,
        "run": vtpm.run,
        "clear_count": 0,
        "lineage": 0,
        "salt": bytes(32),
        "members": companions.digests(),
        **given.leaf,
    })  # fmt: skip
    leaf = said.encode()
    hashed = [hashlib.sha256(bytes((n,))).digest() for n in range(given.neighbours)]
    hashed.insert(min(given.place, len(hashed)), leaf_hash(leaf))
    proof = inclusion_proofs(hashed)[hashed.index(leaf_hash(leaf))]
    host_extra = given.host_extra
    if host_extra is None:
        host_extra = round_extra_data(len(hashed), tree_root(hashed))
    host_quote = host.ak.quote(host_extra, given.host_pcrs or host.pcrs)
    anchored = anchored_of(given, host.ak, said, host_extra)
    return Evidence(quote, leaf, proof, host_quote, anchored, companions)


def anchored_of(given: Given, ak: Signer, said: Leaf, host_extra: bytes) -> Anchored:
    """A map with this vTPM's leaf among others', and what the host's TPM says of it."""
    known = {"epoch": said.epoch, "run": said.run, "lineage": said.lineage, **given.newest}
    digest = hashlib.sha256(b"a sealed state").digest()
    newest = freshness.Leaf(**{"status": freshness.Status.LIVE, "digest": digest, **known})
    leaves = {UUID(int=n): replace(newest, epoch=n) for n in range(1, 30)}
    newest_map = freshness.FreshnessMap().with_leaves({**leaves, given.vtpm.id: newest})
    boot = ak.resets << 32 | ak.restarts
    anchor = {"sequence": 40, "root": newest_map.root, "boot": boot, **given.anchor}
    link = freshness.Link(hashlib.sha256(b"before").digest(), freshness.Anchor(**anchor))
    certified = {
        "extra": host_extra, "name": given.index.name, "contents": link.value, **given.certified,
    }  # fmt: skip
    attest, signature = (given.certifier or ak).certify(**certified)
    path = newest_map.proof(given.vtpm.id)
    return Anchored(attest, signature, given.index.encode(), link, path)


def vtpm_pcrs(
    given: Given, log: tcg2.Tcg2Log, followed: int, records: Sequence[Record]
) -> replay.PcrValues:
    """The vTPM's PCRs after power-on, as `instance.vtpm` computes them."""
    banks = given.vtpm.banks
    values = replay.initial(banks, 0 if given.unlinked else log.startup_locality)
    if not given.unlinked:
        values = replay.replay(
            values,
            (
                (event.pcr, event.digests)
                for event in log.extends()[:followed]
                if event.pcr < 10 or event.pcr == 14
            ),
        )
    return replay.replay(values, ((record.pcr, record.digests) for record in records))


def companions_of(given: Given, host: Host, records: Sequence[Record]) -> Companions:
    vtpm = given.vtpm
    log = host.log if given.host_log is None else given.host_log
    return Companions(**{
        "ek_rsa_certificate": vtpm.ek_rsa_certificate,
        "ek_ecc_certificate": vtpm.ek_ecc_certificate,
        "ak_certificate": vtpm.ak_certificate,
        "ca_certificate": vtpm.host.ca_certificate,
        "host_ak_certificate": host.ak_certificate,
        "root_certificate": host.site.root,
        "ek_rsa": vtpm.ek_rsa.encode(),
        "ek_ecc": vtpm.ek.public.encode(),
        "ak": vtpm.ak.public.encode(),
        "host_ak": host.ak.public.encode(),
        "container_log": cel.encode_json(records).encode(),
        "host_log": b"" if given.unlinked else log,
        "host_ek_certificate": host.ek_certificate,
        "host_ek": host.ek,
        "statement": Statement(given.unlinked, given.notes),
        **given.companions,
    })  # fmt: skip


POLICY = """
version = 1
[trust]
site_roots = ["{root}"]
software_host_tpm = ["{host_ak}"]
[host]
[host.pcrs]
{pcrs}
[[provider.allowed]]
package = "{package}"
libtpms = "{libtpms}"
python = "3.11.2"
policy = "any"
[[image.allowed]]
layers = ["{layers}"]
upper = "empty"
[config]
allowed = ["{config}"]
[exec]
not_measured = true
[identity]
names = ["web"]
[limits]
audience = "verifier.example"
"""


def policy_text(host: Host) -> str:
    values = host.pcrs[Alg.SHA256]
    return POLICY.format(
        root=host.site.fingerprint,
        host_ak=host.ak_name,
        pcrs="\n".join(f'{pcr} = ["{values[pcr].hex()}"]' for pcr in (0, 4, 7, 8, 9)),
        layers='", "'.join(LAYERS),
        config=CONFIG_DIGEST,
        **DIGEST,
    )


def policy_for(host: Host) -> Policy:
    return parse_policy(policy_text(host))


@dataclass
class HardwareMaker:
    """A TPM vendor's CA, and the EK of one of its TPMs."""

    name: str = "TPM Vendor EK CA"
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    ek: Signer = field(default_factory=lambda: Signer(EK_P256))

    def __post_init__(self) -> None:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)])
        self.anchor = (
            self._builder(subject, subject, self.key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.certificate = (
            self._builder(x509.Name([]), subject, self.ek.key.public_key())
            .add_extension(x509.ExtendedKeyUsage([EKU_EK]), critical=False)
            .sign(self.key, hashes.SHA256())
            .public_bytes(serialization.Encoding.DER)
        )

    @property
    def pem(self) -> str:
        return self.anchor.public_bytes(serialization.Encoding.PEM).decode()

    @staticmethod
    def _builder(
        subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(1)
            .not_valid_before(NOW - datetime.timedelta(days=400))
            .not_valid_after(NOW + datetime.timedelta(days=400))
        )
