"""Setting a host up: once, wholly or not at all, and its secrets leave only encrypted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pyrage
import pytest
from tpm2_pytss.types import TPMS_ATTEST

from holdfast.errors import HostError, IntegrityError, InvalidInput, NotFound
from holdfast.evidence.freshness import GENESIS
from holdfast.hwtpm.anchor import DURABLE_INDEX, HYBRID_INDEX, SECRET_SIZE
from holdfast.hwtpm.host import INDICES, HostTpm
from holdfast.hwtpm.policy import RecoverySigner
from holdfast.hwtpm.session import SPARE
from holdfast.hwtpm.transport import Transport
from holdfast.hwtpm.version import VersionIndex
from holdfast.keeper import recovery, vault
from holdfast.keeper.__main__ import main
from holdfast.keeper.freshness import recovery_message
from holdfast.keeper.provision import CERTIFY_TAG, ROOT_KEY_SIZE
from holdfast.protocol import ipc
from holdfast.tpm2.keys import verify
from holdfast.tpm2.structures import Public, Signature
from tests.asking import until

from .box import PYTHON, Box, Client

RECOVERY = "recovery.age"
ROOT_KEY = "site-root-ca.key.age"


def forget(box: Box) -> None:
    """As before it was provisioned."""
    shutil.rmtree(box.keeper)
    shutil.rmtree(box.out)
    for index in INDICES:
        box.swtpm.tool("tpm2_nvundefine", hex(index))


def indices(box: Box) -> list[int]:
    """All NV indices that the TPM has."""
    shown = box.swtpm.tool("tpm2_getcap", "handles-nv-index").split()
    return sorted(int(word, 16) for word in shown if word.startswith("0x"))


def opened(box: Box) -> bool:
    box.custody().close()
    return True


def test_recovery_key_leaves_encrypted_and_signs_for_this_host(box: Box) -> None:
    key = pyrage.decrypt((box.out / RECOVERY).read_bytes(), [box.identity])
    made = vault.load(box.keeper)
    assert RecoverySigner(key).public.encode() == made.recovery_public
    assert b"PRIVATE KEY" in pyrage.decrypt((box.out / ROOT_KEY).read_bytes(), [box.identity])


def test_no_secret_stays_in_files_others_may_read(box: Box) -> None:
    secret = [path for path in box.out.iterdir() if path.suffix != ".pem"]
    for path in (box.keeper, *box.keeper.iterdir(), *secret):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    key = pyrage.decrypt((box.out / RECOVERY).read_bytes(), [box.identity])
    everything = b"".join(path.read_bytes() for path in box.keeper.iterdir())
    assert key not in everything
    assert key.hex().encode() not in everything
    assert key.hex() not in str(box.summary)


def test_summary_names_the_host_and_admits_the_stand_in(box: Box) -> None:
    made = vault.load(box.keeper)
    assert box.summary["stand_in"] is True
    assert box.summary["host_ak_name"] == Public.decode(made.ak.public).name.hex()
    assert box.summary["host_ek_name"] == Public.decode(made.ek_public).name.hex()
    assert Path(box.summary["site_root_certificate"]).read_bytes().startswith(b"-----BEGIN CERT")


def test_ca_key_is_certified_by_the_host_ak(box: Box) -> None:
    made = vault.load(box.keeper)
    verify(Public.decode(made.ak.public), Signature.decode(made.ca_signature), made.ca_attest)
    attest, _ = TPMS_ATTEST.unmarshal(made.ca_attest)
    assert bytes(attest.attested.certify.name) == Public.decode(made.ca_key.public).name
    assert bytes(attest.extraData) == CERTIFY_TAG


def test_second_provisioning_is_refused_and_changes_nothing(box: Box) -> None:
    before = (box.keeper / vault.FILE).read_bytes()
    recipient = str(box.identity.to_public())
    answer = box.run(
        "provision", "--recovery-recipient", recipient, "--out", str(box.out), ok=False
    )
    assert answer["error"] == "Conflict"
    assert (box.keeper / vault.FILE).read_bytes() == before
    assert opened(box)


def test_files_of_an_earlier_installation_are_not_overwritten(box: Box) -> None:
    shutil.rmtree(box.keeper)
    before = (box.out / RECOVERY).read_bytes()
    recipient = str(box.identity.to_public())
    answer = box.run(
        "provision", "--recovery-recipient", recipient, "--out", str(box.out), ok=False
    )
    assert "only copy" in answer["why"]
    assert (box.out / RECOVERY).read_bytes() == before


def test_provisioning_that_fails_at_the_end_leaves_nothing_behind(box: Box) -> None:
    forget(box)
    box.keeper.write_bytes(b"in the way")  # so the last step, writing the vault, fails
    recipient = str(box.identity.to_public())
    box.run("provision", "--recovery-recipient", recipient, "--out", str(box.out), ok=False)
    assert list(box.out.iterdir()) == []
    box.keeper.unlink()
    box.provision()  # would be refused if the index were still there
    assert opened(box)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "recovery recipient is needed"),
        (["--recovery-recipient", "age1nonsense"], "not an age or ssh public key"),
        (["--recovery-recipient", "/nonexistent"], "nor a file"),
        (["--recovery-recipient", "KEY", "--pcrs", "0,24"], "PCRs 0 to 23"),
        (["--recovery-recipient", "KEY", "--pcrs", "zero"], "not a list of PCRs"),
        (["--recovery-recipient", "KEY", "--site", ""], "site's name"),
        (["--recovery-recipient", "KEY", "--crl", "nowhere"], "revocation list"),
    ],
)
def test_bad_request_is_refused_before_anything_is_made(
    box: Box, arguments: list[str], why: str
) -> None:
    forget(box)
    key = str(box.identity.to_public())
    given = [key if argument == "KEY" else argument for argument in arguments]
    answer = box.run("provision", "--out", str(box.out), *given, ok=False)
    assert answer["error"] == "InvalidInput"
    assert why in answer["why"]
    assert indices(box) == []


def test_recovery_key_is_printed_only_when_asked_for(box: Box) -> None:
    forget(box)
    answer = box.run(
        "provision", "--recovery-recipient", str(box.identity.to_public()),
        "--out", str(box.out), "--print-recovery-key",
    )  # fmt: skip
    key = pyrage.decrypt((box.out / RECOVERY).read_bytes(), [box.identity])
    assert answer["recovery_key_hex"] == key.hex()


@pytest.mark.parametrize("way", ["file", "standard input"])
def test_owner_authorization_comes_from_a_file_or_standard_input(box: Box, way: str) -> None:
    forget(box)
    box.swtpm.tool("tpm2_changeauth", "-c", "owner", "owner's secret")
    to = ("--recovery-recipient", str(box.identity.to_public()), "--out", str(box.out))
    assert "owner hierarchy" in box.run("provision", *to, ok=False)["why"]
    secret = box.directory / "secret"
    secret.write_text("owner's secret\n")
    if way == "file":
        box.run("provision", *to, "--owner-auth", str(secret))
    else:
        box.run("provision", *to, "--owner-auth", "-", given=secret.read_bytes())
    assert opened(box)


def test_owner_authorization_that_is_too_long_is_refused(box: Box) -> None:
    forget(box)
    to = ("--recovery-recipient", str(box.identity.to_public()), "--out", str(box.out))
    answer = box.run("provision", *to, "--owner-auth", "-", given=b"x" * 33, ok=False)
    assert (answer["error"], "at most 32 bytes" in answer["why"]) == ("InvalidInput", True)


def test_interrupted_provisioning_leaves_nothing_behind(
    box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its last step; and once more while it takes back, which changes nothing."""
    forget(box)

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    undefine = VersionIndex.undefine

    def again(index: VersionIndex) -> None:
        interrupt()
        undefine(index)

    monkeypatch.setattr(vault.Vault, "save", interrupt)
    monkeypatch.setattr(VersionIndex, "undefine", again)
    handler = signal.getsignal(signal.SIGINT)
    try:
        status = main([
            "provision", "--dir", str(box.keeper), "--tcti", box.swtpm.tcti, "--out", str(box.out),
            "--recovery-recipient", str(box.identity.to_public()),
        ])  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (status, capsys.readouterr().out) == (130, "")
    assert list(box.out.iterdir()) == []
    assert indices(box) == []


def test_the_durable_chain_begins_with_a_host_that_has_no_vtpm(box: Box) -> None:
    assert indices(box) == sorted(INDICES)
    read = ["tpm2_nvread", "-s", "32", "-o", "value"]
    box.swtpm.tool(*read, hex(DURABLE_INDEX))
    assert (box.directory / "value").read_bytes() == GENESIS.value
    box.swtpm.tool(*read, hex(HYBRID_INDEX), ok=False)  # not written


@pytest.mark.parametrize("there", [INDICES[1:2], INDICES[2:], INDICES])
def test_indices_in_the_way_are_named_and_stay_and_nothing_is_made(
    box: Box, there: tuple[int, ...]
) -> None:
    forget(box)
    for index in there:
        box.swtpm.tool("tpm2_nvdefine", "-s", "8", "-a", "ownerwrite|ownerread", hex(index))
    to = ("--recovery-recipient", str(box.identity.to_public()), "--out", str(box.out))
    answer = box.run("provision", *to, ok=False)
    assert re.findall(r"tpm2_nvundefine (0x\w+)", answer["why"]) == [f"0x{n:08x}" for n in there]
    assert indices(box) == sorted(there)
    assert list(box.out.iterdir()) == []
    for index in there:
        box.swtpm.tool("tpm2_nvundefine", hex(index))
    box.provision()
    assert opened(box)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"AGE-SECRET-KEY-1NONSENSE"])
def test_an_identity_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "identity").write_bytes(content)
    (tmp_path / "recovery.age").write_bytes(b"age")
    with pytest.raises(InvalidInput, match="identity"):
        recovery.read_encrypted(tmp_path / "recovery.age", tmp_path / "identity")


def test_recipient_may_be_an_ssh_key_in_a_file(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    for given in (str(key) + ".pub", (tmp_path / "key.pub").read_text().strip()):
        out = tmp_path / "out"
        out.unlink(missing_ok=True)
        recovery.write_new(out, recovery.encrypt([recovery.recipient(given)], b"secret"))
        assert recovery.read_encrypted(out, key) == b"secret"


def test_recipients_file_with_two_keys_is_refused(tmp_path: Path) -> None:
    keys = [str(pyrage.x25519.Identity.generate().to_public()) for _ in range(2)]
    (tmp_path / "two").write_text("\n".join(keys))
    with pytest.raises(InvalidInput, match="2 public keys"):
        recovery.recipient(str(tmp_path / "two"))


def test_uninitialised_host_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holdfast init"):
        vault.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version_of_file": 1}', b"\xff\xfe"])
def test_damaged_vault_is_an_integrity_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / vault.FILE).write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        vault.load(tmp_path)


# --- boot states ---


def test_root_key_opens_again_after_a_reboot_into_the_same_state(box: Box) -> None:
    box.swtpm.stop()
    box.swtpm.start()
    assert opened(box)


def test_other_boot_state_is_refused_and_the_pcr_named(box: Box) -> None:
    box.swtpm.extend(4)
    with pytest.raises(HostError, match=r"sha256:0,2,4,7, PCR 4 differs.*policy authorize"):
        box.custody()


def test_authorized_boot_state_opens_and_so_does_the_old_one(box: Box) -> None:
    box.swtpm.extend(4)
    answer = box.authorize()
    assert answer == {"approved_pcrs": [0, 2, 4, 7], "version": 1, "retired": False}
    assert opened(box)
    box.swtpm.stop()
    box.swtpm.start()
    assert opened(box)


def test_given_values_are_approved_before_they_are_there(box: Box) -> None:
    box.swtpm.extend(2)
    shown = box.swtpm.tool("tpm2_pcrread", "sha256:0,2,4,7")
    lines = [line.split(":") for line in shown.splitlines() if "0x" in line]
    values = {number.strip(): text.strip().removeprefix("0x") for number, text in lines}
    file = box.directory / "values"
    file.write_text(str(values).replace("'", '"'))
    box.swtpm.stop()
    box.swtpm.start()
    box.authorize("--values", str(file))
    box.swtpm.extend(2)
    assert opened(box)


def test_values_of_other_pcrs_are_approved_only_if_that_is_said(box: Box) -> None:
    """What boots with fewer PCRs known is not to be approved by oversight."""
    file = box.directory / "values"
    file.write_text(f'{{"0": "{bytes(32).hex()}", "2": "{bytes(32).hex()}"}}')
    before = box.vault()
    answer = box.authorize("--values", str(file), ok=False)
    assert answer["error"] == "InvalidInput"
    assert "of PCR 0, 2; what was approved before is of PCR 0, 2, 4, 7" in answer["why"]
    assert box.vault() == before
    assert box.authorize("--values", str(file), "--other-pcrs")["approved_pcrs"] == [0, 2]


def test_a_tpm_without_room_beside_the_keeper_is_named_and_what_to_do(box: Box) -> None:
    """Debian's swtpm has three slots for objects, and no resource manager."""
    box.start()
    with box.connect() as client:
        state = until("the keeper is open", lambda: opened_keeper(client))
    assert state.open
    answer = box.authorize(ok=False)
    assert answer["error"] == "HostError"
    assert "stop holdfast serve first" in answer["why"]
    assert "/dev/tpmrm0" in answer["why"]
    assert box.stop() == 0
    assert box.authorize()["approved_pcrs"] == [0, 2, 4, 7]


def opened_keeper(client: Client) -> ipc.KeeperState | None:
    state = client.ask(ipc.KeeperStatus(), ipc.KeeperState)
    return state if state.open else None


def test_the_recovery_key_signs_a_link_for_a_reason_and_nothing_else(box: Box) -> None:
    key = box.directory / "identity"
    key.write_text(f"{box.identity}\n")
    files = ("--identity", str(key), "--recovery-file", str(box.out / RECOVERY))
    link = GENESIS.encode()

    def sign(what: bytes, ok: bool = True) -> dict[str, Any]:
        command = ["--dir", str(box.keeper), "--link", what.hex(), "--reason", "why", *files]
        done = subprocess.run(
            [*PYTHON, "holdfast.keeper", "sign-recovery", *command],
            capture_output=True,
            check=False,
        )
        assert (done.returncode == 0) is ok, done
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    signature = bytes.fromhex(sign(link)["signature"])
    custody = box.custody()
    try:
        assert custody.signed_for_recovery(recovery_message(link, "why"), signature)
        assert not custody.signed_for_recovery(recovery_message(link, "another"), signature)
    finally:
        custody.close()
    assert "no link" in sign(link[:-1], ok=False)["why"]
    other = recovery.encrypt([box.identity.to_public()], os.urandom(32))
    (box.out / RECOVERY).write_bytes(other)
    assert "not this host's recovery key" in sign(link, ok=False)["why"]


def test_retired_boot_state_is_refused_even_with_its_old_approval_put_back(box: Box) -> None:
    old = (box.keeper / vault.FILE).read_bytes()
    box.swtpm.extend(4)
    assert box.authorize("--retire")["version"] == 2
    assert opened(box)
    box.swtpm.stop()
    box.swtpm.start()
    with pytest.raises(HostError, match="PCR 4 differs"):
        box.custody()
    (box.keeper / vault.FILE).write_bytes(old)
    with pytest.raises(HostError, match="retired"):
        box.custody()


def test_an_approval_by_a_file_of_before_others_were_retired_counts(box: Box) -> None:
    """As where an administrator put back an older copy: an approval that is none would be worse."""
    old = (box.keeper / vault.FILE).read_bytes()
    assert box.authorize("--retire")["version"] == 2
    (box.keeper / vault.FILE).write_bytes(old)
    with pytest.raises(HostError, match="retired"):
        box.custody()
    assert box.authorize()["version"] == 2
    assert opened(box)


def test_authorizing_needs_the_right_recovery_key(box: Box) -> None:
    other = recovery.encrypt([box.identity.to_public()], os.urandom(32))
    (box.out / RECOVERY).write_bytes(other)
    answer = box.authorize(ok=False)
    assert answer["error"] == "InvalidInput"
    assert "not this host's recovery key" in answer["why"]


def test_authorizing_needs_the_identity_that_opens_it(box: Box) -> None:
    box.identity = pyrage.x25519.Identity.generate()
    answer = box.authorize(ok=False)
    assert "does not open" in answer["why"]
    assert "AGE-SECRET-KEY" not in str(answer)


# --- a host that was initialised before there was an anchor ---


def without_anchor(box: Box) -> bytes:
    """Make the host such a one; its root key."""
    made = vault.load(box.keeper)
    context = box.swtpm.context()
    tpm = HostTpm(context)
    tpm.open_primary(made.unique, made.primary_auth)
    tpm.index.open(made.index_name)
    tpm.approve(Public.decode(made.recovery_public), made.approvals[0])
    room = bytearray(ROOT_KEY_SIZE + SECRET_SIZE + SPARE)
    assert tpm.unseal(made.root_key, room) == ROOT_KEY_SIZE + SECRET_SIZE
    key = bytes(room[:ROOT_KEY_SIZE])
    blob = tpm.create_root_key(Public.decode(made.recovery_public).name, key)
    context.close()
    for index in INDICES[1:]:
        box.swtpm.tool("tpm2_nvundefine", hex(index))
    file = box.keeper / vault.FILE
    told = json.loads(file.read_bytes())
    told["version_of_file"] = 1
    told["root_key"] = {name: part.hex() for name, part in vars(blob).items()}
    for name in ("writer_name", "durable_name", "hybrid_name"):
        del told[name]
    file.write_text(json.dumps(told))
    return key


def test_a_host_without_an_anchor_says_what_to_do_and_is_left_as_it_is(box: Box) -> None:
    without_anchor(box)
    before = (box.keeper / vault.FILE).read_bytes()
    with pytest.raises(HostError, match="before freshness was kept: run holdfast policy authorize"):
        box.custody()
    assert (box.keeper / vault.FILE).read_bytes() == before


@pytest.mark.parametrize("changed", [False, True], ids=["same boot state", "another"])
@pytest.mark.parametrize("arguments", [(), ("--retire",)], ids=["kept", "retired"])
def test_authorizing_gives_a_host_its_anchor_and_keeps_its_root_key(
    box: Box, arguments: tuple[str, ...], *, changed: bool
) -> None:
    key = without_anchor(box)
    if changed:
        box.swtpm.extend(4)
    box.authorize(*arguments)
    custody = box.custody()
    assert bytes(custody._root.sealed[:ROOT_KEY_SIZE]) == key
    custody.close()
    assert indices(box) == sorted(INDICES)
    before = vault.load(box.keeper)
    box.authorize()  # again, and the anchor stays the same
    after = vault.load(box.keeper)
    assert (after.root_key, after.writer_name) == (before.root_key, before.writer_name)
    assert opened(box)


def test_authorizing_that_cannot_save_takes_the_anchor_back(box: Box) -> None:
    without_anchor(box)
    before = (box.keeper / vault.FILE).read_bytes()
    (box.keeper / f"{vault.FILE}.new").mkdir()  # in the way of saving
    assert box.authorize(ok=False)["error"] == "IsADirectoryError"
    assert indices(box) == [INDICES[0]]
    assert (box.keeper / vault.FILE).read_bytes() == before
    (box.keeper / f"{vault.FILE}.new").rmdir()
    box.authorize()
    assert opened(box)


def test_authorizing_names_what_one_that_was_killed_has_left(box: Box) -> None:
    without_anchor(box)
    left = INDICES[1:3]
    for index in left:
        box.swtpm.tool("tpm2_nvdefine", "-s", "8", "-a", "ownerwrite|ownerread", hex(index))
    answer = box.authorize(ok=False)
    assert re.findall(r"tpm2_nvundefine (0x\w+)", answer["why"]) == [f"0x{n:08x}" for n in left]


def test_an_anchor_that_was_removed_is_named(box: Box) -> None:
    box.swtpm.tool("tpm2_nvundefine", hex(DURABLE_INDEX))
    with pytest.raises(HostError, match="durable chain's index 0x01804848 is not in this host TPM"):
        box.custody()


def test_cleared_tpm_is_recognised(box: Box) -> None:
    box.swtpm.tool("tpm2_clear")
    with pytest.raises(HostError, match="cleared or replaced"):
        box.custody()


def test_custody_that_fails_leaves_the_tpm_empty(box: Box) -> None:
    box.swtpm.extend(0)
    for _ in range(5):  # the TPM has three slots
        with pytest.raises(HostError, match="PCR 0 differs"):
            box.custody()
    assert Transport(box.swtpm.tcti).bounded
    assert box.swtpm.tool("tpm2_getcap", "handles-transient").strip() == ""
