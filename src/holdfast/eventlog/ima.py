"""IMA templates: what was executed, in the form Linux measures and shows it.

Read and written are the templates `ima` (SHA-1 or MD5, file name of at most 255 bytes), `ima-ng`
(digest with its algorithm, path) and `ima-sig` (these and a signature). Template data is what is
hashed into PCR 10, in each bank with that bank's hash. The ascii form is that of
`ascii_runtime_measurements`, whose first digest is always the SHA-1 of the template data.

PCR 10 of a container never begins empty, so that zero never means clean:
- execution is measured: `boot_aggregate`, SHA-256 over PCRs 0-9 as in Linux, which ties the list
  to the boot it belongs to (`boot_aggregate_record`);
- it is not: one entry for the pseudo-file `execution not measured`, whose file digest is 32 zeros
  and so that of no file (`not_measured_record`).

Not here: records in general (`records`), reading files (`measure`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog.records import IMA, PCR_OF, Record, make_record, template
from holdfast.eventlog.replay import PcrValues, composite
from holdfast.tpm2.algorithms import HASH_SIZES, Alg, digest
from holdfast.tpm2.constants import PCR_COUNT

TEMPLATE_IMA: Final = "ima"
TEMPLATE_NG: Final = "ima-ng"
TEMPLATE_SIG: Final = "ima-sig"
NOT_MEASURED: Final = "execution not measured"
BOOT_AGGREGATE: Final = "boot_aggregate"
BOOT_AGGREGATE_PCRS: Final = range(10)

LIST_MAX: Final = 64 << 20  # bytes of an ascii list
ENTRIES_MAX: Final = 500_000
LINE_MAX: Final = 1 << 16  # characters of one ascii line
PATH_MAX: Final = 4 * 4095  # bytes: PATH_MAX of Linux, each byte escaped
SIGNATURE_MAX: Final = 4096
_LEGACY_NAME_SIZE: Final = 256  # IMA_EVENT_NAME_LEN_MAX + 1; hashed with its padding
_LEGACY_DIGEST_SIZES: Final = {"sha1": 20, "md5": 16}
_LEN: Final = struct.Struct("<I")
_ALGORITHM: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*")
# What would break a line, and the backslash that stands for it: `\` and three octal digits each.
_UNPRINTABLE: Final = re.compile(rb"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class Entry:
    """One measured file: template, hash algorithm by its Linux name, file digest, path, signature.

    `path` is printable text as it stands in the list (see `escape`). `violation` is an entry whose
    template digest Linux shows as zeros and extends as 0xff: a file written while it was measured.
    """

    template_name: str
    algorithm: str
    file_digest: bytes
    path: str
    signature: bytes = b""
    violation: bool = False

    def template_data(self) -> bytes:
        """The bytes that are hashed (Linux, security/integrity/ima: fields d, n, d-ng, n-ng, sig).

        InvalidInput for a template we do not know or a field that does not fit it.
        """
        try:
            path = self.path.encode("utf-8", "surrogateescape") + b"\0"
        except UnicodeEncodeError:
            raise InvalidInput("a path with half a character") from None
        if len(path) > PATH_MAX + 1 or b"\0" in path[:-1] or b"\n" in path:
            raise InvalidInput("a path that cannot stand in an IMA list")
        if self.template_name == TEMPLATE_IMA:
            size = _LEGACY_DIGEST_SIZES.get(self.algorithm)
            if len(self.file_digest) != size or len(path) > _LEGACY_NAME_SIZE:
                raise InvalidInput("template `ima` holds SHA-1 or MD5 and 255 bytes of file name")
            return self.file_digest.ljust(20, b"\0") + path.ljust(_LEGACY_NAME_SIZE, b"\0")
        if self.template_name not in (TEMPLATE_NG, TEMPLATE_SIG):
            raise InvalidInput(f"{self.template_name!a} is not an IMA template we know")
        if not _ALGORITHM.fullmatch(self.algorithm) or not 0 < len(self.file_digest) <= 64:
            raise InvalidInput("an IMA digest has an algorithm and at most 64 bytes")
        fields = [self.algorithm.encode() + b":\0" + self.file_digest, path]
        if self.template_name == TEMPLATE_SIG:
            if len(self.signature) > SIGNATURE_MAX or " " in self.path:
                raise InvalidInput("template `ima-sig` holds 4096 bytes, and no space in its path")
            fields.append(self.signature)
        elif self.signature:
            raise InvalidInput("template `ima-ng` holds no signature")
        return b"".join(_LEN.pack(len(value)) + value for value in fields)

    def digest(self, bank: Alg) -> bytes:
        """What `bank` of the PCR is extended with: that bank's hash of the template data.

        Not so in a host's PCR 10 if its kernel has not loaded the bank's hash when IMA begins
        (seen with SHA-384 and SHA-512): Linux then pads the SHA-1 with zeros.
        """
        if self.violation:
            return b"\xff" * HASH_SIZES[bank]
        return digest(bank, self.template_data())

    def ascii_line(self, pcr: int = PCR_OF[IMA]) -> str:
        """The line Linux shows, without its line feed."""
        shown = bytes(20) if self.violation else digest(Alg.SHA1, self.template_data())
        value = self.file_digest.hex()
        if self.template_name != TEMPLATE_IMA:
            value = f"{self.algorithm}:{value}"
        line = f"{pcr} {shown.hex()} {self.template_name} {value} {self.path}"
        return f"{line} {self.signature.hex()}" if self.template_name == TEMPLATE_SIG else line


def escape(path: str | bytes) -> str:
    """A path as it stands in a list: bytes that would break a line, and those that are not UTF-8,
    as a backslash and three octal digits; likewise the backslash. Two paths never look alike.

    Text may hold undecodable bytes as `os.fsdecode` leaves them; InvalidInput for other
    halves of characters. Spaces stay: in `ima-ng` the path
    is the last column. (Linux turns them into underscores, as `ima-sig` needs.)
    """
    try:
        raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
    except UnicodeEncodeError:
        raise InvalidInput("a path with half a character") from None
    plain = _UNPRINTABLE.sub(lambda match: b"\\%03o" % match.group()[0], raw)
    text = plain.decode("utf-8", "surrogateescape")
    # U+DC80-U+DCFF each stand for one undecodable byte; U+0085, U+2028 and U+2029 are line ends to
    # some readers.
    return "".join(_octal(char) if _breaks(char) else char for char in text)


def ima_record(recnum: int, path: str | bytes, file_digest: bytes, banks: Iterable[Alg]) -> Record:
    """An `ima-ng` record for PCR 10: `file_digest` is the SHA-256 of the file at `path`."""
    if len(file_digest) != HASH_SIZES[Alg.SHA256]:
        raise InvalidInput(f"a SHA-256 digest of {len(file_digest)} bytes")
    data = Entry(TEMPLATE_NG, "sha256", file_digest, escape(path)).template_data()
    content = {"template_name": TEMPLATE_NG, "template_data": data.hex()}
    return make_record(recnum, IMA, content, banks)


def boot_aggregate(values: PcrValues) -> bytes:
    """SHA-256 over PCRs 0-9 of the SHA-256 bank (Linux since 5.8); InvalidInput without it."""
    return composite(values, Alg.SHA256, BOOT_AGGREGATE_PCRS)


def boot_aggregate_record(recnum: int, values: PcrValues, banks: Iterable[Alg]) -> Record:
    """The first record of PCR 10 when execution is measured."""
    return ima_record(recnum, BOOT_AGGREGATE, boot_aggregate(values), banks)


def not_measured_record(recnum: int, banks: Iterable[Alg]) -> Record:
    """The first and only record of PCR 10 when nothing measures what is executed."""
    return ima_record(recnum, NOT_MEASURED, bytes(HASH_SIZES[Alg.SHA256]), banks)


def entry_of(record: Record) -> Entry:
    """The entry of an `ima-ng` or `ima-sig` record; DecodeError if it is not in its one form.

    Says nothing about the digests: that is `records.verify_record`.
    """
    what = f"event {record.recnum} ({record.content_type})"
    if record.content_type != IMA:
        raise DecodeError(what, "is not an IMA record")
    name, data = template(record.content)
    if name not in (TEMPLATE_NG, TEMPLATE_SIG):
        raise DecodeError(what, f"template {name!a} is not one we read")
    fields = _fields(data, 2 if name == TEMPLATE_NG else 3, what)
    algorithm, colon, value = fields[0].partition(b":\0")
    try:
        entry = Entry(
            name,
            algorithm.decode("ascii"),
            value,
            fields[1].removesuffix(b"\0").decode("utf-8", "surrogateescape"),
            b"".join(fields[2:]),
        )
        again = entry.template_data()
    except (UnicodeDecodeError, InvalidInput) as error:
        raise DecodeError(what, f"template data: {error}") from None
    if not colon or again != data:
        raise DecodeError(what, "template data is not in its one form")
    return entry


def to_ascii(records: Iterable[Record]) -> str:
    """The IMA records among `records` as Linux shows them, a line each; DecodeError."""
    return "".join(
        entry_of(record).ascii_line(record.pcr) + "\n"
        for record in records
        if record.content_type == IMA
    )


def parse_ascii(text: str) -> tuple[tuple[int, Entry], ...]:
    """Read an ascii list of `ima`, `ima-ng` and `ima-sig` lines: (PCR, entry) in order.

    Every line ends in a line feed, and its SHA-1 must be that of its template data (or zeros, a
    violation). DecodeError names the line.
    """
    if len(text) > LIST_MAX:
        raise DecodeError("IMA list", f"{len(text)} characters, at most {LIST_MAX}")
    lines = text.split("\n", ENTRIES_MAX)
    if lines.pop():
        raise DecodeError("IMA list", "its last line does not end, or it has too many")
    return tuple(_line(line, f"IMA list, line {n}") for n, line in enumerate(lines, 1))


def _line(line: str, what: str) -> tuple[int, Entry]:
    words = line.split(" ", 4)
    if len(line) > LINE_MAX or len(words) != 5:
        raise DecodeError(what, "is not PCR, digest, template, digest, path")
    pcr, shown, name, hashed, path = words
    if not re.fullmatch(r"0|[1-9][0-9]?", pcr, re.ASCII) or int(pcr) >= PCR_COUNT:
        raise DecodeError(what, f"PCR {pcr!a}")
    algorithm, colon, value = hashed.rpartition(":")
    signature = ""
    if name == TEMPLATE_IMA and not colon:
        algorithm = "md5" if len(value) == 32 else "sha1"
    elif name == TEMPLATE_SIG and colon:
        path, space, signature = path.partition(" ")  # Linux leaves no space in a path
        if not space:
            raise DecodeError(what, "ima-sig has no column for the signature")
    elif name != TEMPLATE_NG or not colon:
        raise DecodeError(what, f"template {name!a} with digest {hashed[:80]!a}")
    zeros = shown == "0" * 40
    for column in (shown, value, signature):
        if not _HEX.fullmatch(column):
            raise DecodeError(what, "a digest or signature is not lower-case hexadecimal")
    entry = Entry(name, algorithm, bytes.fromhex(value), path, bytes.fromhex(signature), zeros)
    try:
        data = entry.template_data()
    except InvalidInput as error:
        raise DecodeError(what, str(error)) from None
    if not zeros and digest(Alg.SHA1, data).hex() != shown:
        raise DecodeError(what, "its first digest is not that of its template")
    return int(pcr), entry


def _fields(data: bytes, count: int, what: str) -> list[bytes]:
    """`count` fields, each after its little-endian length, and nothing more."""
    fields = []
    pos = 0
    for _ in range(count):
        if len(data) - pos < _LEN.size:
            raise DecodeError(what, "template data is cut short")
        (size,) = _LEN.unpack_from(data, pos)
        pos += _LEN.size
        if size > len(data) - pos:
            raise DecodeError(what, "template data is cut short")
        fields.append(data[pos : pos + size])
        pos += size
    if pos != len(data):
        raise DecodeError(what, "template data is longer than its fields")
    return fields


def _breaks(char: str) -> bool:
    return "\udc80" <= char <= "\udcff" or "\x80" <= char <= "\x9f" or char in "\u2028\u2029"


def _octal(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))
