"""`holdfast-swtpm-setup`: what swtpm_setup's callers start.

It ends with 0 when the state is there, with 1 and the reason when it is not. The order is: all
that can be refused is refused, then a TPM is made in memory, then its state is written.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from holdfast import __version__
from holdfast.engine.libtpms import Engine, Entropy
from holdfast.errors import Conflict, HoldfastError, HostError, InvalidInput
from holdfast.linux import process
from holdfast.protocol.stateblob import Key, decode_file, encode_file
from holdfast.swtpm import keys, profiles, user
from holdfast.swtpm.options import KeySource, ProfileSource
from holdfast.swtpm.setup import certificates, config, durable, options
from holdfast.swtpm.setup.authority import Authority
from holdfast.swtpm.setup.certificates import Platform
from holdfast.swtpm.setup.config import SetupConfig
from holdfast.swtpm.setup.keys import RSA
from holdfast.swtpm.setup.manufacture import (
    Certifier,
    Facts,
    Made,
    Plan,
    endorsement_keys,
    make,
    reconfigure,
)
from holdfast.swtpm.setup.options import CAPABILITIES, PROFILE_CAPABILITIES, Existing, Options
from holdfast.swtpm.setup.places import PERMANENT, SUSPENDED, Place
from holdfast.swtpm.setup.report import Report
from holdfast.swtpm.setup.tool import ENDING, Tool
from holdfast.swtpm.storage import told_of

OURS: Final = "holdfast-swtpm"
DISTRIBUTION_PROFILES: Final = "/usr/share/swtpm/profiles"
_CERTIFICATE_MODE: Final = 0o640
_IV: Final = 32


def run(asked: Options, report: Report) -> int:
    """Make or reconfigure a TPM as asked for; the exit status."""
    for name in asked.deprecated:
        report.fail(f"Warning: --{name} is deprecated and has no effect.")
    _check_program(asked.tpm)
    settings = _settings(asked)
    who = user.name()
    place = Place(asked.state, who)
    if asked.ek_cert_directory:
        _check_directory(asked.ek_cert_directory, who)
    if not asked.reconfigure and _is_kept(place, asked.existing, report):
        return 0
    engine = Engine()
    facts = Facts.of(engine)
    plan = replace(_plan(asked, settings, facts), profile=_profile(asked, settings, engine))
    if asked.ek_cert_directory:
        _check_targets(asked.ek_cert_directory, plan)
    key = _key(asked.key, who, report) if asked.key is not None else None
    process.set_dumpable(False)
    Entropy().reseed()
    place.lock()
    if not asked.reconfigure and _is_kept(place, asked.existing, report):
        return 0
    verb = "reconfiguration" if asked.reconfigure else "manufacturing"
    report.say(f"Starting vTPM {verb} as {who}:{user.group()} @ {_now()}")
    try:
        if asked.reconfigure:
            _reconfigure(engine, place, plan, key, report)
        else:
            made = make(engine, plan, _certifier(facts, asked, settings, report), report.say)
            with _undisturbed():
                _write(place, made, key, asked.ek_cert_directory)
            if asked.display:
                _display(made, report)
        report.say("Successfully authored TPM state.")
    except (HoldfastError, OSError) as error:
        report.fail(_words(error))
        report.fail("An error occurred. Authoring the TPM state failed.")
        return 1
    finally:
        report.say(f"Ending vTPM manufacturing @ {_now()}")
    return 0


def _check_program(tpm: str) -> None:
    """--tpm: the TPM is made in this process, so that no other program's can be asked for."""
    words = tpm.split()
    if not words:
        return
    program, arguments = words[0], words[1:]
    path = shutil.which(program)
    if path is None:
        raise InvalidInput(f"swtpm at {program} is not an executable.")
    if Path(path).resolve().name != OURS or arguments not in ([], ["socket"]):
        raise InvalidInput(
            f"--tpm '{tpm}': a TPM is made without another program here; "
            f"leave --tpm out, or name {OURS}."
        )


def _settings(asked: Options) -> SetupConfig:
    if asked.config:
        path: Path | None = Path(asked.config)
        if not os.access(asked.config, os.R_OK):
            raise InvalidInput(f"User {user.name()} cannot read config file {asked.config}.")
    else:
        path = config.found(config.SETUP, os.environ)
    return SetupConfig() if path is None else config.setup(path, os.environ)


def _check_directory(path: str, who: str) -> None:
    if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
        raise HostError(
            f"User {who} cannot access directory {path}. Make sure it exists and is a directory."
        )


def _check_targets(directory: str, plan: Plan) -> None:
    for key in endorsement_keys(plan):
        path = _certificate_path(directory, key.suffix)
        if path.is_dir() and not path.is_symlink():
            raise HostError(f"{path} is a directory, and a certificate is to have its place.")


def _certificate_path(directory: str, suffix: str) -> Path:
    return Path(directory, f"ek-{suffix}.crt")


def _is_kept(place: Place, existing: Existing, report: Report) -> bool:
    there = place.existing()
    if not there or existing is Existing.OVERWRITE:
        return False
    if existing is Existing.KEEP:
        report.say("Not overwriting existing state file.")
        return True
    raise Conflict(f"Found existing TPM state '{there[0]}'.")


def _plan(asked: Options, settings: SetupConfig, facts: Facts) -> Plan:
    size = asked.rsa_keysize or settings.rsa_keysize or str(options.DEFAULT_RSA_BITS)
    return Plan(
        banks=options.banks(asked.pcr_banks or settings.pcr_banks or options.DEFAULT_BANKS),
        rsa_bits=options.rsa_bits(size, [bits for bits in RSA if bits in facts.rsa_sizes]),
        endorsement_keys=asked.create_ek,
        endorsement_certificates=asked.create_ek_cert,
        platform_certificate=asked.create_platform_cert,
        lock=asked.lock_nvram,
        signing=asked.allow_signing,
        decryption=asked.decryption,
        storage_key=asked.create_spk,
        storage_key_is_ecc=asked.ecc,
    )


def _profile(asked: Options, settings: SetupConfig, engine: Engine) -> str | None:
    """The profile that the caller chose, else the configuration, else libtpms."""
    if asked.reconfigure:
        return None
    source = asked.profile
    if asked.profile_name:
        source = _named_profile(asked.profile_name, settings)
    elif source is None and (settings.profile or settings.profile_file):
        # Both are swtpm_setup's keywords, and the file is what it looks for first.
        text = "" if settings.profile_file else settings.profile
        source = ProfileSource(text=text, file=settings.profile_file)
    if source is None:
        if asked.remove_disabled:
            raise InvalidInput("--profile-remove-disabled changes a profile, and none is given.")
        return None
    return profiles.load(replace(source, remove_disabled=asked.remove_disabled), engine)


def _named_profile(text: str, settings: SetupConfig) -> ProfileSource:
    places = {"local": settings.profiles, "distro": DISTRIBUTION_PROFILES}
    prefix, _, rest = text.partition(":")
    if rest and prefix in ("local", "distro", "builtin"):
        places = {prefix: places[prefix]} if prefix in places else {}
        name, built_in = rest, prefix == "builtin"
    else:
        name, built_in = text, True
    for directory in filter(None, places.values()):
        path = f"{directory}/{name}.json"
        if os.access(path, os.R_OK):
            return ProfileSource(file=path)
    if not built_in:
        raise InvalidInput(f"Could not find or access profile '{text}'.")
    return ProfileSource(name=name)


def _is_told(asked: Options) -> bool:
    """Whether something was to be printed, which now is, and nothing more is to be done."""
    if asked.version:
        sys.stdout.write(f"TPM emulator setup tool version {__version__}, Holdfast\n")
    elif asked.print_capabilities:
        _print_capabilities()
    elif asked.print_profiles:
        _print_profiles(_settings(asked))
    else:
        return False
    return True


def _print_profiles(settings: SetupConfig) -> None:
    places = {"local": settings.profiles, "distro": DISTRIBUTION_PROFILES}
    found = {name: profiles.in_directory(Path(path)) for name, path in places.items() if path}
    said = {name: there for name, there in found.items() if there is not None}
    sys.stdout.write(json.dumps(said | {"builtin": profiles.built_in(Engine())}) + "\n")


def _print_capabilities() -> None:
    engine = Engine()
    features, said = list(CAPABILITIES), {}
    if engine.offers_profiles:
        features += PROFILE_CAPABILITIES
        said = {"profiles": profiles.names(engine)}
    whole = {"type": "swtpm_setup", "features": features, **said, "version": __version__}
    sys.stdout.write(json.dumps(whole) + "\n")


def _key(source: KeySource, who: str, report: Report) -> Key:
    what = "pwdfile" if source.password else "keyfile"
    if source.file and not os.access(source.file, os.R_OK):
        raise InvalidInput(f"User {who} cannot read {what} {source.file}.")
    key = keys.load(source)
    by = "using a key derived from a passphrase" if source.password else "with a provided key"
    by += " (fd)" if source.fd >= 0 else ""
    report.say(f"  The TPM's state will be encrypted {by}.")
    return key


def _certifier(
    facts: Facts, asked: Options, settings: SetupConfig, report: Report
) -> Certifier | None:
    if not (asked.create_ek_cert or asked.create_platform_cert):
        return None
    if settings.tool:
        return Tool(settings, facts, asked.vmid, asked.log, report.say)
    environ = os.environ
    password = environ.get("SWTPM_ROOTCA_PASSWORD")
    return Authority(
        config.authority(_path(settings.tool_config, config.LOCALCA), environ),
        facts,
        Platform(**config.platform(_path(settings.tool_options, config.LOCALCA_OPTIONS))),
        certificates.common_name(asked.vmid),
        password.encode() if password else None,
        report.say,
    )


def _path(named: str, usual: str) -> Path | None:
    return Path(named) if named else config.found(usual, os.environ)


def _reconfigure(engine: Engine, place: Place, plan: Plan, key: Key | None, report: Report) -> None:
    there = place.existing()
    if PERMANENT in there and (suspended := [name for name in there if name in SUSPENDED]):
        raise Conflict(f"The TPM in {place.path} is suspended: there is a '{suspended[0]}'.")
    with told_of(place.path):
        state = reconfigure(engine, decode_file(place.permanent(), key), plan.banks, report.say)
    with _undisturbed():
        place.write(encode_file(state, key, os.urandom(_IV)))


def _write(place: Place, made: Made, key: Key | None, directory: str) -> None:
    """All that is made, at once: certificate files are ready before the state, and named after."""
    data = encode_file(made.state, key, os.urandom(_IV))
    ready: list[tuple[Path, Path]] = []
    try:
        if directory:
            for suffix, certificate in made.certificates.items():
                path = _certificate_path(directory, suffix)
                ready.append((durable.fresh(path, certificate, _CERTIFICATE_MODE), path))
        place.write(data)
        for name, path in ready:
            durable.put(name, path)
    except BaseException:
        for name, _ in ready:
            name.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What is being written is written to its end before a signal ends us."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _display(made: Made, report: Report) -> None:
    for what, handles in (("Persistent keys", made.persistent), ("NV indices", made.nv_indices)):
        report.say(f"{what}: {' '.join(f'{handle:#x}' for handle in handles) or 'none'}")


def _words(error: HoldfastError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        return f"{where}: {error.strerror}" if where else error.strerror
    return str(error)


def _now() -> str:
    return time.strftime("%a %d %b %Y %I:%M:%S %p %Z")


def _end(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # by way of everything that cleans up


def main() -> int:
    """Entry point of `holdfast-swtpm-setup`."""
    try:
        return _main()
    finally:
        gc.freeze()  # else the interpreter's end looks through all modules, for 8 ms


def _main() -> int:
    for number in ENDING:
        signal.signal(number, _end)
    try:
        asked = options.parse(sys.argv[1:])
        if _is_told(asked):
            return 0
        if asked.run_as:
            user.become(asked.run_as)
        report = Report(asked.log)
    except (HoldfastError, OSError) as error:
        sys.stderr.write(f"{_words(error)}\n")
        return 1
    try:
        if asked.create_config_files is None:
            return run(asked, report)
        for path in config.create(asked.create_config_files, os.environ):
            report.say(f"Writing {path}.")
    except (HoldfastError, OSError) as error:
        report.fail(_words(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
