"""swtpm_setup's command line (swtpm_setup(8)): what was asked, as values. Nothing is opened.

What we do not have is refused by name, with what to do instead.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

from holdfast.errors import InvalidInput
from holdfast.swtpm.options import REMOVALS, KeySource, ProfileSource
from holdfast.tpm2.algorithms import HASHES_BY_NAME, Alg

CAPABILITIES: Final = (
    "tpm-2.0", "cmdarg-keyfile-fd", "cmdarg-pwdfile-fd", "cmdarg-write-ek-cert-files",
    "cmdarg-create-config-files", "cmdarg-reconfigure-pcr-banks", "tpm2-rsa-keysize-2048",
    "tpm2-rsa-keysize-3072",
)  # fmt: skip
# Those that need a libtpms with profiles.
PROFILE_CAPABILITIES: Final = ("cmdarg-profile", "cmdarg-profile-remove-disabled")
DEFAULT_BANKS: Final = "sha256"
DEFAULT_RSA_BITS: Final = 2048
NO_BANKS: Final = "-"
CONFIG_FLAGS: Final = ("overwrite", "root", "skip-if-exist")
_CIPHERS: Final = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}  # key sizes in bytes
_PROFILE_NAME: Final = re.compile(r"[A-Za-z0-9.\-:]+")
_TPM_1_2: Final = "TPM 1.2 is not offered"
_DEVICE_KEYS: Final = "keys of swtpm 0.11, which are not offered"
# Options of some swtpm_setup that are not here, and why.
REFUSED: Final = {
    "take-ownership": f"Taking ownership is not supported for TPM 2: {_TPM_1_2}",
    "ownerpass": _TPM_1_2, "owner-well-known": _TPM_1_2, "srkpass": _TPM_1_2,
    "srk-well-known": _TPM_1_2, "ek1keyalgo": "--rsa-keysize chooses the first EK",
    "ek2keyalgo": "the second EK is on P-384", "iakkeyalgo": _DEVICE_KEYS,
    "idevidkeyalgo": _DEVICE_KEYS,
}  # fmt: skip


class Existing(Enum):
    """What happens to a state that is there."""

    REFUSE = "refuse"
    OVERWRITE = "overwrite"
    KEEP = "keep"


@dataclass(frozen=True)
class Options:
    """What was asked of `swtpm_setup`."""

    state: str
    config: str
    log: str
    run_as: str
    vmid: str | None
    tpm: str
    key: KeySource | None
    existing: Existing
    reconfigure: bool
    create_ek: bool
    create_ek_cert: bool
    create_platform_cert: bool
    create_spk: bool
    ecc: bool
    lock_nvram: bool
    allow_signing: bool
    decryption: bool
    pcr_banks: str
    rsa_keysize: str
    ek_cert_directory: str
    display: bool
    create_config_files: tuple[str, ...] | None
    profile: ProfileSource | None
    profile_name: str  # where it is, is the configuration's
    remove_disabled: str
    print_profiles: bool
    print_capabilities: bool
    version: bool
    deprecated: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"swtpm_setup: {message}\nTry 'swtpm_setup --help'.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="swtpm_setup", allow_abbrev=False,
        description="Make the state of a TPM 2.0, as swtpm_setup does.",
    )  # fmt: skip
    add = parser.add_argument
    add("--tpm-state", "--tpmstate", metavar="DIR", default="", dest="state",
        help="where the state goes: a directory, dir://DIRECTORY or file://FILE")  # fmt: skip
    add("--tpm2", action="store_true", help="set up a TPM 2: the only one there is")
    add("--createek", action="store_true", help="make an RSA and an ECC endorsement key")
    add("--create-ek-cert", action="store_true", help="and their certificates")
    add("--create-platform-cert", action="store_true", help="make the keys and a platform "
        "certificate")  # fmt: skip
    add("--create-spk", action="store_true", help="make a storage primary key")
    add("--ecc", action="store_true", help="which is on P-384 and not RSA then")
    add("--allow-signing", action="store_true", help="endorsement keys that sign (non-standard)")
    add("--decryption", action="store_true", help="endorsement keys that decrypt: the default "
        "unless --allow-signing is given")  # fmt: skip
    add("--lock-nvram", action="store_true", help="lock the NV indices that are written")
    add("--pcr-banks", metavar="BANKS", default="", help="PCR banks to activate, as sha1,sha256; "
        f"- leaves all active; default: {DEFAULT_BANKS}")  # fmt: skip
    add("--rsa-keysize", metavar="BITS", default="", help="2048, 3072 or max; default: 2048")
    add("--reconfigure", action="store_true", help="give a state that is there other PCR banks")
    add("--overwrite", action="store_true", help="replace a state that is there")
    add("--not-overwrite", action="store_true", help="leave it, and end well")
    add("--keyfile", metavar="FILE", help="a key of hexadecimal digits to encrypt the state with")
    add("--keyfile-fd", metavar="FD", help="the same by a descriptor")
    add("--pwdfile", metavar="FILE", help="a passphrase to derive the key from")
    add("--pwdfile-fd", metavar="FD", help="the same by a descriptor")
    add("--cipher", metavar="CIPHER", help="aes-128-cbc or aes-256-cbc; default: aes-128-cbc")
    add("--vmid", metavar="ID", help="the VM's name in certificates")
    add("--config", metavar="FILE", default="", help="default: swtpm_setup.conf in "
        "$XDG_CONFIG_HOME, ~/.config or /etc")  # fmt: skip
    add("--logfile", metavar="FILE", default="", help="default: standard output and error")
    add("--runas", metavar="USER", default="", help="change to this user")
    add("--write-ek-cert-files", metavar="DIR", default="", help="the EK certificates as files")
    add("--display", action="store_true", help="show at the end what was made")
    add("--tpm", metavar="PROGRAM", default="", help="no other than holdfast-swtpm")
    add("--create-config-files", metavar="FLAGS", nargs="?", const="", help="write a user's "
        f"configuration files; flags: {', '.join(CONFIG_FLAGS)}")  # fmt: skip
    add("--profile", metavar="JSON", help="which algorithms and commands the TPM has "
        "(libtpms 0.10)")  # fmt: skip
    add("--profile-name", metavar="NAME", default="", help="a profile of the configuration's "
        "directory (local:NAME), the distribution's (distro:) or libtpms' own "
        "(builtin:)")  # fmt: skip
    add("--profile-file", metavar="FILE", help="a profile in a file")
    add("--profile-file-fd", metavar="FD", help="the same by a descriptor")
    add("--profile-remove-disabled", metavar="|".join(REMOVALS), default="", help="of a custom "
        "profile, take out what is disabled on this host, or on one in FIPS mode")  # fmt: skip
    add("--print-profiles", action="store_true", help="print them as JSON and end")
    add("--print-capabilities", action="store_true", help="print them as JSON and end")
    add("--version", action="store_true", help="print the version and end")
    add("--swtpm_ioctl", metavar="FILE", help="deprecated, has no effect")
    add("--tcsd-system-ps-file", metavar="FILE", help="deprecated, has no effect")
    for name in REFUSED:
        add(f"--{name}", dest=f"no {name}", help=argparse.SUPPRESS, nargs="?", const="")
    return parser


def parse(arguments: Sequence[str]) -> Options:
    """Read a command line; InvalidInput says what is wrong with it."""
    given = _parser().parse_args(arguments)
    for name, why in REFUSED.items():
        if getattr(given, f"no {name}") is not None:
            raise InvalidInput(f"--{name}: {why}.")
    if given.overwrite and given.not_overwrite:
        raise InvalidInput("--overwrite and --not-overwrite exclude each other.")
    options = Options(
        state=given.state,
        config=given.config,
        log=given.logfile,
        run_as=given.runas,
        vmid=given.vmid,
        tpm=given.tpm,
        key=_key(given),
        existing=(
            Existing.OVERWRITE if given.overwrite
            else Existing.KEEP if given.not_overwrite
            else Existing.REFUSE
        ),
        reconfigure=given.reconfigure,
        create_ek=given.createek or given.create_ek_cert or given.create_platform_cert,
        create_ek_cert=given.create_ek_cert,
        create_platform_cert=given.create_platform_cert,
        create_spk=given.create_spk,
        ecc=given.ecc,
        lock_nvram=given.lock_nvram,
        allow_signing=given.allow_signing,
        decryption=given.decryption,
        pcr_banks=given.pcr_banks,
        rsa_keysize=given.rsa_keysize,
        ek_cert_directory=given.write_ek_cert_files,
        display=given.display,
        create_config_files=_config_flags(given.create_config_files),
        profile=_profile(given),
        profile_name=given.profile_name,
        remove_disabled=given.profile_remove_disabled,
        print_profiles=given.print_profiles,
        print_capabilities=given.print_capabilities,
        version=given.version,
        deprecated=tuple(
            name for name in ("swtpm_ioctl", "tcsd-system-ps-file")
            if getattr(given, name.replace("-", "_")) is not None
        ),
    )  # fmt: skip
    if not (options.version or options.print_capabilities or options.print_profiles
            or options.create_config_files is not None):  # fmt: skip
        _check(options, tpm2=given.tpm2)
    return options


def _check(options: Options, *, tpm2: bool) -> None:
    if not options.state:
        raise InvalidInput("--tpm-state must be provided")
    if not tpm2:
        raise InvalidInput(f"{_TPM_1_2}: give --tpm2.")
    if options.reconfigure and options.create_ek:
        raise InvalidInput("Reconfiguration is not supported with creation of EK or certificates")
    kept = options.existing is Existing.REFUSE
    if options.reconfigure and (
        options.create_spk or options.rsa_keysize or options.allow_signing or not kept
    ):
        raise InvalidInput("--reconfigure changes the PCR banks, and nothing else.")
    profile = bool(options.profile or options.profile_name)
    if options.reconfigure and profile:
        raise InvalidInput("Reconfiguration does not accept a (new) profile.")
    if options.ek_cert_directory and not options.create_ek_cert:
        raise InvalidInput("--write-ek-cert-files needs --create-ek-cert.")


def banks(text: str) -> tuple[Alg, ...] | None:
    """PCR banks by their names; None for `-`: all are left as they are."""
    if text == NO_BANKS:
        return None
    chosen = []
    for name in (part.strip() for part in text.split(",")):
        alg = HASHES_BY_NAME.get(name)
        if alg is None:
            raise InvalidInput(
                f"PCR bank '{name}' is not known: there are {', '.join(HASHES_BY_NAME)}."
            )
        chosen.append(alg)
    return tuple(chosen)


def rsa_bits(text: str, offered: Sequence[int]) -> int:
    """The size of an RSA EK; `max` is the largest of those that are offered."""
    if text == "max":
        return max(offered)
    bits = int(text) if text.isascii() and text.isdecimal() else 0
    if bits not in offered:
        raise InvalidInput(f"Unsupported RSA key size {text}.")
    return bits


def _key(given: argparse.Namespace) -> KeySource | None:
    names = ("keyfile", "keyfile_fd", "pwdfile", "pwdfile_fd")
    used = [name for name in names if getattr(given, name) is not None]
    if len(used) > 1:
        listed = " and ".join(f"--{name.replace('_', '-')}" for name in used)
        raise InvalidInput(f"{listed} exclude each other.")
    cipher = given.cipher or "aes-128-cbc"
    if cipher not in _CIPHERS:
        raise InvalidInput(f"Unsupported cipher {cipher}.")
    if not used:
        if given.cipher:
            raise InvalidInput("--cipher encrypts nothing without a key or a passphrase.")
        return None
    (name,) = used
    value = getattr(given, name)
    at_descriptor = name.endswith("_fd")
    if at_descriptor and not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise InvalidInput(f"Invalid file descriptor '{value}'")
    return KeySource(
        file="" if at_descriptor else value,
        fd=int(value) if at_descriptor else -1,
        password=name.startswith("pwd"),
        size=_CIPHERS[cipher],
    )


def _profile(given: argparse.Namespace) -> ProfileSource | None:
    names = ("profile", "profile_name", "profile_file", "profile_file_fd")
    if len([name for name in names if getattr(given, name)]) > 1:
        raise InvalidInput(
            "Only one of --profile, --profile-name, --profile-file, and --profile-file-fd "
            "may be given."
        )
    for name in names:
        if getattr(given, name) == "" and name != "profile_name":
            raise InvalidInput(f"--{name.replace('_', '-')} is empty.")
    removal = given.profile_remove_disabled
    if removal and removal not in REMOVALS:
        raise InvalidInput(f"Unsupported parameter for --profile-remove-disabled: {removal}")
    if given.profile_name and not _PROFILE_NAME.fullmatch(given.profile_name):
        raise InvalidInput(f"Profile name '{given.profile_name}' contains unacceptable characters.")
    fd = given.profile_file_fd
    if fd is not None and not (fd.isascii() and fd.isdecimal() and len(fd) < 10):
        raise InvalidInput(f"Invalid file descriptor '{fd}'")
    if not (given.profile or given.profile_file or fd):
        return None
    return ProfileSource(
        text=given.profile or "", file=given.profile_file or "", fd=int(fd) if fd else -1
    )


def _config_flags(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    flags = tuple(text.split(",")) if text else ()
    for flag in flags:
        if flag not in CONFIG_FLAGS:
            raise InvalidInput(
                f"Unsupported --create-config-files flag '{flag}': "
                f"there are {', '.join(CONFIG_FLAGS)}."
            )
    return flags
