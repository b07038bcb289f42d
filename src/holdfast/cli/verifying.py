"""`verify` and `policy create`: appraisal at the command line. No daemon, no root, no TPM."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from holdfast import __version__
from holdfast.appraise import progress as progress_text
from holdfast.appraise.learn import learn_policy
from holdfast.appraise.policy import Policy, Trust, parse_policy
from holdfast.appraise.result import AttestedContainer, Progress, ear_claims, sign_ear
from holdfast.appraise.verifier import appraise
from holdfast.cli import output
from holdfast.cli.output import show
from holdfast.errors import AppraisalError, DecodeError, InvalidInput

AUDIENCE: Final = "holdfast"  # who does not say who they are: the daemon's default as well
_FILE_MAX: Final = 32 << 20
_NAME_SIZE: Final = 34  # of a name by SHA-256

EvidenceFile = Annotated[Path, typer.Argument(help="What holdfast attest wrote.")]
Nonce = Annotated[str, typer.Option(help="Your nonce, in hex, as it was given to attest.")]
Audience = Annotated[str, typer.Option(help="Your name, as it was given to attest.")]
UserData = Annotated[str, typer.Option(help="What the evidence is bound to, in hex.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def verify(
    evidence: EvidenceFile,
    policy: Annotated[Path, typer.Option(help="The appraisal policy (TOML).")],
    nonce: Nonce,
    audience: Audience = AUDIENCE,
    user_data: UserData = "",
    ear_key: Annotated[
        Path | None, typer.Option(help="P-256 private key (PEM): print the result as a signed EAR.")
    ] = None,
    progress: Annotated[
        Path | None,
        typer.Option(help="File of this vTPM's: what was seen before must not go back."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Appraise evidence, offline: accepted, with what was established; or the first thing wrong."""
    key = _key(ear_key) if ear_key is not None else None
    given = (
        _evidence(evidence), _policy(policy), _hex(nonce, "nonce"), audience,
        _hex(user_data, "user data"), datetime.now(UTC),
    )  # fmt: skip
    try:
        if progress is None:
            attested = appraise(*given)
        else:
            with _kept(progress) as file:
                attested = appraise(*given, earlier=file.earlier)
                file.keep(attested.progress)
    except AppraisalError as error:
        if as_json:
            show({"accepted": False, "step": error.step, "why": error.why}, True, _nothing)
            raise typer.Exit(7) from None
        output.line(f"at step {error.step}: {error.why}", "[red]refused[/red]")
        raise typer.Exit(7) from None
    if key is not None:
        claims = ear_claims(attested, f"holdfast {__version__}")
        sys.stdout.write(sign_ear(claims, key) + "\n")
        return
    show(_result(attested), as_json, lambda _: _tell(attested))


def create_policy(
    evidence: EvidenceFile,
    site_root: Annotated[Path, typer.Option(help="The site root's certificate (PEM).")],
    nonce: Nonce,
    software_host_tpm: Annotated[
        list[str] | None,
        typer.Option(help="Name of a host AK whose TPM is software, and is accepted all the same."),
    ] = None,
    ek_root: Annotated[
        list[Path] | None, typer.Option(help="CA of hardware TPMs' EK certificates (PEM).")
    ] = None,
    audience: Audience = AUDIENCE,
    user_data: UserData = "",
    out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
) -> None:
    """Make a policy from the evidence of a known-good run."""
    root = _certificate(site_root)
    fingerprint = hashlib.sha256(root.public_bytes(Encoding.DER)).digest()
    trust = Trust(
        frozenset({fingerprint}),
        tuple(each for path in ek_root or () for each in _certificates(path)),
        frozenset(map(_ak_name, software_host_tpm or ())),
    )
    text = learn_policy(
        _evidence(evidence), trust, _hex(nonce, "nonce"), audience,
        _hex(user_data, "user data"), datetime.now(UTC),
    )  # fmt: skip
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text)


@dataclass
class _Progress:
    """What an appraisal before has left in a file; None if there was none."""

    path: Path
    directory: int
    earlier: Progress | None

    def keep(self, progress: Progress) -> None:
        """Replace the file, durably and as a whole, by one that is its owner's alone."""
        fd, fresh = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with open(fd, "w") as file:
                file.write(progress_text.encode(progress))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
        except BaseException:
            os.unlink(fresh)
            raise
        os.fsync(self.directory)


@contextmanager
def _kept(path: Path) -> Iterator[_Progress]:
    """The progress in a file, for one appraisal at a time. Damage is never taken for a first time.

    What is locked is the directory, as the file itself is replaced.
    """
    path = Path(os.path.realpath(path))
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        try:
            earlier = progress_text.decode(_read(path).decode(errors="replace"))
        except FileNotFoundError:
            earlier = None
        except DecodeError as error:
            raise DecodeError(
                f"the progress file {path}",
                f"{error.why}; put back a good copy: without it nothing shows what went back",
            ) from None
        yield _Progress(path, directory, earlier)
    finally:
        os.close(directory)


def _result(attested: AttestedContainer) -> dict[str, Any]:
    return {
        "accepted": True,
        "name": attested.name,
        "instance": str(attested.instance),
        "established": list(attested.established),
        "limits": list(attested.limits),
        "ear": ear_claims(attested, f"holdfast {__version__}"),
    }


def _tell(attested: AttestedContainer) -> None:
    head, *lines = attested.summary()
    output.line(head, "[green]accepted[/green]")
    for text in lines:
        output.line(f"  {text}")


def _nothing(_: object) -> None:
    return


def _policy(path: Path) -> Policy:
    """A policy, and the certificates that lie beside it."""
    try:
        text = _read(path).decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is no policy: it is not UTF-8") from None
    try:
        return parse_policy(text, _Beside(path.parent))
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None


class _Beside(Mapping[str, bytes]):
    """The PEM files of a directory, read when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self._names = sorted(path.name for path in directory.glob("*.pem"))
        self._directory = directory

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return _read(self._directory / name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _certificate(path: Path) -> x509.Certificate:
    found = _certificates(path)
    if len(found) != 1:
        raise InvalidInput(f"{path} has {len(found)} certificates, where one is wanted")
    return found[0]


def _certificates(path: Path) -> list[x509.Certificate]:
    """All of a file: a maker publishes one that issues and one above it."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise InvalidInput(f"{path} is not a certificate in PEM") from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_FILE_MAX + 1)
    if len(data) > _FILE_MAX:
        raise InvalidInput(f"{path} has more than {_FILE_MAX} bytes")
    return data


def _evidence(path: Path) -> bytes:
    """What was printed has a line's end, which is no part of it."""
    return _read(path).removesuffix(b"\n")


def _ak_name(text: str) -> bytes:
    """A TPM2B_NAME's content as `init` prints it: SHA-256's identifier and a digest, in hex."""
    name = _hex(text, "a host AK's name")
    if len(name) != _NAME_SIZE or name[:2] != b"\0\x0b":
        raise InvalidInput(f"{text!a} is not a host AK's name, which begins with 000b: see init")
    return name


def _hex(text: str, what: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidInput(f"{what} is not hexadecimal") from None


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidInput(f"{path} is not a private key in PEM, without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput(f"{path} is not a P-256 key")
    return key
