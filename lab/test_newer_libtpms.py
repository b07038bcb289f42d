"""On libtpms 0.10: our program beside swtpm 0.10.2, both of them on Debian sid's libraries.

scripts/setup-lab-sid makes the root file system. A program sees its /usr and /etc in a mount
namespace of its own, which ends with it; all else is this host's, our source too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.swtpm.program import OURS as OURS_HERE
from tests.swtpm.program import SECONDS, STARTED, Program, running
from tests.swtpm.program import THEIRS as THEIRS_HERE

from holdfast.protocol.control import Command
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Curve
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.wire import u16, u32

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = sorted((REPOSITORY / ".cache" / "lab").glob("sid-*"))
pytestmark = pytest.mark.skipif(
    not ROOTS or os.getuid() != 0,
    reason="needs root, and Debian sid in .cache/lab: scripts/setup-lab-sid says why it is not",
)
INSIDE = 'mount --bind "$0/etc" /etc && mount --bind "$0/usr" /usr && exec "$@"'
SID = ("unshare", "--mount", "sh", "-c", INSIDE, str(ROOTS[-1]) if ROOTS else "")
PYTHON = (*SID, "/usr/bin/env", f"PYTHONPATH={REPOSITORY / 'src'}", "PYTHONDONTWRITEBYTECODE=1",
          "/usr/bin/python3")  # fmt: skip
OURS = (*PYTHON, "-m", "holdfast.swtpm")
THEIRS = (*SID, "/usr/bin/swtpm")
OUR_SETUP = (*PYTHON, "-m", "holdfast.swtpm.setup")
THEIR_SETUP = (*SID, "/usr/bin/swtpm_setup")
BOTH = pytest.mark.parametrize("command", [OURS, THEIRS], ids=["ours", "theirs"])
WAYS = pytest.mark.parametrize(
    ("writer", "reader"), [(OURS, THEIRS), (THEIRS, OURS), (OURS, OURS)],
    ids=["ours-theirs", "theirs-ours", "ours-ours"],
)  # fmt: skip
PROFILES = ("null", "default-v1", "custom")
ACTIVE = 0x20  # of --print-info and GET_INFO
ENCRYPT_ECC = 0x199  # TPM2_ECC_Encrypt: new in libtpms 0.10, from StateFormatLevel 3 on
# All of libtpms 0.9's commands but TPM2_ECC_Parameters and those from 0x194 on.
CUSTOM = {"Name": "custom:few", "Commands": "0x11f-0x122,0x124-0x12e,0x130-0x140,0x142-0x159,"
          "0x15b-0x15e,0x160-0x165,0x167-0x174,0x176-0x177,0x17a-0x193"}  # fmt: skip


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=3 * SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def refused(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, errors="replace", timeout=3 * SECONDS, check=False
    )
    assert done.returncode == 1, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def info(program: Program) -> dict[str, object]:
    """The profile of the TPM that runs, as the control channel says it."""
    said = json.loads(program.ioctl("--info", hex(ACTIVE)))["ActiveProfile"]
    assert isinstance(said, dict)
    return said


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """A directory with a profile in a file, and an empty state directory."""
    (tmp_path / "few.json").write_text(f"\n  {json.dumps(CUSTOM)}\n")
    (tmp_path / "state").mkdir()
    return tmp_path


# --- a container's worker ---------------------------------------------------------------------

TRIAL = """
from holdfast.spawner.pool import MotherProcess, Pool
from holdfast.spawner.trial import self_test
mother = MotherProcess()
try:
    self_test(Pool(0, mother))
finally:
    mother.close()
print(mother.version)
"""


def test_workers_live_their_lives_on_the_newer_library() -> None:
    """The spawner's self-test: manufactured, sealed, served and ended, inside the sandbox."""
    assert run(*PYTHON, "-c", TRIAL).startswith("0.10.")


# --- what is printed --------------------------------------------------------------------------


def test_our_program_is_what_runs_and_on_the_newer_library(tmp_path: Path) -> None:
    with running(Program(tmp_path, OURS), *STARTED) as program:
        assert program.process is not None
        of = Path(f"/proc/{program.process.pid}")
        status = (of / "status").read_text()
        assert "Name:\tswtpm\n" in status
        assert "Seccomp:\t2\n" in status
        assert "libtpms.so.0.10" in (of / "maps").read_text()
        assert "python3" in os.readlink(of / "exe")
        assert program.shut_down() == 0


def test_capabilities_say_of_profiles_what_swtpm_says() -> None:
    ours, theirs = (
        json.loads(run(*command, "socket", "--tpm2", "--print-capabilities"))
        for command in (OURS, THEIRS)
    )
    assert ours["profiles"] == theirs["profiles"]
    assert set(PROFILES) == set(ours["profiles"]["names"])

    def of_profiles(features: list[str]) -> list[str]:
        return [name for name in features if "profile" in name or name == "cmdarg-print-info"]

    assert of_profiles(ours["features"]) == of_profiles(theirs["features"])
    assert len(of_profiles(ours["features"])) == 4
    older = json.loads(run(*OURS_HERE, "socket", "--tpm2", "--print-capabilities"))
    assert older["features"] == ours["features"][: len(older["features"])]


def test_setup_says_of_profiles_what_swtpm_setup_says() -> None:
    ours, theirs = (
        json.loads(run(*command, "--tpm2", "--print-capabilities"))
        for command in (OUR_SETUP, THEIR_SETUP)
    )
    assert ours["profiles"] == theirs["profiles"]
    named = {"cmdarg-profile", "cmdarg-profile-remove-disabled"}
    assert named <= set(ours["features"]) & set(theirs["features"])


def test_profiles_and_information_are_printed_as_swtpm_prints_them(profiles: Path) -> None:
    for options in (
        ("--print-profiles",), ("--print-info", "0x7f"), ("--print-info", "0xff"),
        ("--print-info", "0xff", "--tpmstate", "dir=state"),
        ("--print-info", "0x20", "--tpmstate", "dir=state"),
    ):  # fmt: skip
        asked = ("socket", "--tpm2", *options)
        ours = json.loads(run(*OURS, *asked, cwd=profiles))
        assert not files(profiles / "state") or "dir=state" in options
        assert ours == json.loads(run(*THEIRS, *asked, cwd=profiles)), options
        assert ours


def test_setup_prints_profiles_as_swtpm_setup_does(profiles: Path) -> None:
    (profiles / "conf").write_text(f"local_profiles_dir = {profiles}\n")
    asked = ("--tpm2", "--print-profiles", "--config", str(profiles / "conf"))
    ours = json.loads(run(*OUR_SETUP, *asked))
    # swtpm_setup ends with 1 for having printed something.
    theirs = subprocess.run([*THEIR_SETUP, *asked], capture_output=True, text=True, check=False)
    assert ours == json.loads(theirs.stdout)
    assert [profile["Name"] for profile in ours["local"]] == ["few"]


# --- what a profile does ----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", PROFILES)
def test_a_new_tpm_has_the_profile_that_is_named(
    profiles: Path, command: tuple[str, ...], name: str
) -> None:
    with running(Program(profiles, command), *STARTED, "--profile", f"name={name}") as program:
        assert info(program)["Name"] == name
        assert program.send(rq.command(Cc.ReadClock))[6:10] == bytes(4)
        answer = program.send(bytes.fromhex("80010000000a") + u32(ENCRYPT_ECC))[6:10]
        unknown = int.from_bytes(answer, "big") == Rc.COMMAND_CODE
        assert unknown == (name == "null")  # it is as libtpms 0.9 was
        program.shut_down()
    said = json.loads(
        run(*command, "socket", "--tpm2", "--print-info", "0x20", "--tpmstate", "dir=state",
            cwd=profiles)
    )  # fmt: skip
    assert said["ActiveProfile"]["Name"] == name


@BOTH
@pytest.mark.parametrize("way", ["profile", "file", "fd", "init"])
def test_a_custom_profile_takes_a_command_away(
    profiles: Path, command: tuple[str, ...], way: str
) -> None:
    program = Program(profiles, command)
    with (profiles / "few.json").open("rb") as file:
        source = {
            "profile": f"profile={json.dumps(CUSTOM)}", "init": f"profile={json.dumps(CUSTOM)}",
            "file": f"file={profiles / 'few.json'}", "fd": f"fd={file.fileno()}",
        }[way]  # fmt: skip
        options = () if way == "init" else STARTED
        try:
            program.start("--profile", source, *options, pass_fds=(file.fileno(),))
            for _ in range(2 if way == "init" else 0):  # the second is of a TPM that exists
                assert program.ask(u32(Command.INIT) + u32(0)) == u32(0)
                assert program.send(rq.startup())[6:10] == bytes(4)
            assert info(program)["Name"] == "custom:few"
            answer = program.send(rq.command(Cc.ECC_Parameters, params=u16(Curve.NIST_P256)))
            assert int.from_bytes(answer[6:10], "big") == Rc.COMMAND_CODE
            assert program.send(rq.get_random(8))[6:10] == bytes(4)
            program.shut_down()
        finally:
            program.kill()


BAD = {
    "name=nix": "Could not set profile for TPM2: '",
    'profile={"Name":"custom:x","Algorithms":"nix"}': "Could not set profile for TPM2",
    'profile={"Name":"custom","Commands":"0x17e"}': "Could not set profile for TPM2",
    "profile=x": "Could not set profile for TPM2: 'x'",
    "file=few.jsn": "few.jsn",
    "file=state": "state",
    "file=binary": None,
    "file=long": None,
    "file=nul": None,
    'profile={"Name":"custom"': None,
}


@pytest.mark.parametrize("profile", BAD)
def test_a_profile_that_is_none_makes_no_tpm(profiles: Path, profile: str) -> None:
    for name, content in (("binary", b"\xff"), ("long", b" " * 10241), ("nul", b"{\0}")):
        (profiles / name).write_bytes(content)
    for command in (OURS, THEIRS):
        said = refused(
            *command, "socket", "--tpm2", "--tpmstate", "dir=state", *STARTED, "--profile", profile,
            "--server", "type=unixio,path=data", cwd=profiles,
        )  # fmt: skip
        if BAD[profile] is not None:
            assert BAD[profile] in said
        assert not files(profiles / "state")


@BOTH
def test_a_tpm_that_exists_takes_no_profile(profiles: Path, command: tuple[str, ...]) -> None:
    with running(Program(profiles, command), *STARTED, "--profile", "name=null") as program:
        program.shut_down()
    before = files(profiles / "state")
    said = refused(
        *command, "socket", "--tpm2", "--tpmstate", "dir=state", *STARTED, "--profile", "name=null",
        "--server", "type=unixio,path=data", cwd=profiles,
    )  # fmt: skip
    assert "Profile could not be applied to an existing TPM 2 instance" in said
    with running(Program(profiles, command), "--profile", "name=null") as program:
        assert program.ask(u32(Command.INIT) + u32(0)) == u32(9)
    if command == OURS:
        assert files(profiles / "state") == before


FIPS_CONFIGURATION = """openssl_conf = init
.include {directory}/module.cnf
[init]
providers = providers
alg_section = alg
[providers]
fips = fips_sect
base = base_sect
[base_sect]
activate = 1
[alg]
default_properties = fips=yes
"""
NO_SHA1 = "no-sha1-signing,no-sha1-verification"


@pytest.mark.parametrize(
    ("fips", "removal", "profile"),
    [
        (False, "check", {"Name": "custom"}),
        (False, "fips-host", {"Name": "custom"}),
        (False, "fips-host", {"Name": "custom:x", "Attributes": "fips-host"}),
        (False, "fips-host", {"Name": "custom:x", "Attributes": "no-sha1-signing"}),
        (False, "fips-host", {"Name": "custom:x", "Attributes": f"{NO_SHA1},pct"}),
        (True, "fips-host", {"Name": "custom"}),
        # With less, swtpm does not start: a SHA-1 signature by a short RSA key fails there too.
        (True, "check", {"Name": "custom:x", "Attributes": NO_SHA1}),
    ],
)
def test_what_is_disabled_is_removed_as_swtpm_removes_it(
    profiles: Path, fips: bool, removal: str, profile: dict[str, str]
) -> None:
    """With OpenSSL as it is, and in FIPS mode, by its own FIPS provider."""
    environment: tuple[str, ...] = ()
    if fips:
        module = "/usr/lib/x86_64-linux-gnu/ossl-modules/fips.so"
        run(*SID, "/usr/bin/openssl", "fipsinstall", "-quiet", "-module", module, "-out",
            str(profiles / "module.cnf"))  # fmt: skip
        (profiles / "fips.cnf").write_text(FIPS_CONFIGURATION.format(directory=profiles))
        environment = ("/usr/bin/env", f"OPENSSL_CONF={profiles / 'fips.cnf'}")
    chosen = f"profile={json.dumps(profile)},remove-disabled={removal}"
    said = []
    for command in (OURS, THEIRS):
        before, after = command[: len(SID)], command[len(SID) :]
        asked = ("socket", "--tpm2", "--tpmstate", "dir=state", "--print-info", "0xa0",
                 "--profile", chosen)  # fmt: skip
        answer = run(*before, *environment, *after, *asked, cwd=profiles)
        said.append(json.loads(answer[answer.index("{") :]))  # swtpm may have had its say before
        for name in files(profiles / "state"):
            (profiles / "state" / name).unlink()
    assert said[0] == said[1]
    removed = fips or removal == "fips-host"
    assert ("camellia" not in said[0]["ActiveProfile"]["Algorithms"]) == removed
    assert ("rsa-min-size=2048" in said[0]["ActiveProfile"]["Algorithms"]) == removed


# --- state ------------------------------------------------------------------------------------


def write(program: Program, *options: str) -> None:
    with running(program, *STARTED, *options):
        program.tool("tpm2_nvdefine", "-Q", "0x1500001", "-s", "4")
        (program.directory / "value").write_text("abcd")
        program.tool("tpm2_nvwrite", "0x1500001", "-i", "value")
        program.tool("tpm2_createprimary", "-Q", "-C", "o", "-G", "rsa2048", "-c", "primary.ctx")
        program.tool("tpm2_evictcontrol", "-Q", "-c", "primary.ctx", "0x81000001")
        program.shut_down()


def check(program: Program, *options: str) -> None:
    with running(program, *STARTED, *options):
        assert program.tool("tpm2_nvread", "0x1500001", "-s", "4") == "abcd"
        ecc = ("-G", "ecc", "-u", "pub", "-r", "priv", "-c", "key.ctx")
        program.tool("tpm2_create", "-Q", "-C", "0x81000001", *ecc)
        program.tool("tpm2_sign", "-Q", "-c", "key.ctx", "-g", "sha256", "-o", "signed", "value")
        program.tool("tpm2_verifysignature", "-Q", "-c", "key.ctx", "-m", "value", "-s", "signed")
        program.shut_down()


@WAYS
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("key", [False, True], ids=["plain", "encrypted"])
def test_a_state_goes_from_one_to_the_other_and_keeps_its_profile(
    profiles: Path, writer: tuple[str, ...], reader: tuple[str, ...], name: str, key: bool
) -> None:
    (profiles / "key").write_text("00112233445566778899aabbccddeeff" * 2)
    options = ("--key", "file=key,mode=aes-256-cbc") if key else ()
    write(Program(profiles, writer), "--profile", f"name={name}", *options)
    for program in (reader, writer):
        check(Program(profiles, program), *options)
    with running(Program(profiles, reader), *STARTED, *options) as tpm:
        assert info(tpm)["Name"] == name
        tpm.shut_down()


@WAYS
def test_a_tpm_goes_on_in_the_other_by_its_volatile_state(
    profiles: Path, writer: tuple[str, ...], reader: tuple[str, ...]
) -> None:
    with running(Program(profiles, writer), *STARTED, "--profile", "name=default-v1") as one:
        one.send(rq.pcr_extend(16, {rq.Alg.SHA256: bytes(range(32))}))
        one.ioctl("-v")
        one.kill()
    with running(Program(profiles, reader), *STARTED) as other:
        pcr = hashlib.sha256(bytes(32) + bytes(range(32))).hexdigest()
        assert pcr in other.tool("tpm2_pcrread", "sha256:16").lower()


@WAYS
def test_a_tpm_migrates_to_the_other(
    tmp_path: Path, writer: tuple[str, ...], reader: tuple[str, ...]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text("00112233445566778899aabbccddeeff")
    options = ("--migration-key", "file=key")
    with running(
        Program(tmp_path / "a", writer), *STARTED, *options, "--profile", "name=default-v1"
    ) as one:
        one.send(rq.pcr_extend(16, {rq.Alg.SHA256: bytes(range(32))}))
        pcr = one.tool("tpm2_pcrread", "sha256:16")
        for kind in ("permanent", "volatile"):
            one.ioctl("--save", kind, f"{tmp_path}/{kind}")
    with running(Program(tmp_path / "b", reader), *options) as other:
        for kind in ("permanent", "volatile"):
            other.ioctl("--load", kind, f"{tmp_path}/{kind}")
        other.ioctl("-i")
        assert other.tool("tpm2_pcrread", "sha256:16") == pcr
        assert info(other)["Name"] == "default-v1"


@pytest.mark.parametrize("older", [OURS_HERE, THEIRS_HERE], ids=["ours", "theirs"])
@BOTH
def test_a_state_of_the_older_library_opens_in_the_newer_and_again_in_the_older(
    profiles: Path, older: tuple[str, ...], command: tuple[str, ...]
) -> None:
    write(Program(profiles, older))
    check(Program(profiles, command))
    with running(Program(profiles, command), *STARTED) as program:
        assert info(program)["Name"] == "null"
        program.shut_down()
    check(Program(profiles, older))


def test_a_state_that_is_damaged_is_refused_by_name_and_stays(profiles: Path) -> None:
    write(Program(profiles, OURS), "--profile", "name=default-v1")
    file = profiles / "state" / "tpm2-00.permall"
    whole = file.read_bytes()
    for spoiled, why in (
        (whole[:16] + whole[16:24] + b"\0" * 40 + whole[64:], "damaged"),
        (whole.replace(b'"StateFormatLevel":7', b'"StateFormatLevel":9'),
         "of profile 'default-v1' (StateFormatLevel 9): it is damaged, or of a newer libtpms"),
        (whole[:22] + b"\0\x7f" + whole[24:], "newer libtpms"),
    ):  # fmt: skip
        file.write_bytes(spoiled)
        said = refused(
            *OURS, "socket", "--tpm2", "--tpmstate", "dir=state", *STARTED,
            "--server", "type=unixio,path=data", cwd=profiles,
        ).splitlines()[-1]  # fmt: skip
        assert said.startswith(f"swtpm: {file}: libtpms 0.10")
        assert why in said
        assert file.read_bytes() == spoiled


# --- setup ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "null"),
        (("--profile-name", "default-v1"), "default-v1"),
        (("--profile-name", "builtin:custom"), "custom"),
        (("--profile-name", "few"), "custom:few"),
        (("--profile-name", "local:few"), "custom:few"),
        (("--profile-file", "few.json"), "custom:few"),
        (("--profile", '{"Name":"custom:y"}', "--profile-remove-disabled", "fips-host"),
         "custom:y"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_setup_makes_a_tpm_of_the_profile_that_swtpm_setup_would_give_it(
    profiles: Path, options: tuple[str, ...], name: str
) -> None:
    (profiles / "conf").write_text(f"local_profiles_dir = {profiles}\n")
    said = []
    for command, directory in ((OUR_SETUP, "ours"), (THEIR_SETUP, "theirs")):
        (profiles / directory).mkdir()
        run(*command, "--tpm2", "--tpmstate", str(profiles / directory), "--config",
            str(profiles / "conf"), "--createek", *options, cwd=profiles)  # fmt: skip
        said.append(json.loads(run(
            *THEIRS, "socket", "--tpm2", "--print-info", "0xa0", "--tpmstate", f"dir={directory}",
            cwd=profiles,
        )))  # fmt: skip
    assert said[0] == said[1]
    assert said[0]["ActiveProfile"]["Name"] == name


def test_setup_takes_the_profile_of_its_configuration_unless_one_is_given(profiles: Path) -> None:
    for text, options, name in (
        (f"profile_file = {profiles}/few.json\n", (), "custom:few"),
        ('profile = {"Name":"default-v1"}\n', (), "default-v1"),
        ('profile = {"Name":"default-v1"}\n', ("--profile-name", "null"), "null"),
    ):
        (profiles / "conf").write_text(text)
        shutil.rmtree(profiles / "state")
        (profiles / "state").mkdir()
        said = run(*OUR_SETUP, "--tpm2", "--tpmstate", "state", "--config", "conf", *options,
                   cwd=profiles)  # fmt: skip
        assert f'Active profile: {{"Name":"{name}",' in said


def test_setup_refuses_a_profile_that_is_none_and_leaves_nothing(profiles: Path) -> None:
    for options, why in (
        (("--profile-name", "nix"), "Could not set profile for TPM2"),
        (("--profile-name", "distro:nix"), "Could not find or access profile 'distro:nix'."),
        (("--profile", "x"), "Could not set profile for TPM2: 'x'"),
        (("--profile-file", "nix"), "Unable to read profile nix"),
        (("--profile", '{"Name":"null"}', "--profile-remove-disabled", "check"), "'custom'"),
    ):
        said = refused(*OUR_SETUP, "--tpm2", "--tpmstate", "state", *options, cwd=profiles)
        assert why in said
        assert not files(profiles / "state")
