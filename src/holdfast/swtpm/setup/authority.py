"""The local CA of this program: keys, certificates and serial numbers, in files.

They are swtpm_localca's files, so that each goes on with what the other began. They are changed
under swtpm_localca's lock. What is missing is made, in an order in which an end in the middle can
be gone on from: root key, root certificate, signing key, issuer certificate. What is there is never
replaced, but for the serial number.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from holdfast.errors import Conflict, HostError, InvalidInput
from holdfast.swtpm.setup import certificates, durable, regular
from holdfast.swtpm.setup.certificates import Platform, SigningKey
from holdfast.swtpm.setup.config import AuthorityConfig
from holdfast.swtpm.setup.manufacture import Facts
from holdfast.tpm2.structures import Public

LOCK: Final = ".lock.swtpm-localca"
ROOT_KEY: Final = "swtpm-localca-rootca-privkey.pem"
ROOT_CERTIFICATE: Final = "swtpm-localca-rootca-cert.pem"
SERIAL_MAX: Final = 20  # bytes of the file, and octets of a number (RFC 5280, 4.1.2.2)
LOCK_SECONDS: Final = 30.0
_LOCK_RETRY_SECONDS: Final = 0.005
_KEY_BITS: Final = 3072
_FILE_MAX: Final = 64 * 1024
_DIRECTORY_MODE: Final = 0o750
_LOCK_MODE: Final = 0o755
_SECRET_MODE: Final = 0o600
_PUBLIC_MODE: Final = 0o644


class _Issuer(NamedTuple):
    certificate: x509.Certificate
    key: SigningKey


class Authority:
    """Signs certificates for one VM, which they name `name`."""

    def __init__(
        self, config: AuthorityConfig, facts: Facts, platform: Platform, name: str,
        root_password: bytes | None, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._config = config
        self._facts = facts
        self._platform = platform
        self._name = name
        self._root_password = root_password
        self._say = say
        self._issuer: _Issuer | None = None

    def endorsement(self, ek: Public) -> bytes:
        issuer, serial = self._next()
        certificate = certificates.endorsement(ek, self._name, self._facts, serial, *issuer, _now())
        self._say("Successfully created EK certificate locally.")
        return certificate

    def platform(self, ek: Public) -> bytes:
        issuer, serial = self._next()
        certificate = certificates.platform(ek, self._name, self._platform, serial, *issuer, _now())
        self._say("Successfully created platform certificate locally.")
        return certificate

    def _next(self) -> tuple[_Issuer, int]:
        """Who signs, and a serial number that nobody else gets."""
        config = self._config
        for path in (config.state, config.signing_key.parent, config.issuer.parent,
                     config.serial.parent):  # fmt: skip
            _make_directory(path)
        with _locked(config.state / LOCK):
            if self._issuer is None:
                self._create_missing()
                self._issuer = _Issuer(
                    _certificate(config.issuer), _key(config.signing_key, config.password)
                )
            return self._issuer, _take_serial(config.serial)

    def _create_missing(self) -> None:
        config = self._config
        has_key, has_certificate = config.signing_key.exists(), config.issuer.exists()
        if has_key and has_certificate:
            return
        root_key = config.signing_key.parent / ROOT_KEY
        root_certificate = config.signing_key.parent / ROOT_CERTIFICATE
        if has_certificate:
            raise HostError(
                f"There is an issuer certificate {config.issuer} without its signing key "
                f"{config.signing_key}."
            )
        if root_certificate.exists() and not root_key.exists():
            raise HostError(f"The root CA's key {root_key} is not there to sign {config.issuer}.")
        if has_key and not root_certificate.exists():
            raise HostError(f"Need read rights on issuer certificate {config.issuer}.")
        self._say("Creating root CA and a local CA's signing key and issuer cert.")
        top = _present_key(root_key, self._root_password)
        if not root_certificate.exists():
            _write_certificate(root_certificate, certificates.root(top, _now()))
        below = _present_key(config.signing_key, config.password)
        certificate = certificates.intermediate(below, _certificate(root_certificate), top, _now())
        _write_certificate(config.issuer, certificate)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold swtpm_localca's lock. Conflict if somebody else does for LOCK_SECONDS."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _LOCK_MODE)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Conflict(f"{path} is held by somebody for {LOCK_SECONDS:.0f} s") from None
                time.sleep(_LOCK_RETRY_SECONDS)
            else:
                break
        yield
    finally:
        os.close(fd)


def _take_serial(path: Path) -> int:
    """The number after the one in the file, which is the last that was given."""
    last = 1
    if path.exists():
        text = _read(path).strip()
        if not text.isdigit() or len(text) > SERIAL_MAX:
            raise HostError(f"{path} holds no serial number: numbers must not be given twice")
        last = int(text)
    number = last + 1
    text = str(number).encode()
    if len(text) > SERIAL_MAX:
        raise HostError(f"{path}: there are no serial numbers left")
    durable.replace(path, text, _PUBLIC_MODE)
    return number


def _present_key(path: Path, password: bytes | None) -> SigningKey:
    """The key in `path`, which is made there if nothing is."""
    if path.exists():
        return _key(path, password)
    key = rsa.generate_private_key(65537, _KEY_BITS)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    durable.create(path, pem, _SECRET_MODE)
    return key


def _key(path: Path, password: bytes | None) -> SigningKey:
    # SAFETY: to prove an RSA key takes 85 ms. It comes from a file that only we and swtpm_localca
    # write, and each signature by it is verified with the issuer's certificate before it leaves.
    try:
        key = serialization.load_pem_private_key(
            _read(path), password, unsafe_skip_rsa_key_validation=True
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"Could not read signing key {path}: {error}") from None
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"Signing key {path} is neither an RSA nor an EC key.")
    return key


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise InvalidInput(f"Could not read certificate {path}: {error}") from None


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    durable.create(path, certificate.public_bytes(serialization.Encoding.PEM), _PUBLIC_MODE)


def _read(path: Path) -> bytes:
    data = regular.read(path, _FILE_MAX + 1)
    if len(data) > _FILE_MAX:
        raise HostError(f"{path} is longer than {_FILE_MAX} bytes")
    return data
