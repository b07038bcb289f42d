"""The keeper as a running, sandboxed process: leases, data keys, and peers that misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from holdfast.errors import HostError
from holdfast.evidence.round import round_extra_data
from holdfast.hwtpm.anchor import Chain
from holdfast.hwtpm.transport import PATIENCE
from holdfast.keeper.service import PEERS_MAX
from holdfast.linux import channel
from holdfast.protocol import ipc
from holdfast.tpm2.keys import verify
from holdfast.tpm2.structures import (
    Attest,
    NvAttest,
    NvCertified,
    NvPublic,
    Public,
    Signature,
)
from tests.asking import until

from .box import NOBODY, Box, Client, Guest, Worker

INSTANCE = UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
OTHER = UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
needs_root = pytest.mark.needs_root
pytestmark = needs_root  # peers must be root, and the keeper gives up being it


@pytest.fixture
def keeper(box: Box) -> Box:
    box.start()
    return box


def is_open(client: Client) -> bool:
    return client.ask(ipc.KeeperStatus(), ipc.KeeperState).open


def new_key(client: Client, instance: UUID) -> ipc.KeyGrant:
    with Worker() as worker:
        worker.lease(client, instance, ipc.Done)
        return worker.key(b"", ipc.KeyGrant)


# --- leases and data keys ---


def test_data_key_is_the_same_for_the_next_worker(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as second:
        first = new_key(client, INSTANCE)
        second.lease(client, INSTANCE, ipc.Done)
        assert second.key(first.wrapped, ipc.KeyGrant) == first
        assert len(first.data_key) == 32
        assert first.data_key not in first.wrapped


def test_every_new_data_key_is_another(keeper: Box) -> None:
    with keeper.connect() as client:
        keys = [new_key(client, INSTANCE) for _ in range(3)]
    assert len({key.data_key for key in keys}) == 3


def test_data_key_of_another_instance_is_refused(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as worker:
        first = new_key(client, INSTANCE)
        worker.lease(client, OTHER, ipc.Done)
        assert worker.key(first.wrapped, ipc.Refused).error == "IntegrityError"


@pytest.mark.parametrize("change", [lambda w: w[:-1], lambda w: b"x" * len(w), lambda w: w[:5]])
def test_damaged_data_key_is_refused(keeper: Box, change: object) -> None:
    assert callable(change)
    with keeper.connect() as client, Worker() as worker:
        first = new_key(client, INSTANCE)
        worker.lease(client, INSTANCE, ipc.Done)
        assert worker.key(change(first.wrapped), ipc.Refused).error == "IntegrityError"


def test_second_lease_is_refused_until_the_first_process_has_ended(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as first, Worker() as second:
        first.lease(client, INSTANCE, ipc.Done)
        assert second.lease(client, INSTANCE, ipc.Refused).error == "Conflict"
        first.end()
        second.lease(client, INSTANCE, ipc.Done)


def test_key_channel_answers_once_and_is_closed(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as worker:
        worker.lease(client, INSTANCE, ipc.Done)
        worker.keepers.close()
        worker.key(b"", ipc.KeyGrant)
        assert channel.receive(worker.keys) == (b"", [])


def test_key_channel_is_closed_when_its_worker_ends(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as worker:
        worker.lease(client, INSTANCE, ipc.Done)
        worker.keepers.close()
        worker.end()
        worker.keys.settimeout(20)
        assert channel.receive(worker.keys) == (b"", [])


def test_worker_that_sends_garbage_gets_no_key_and_keeps_its_lease(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as worker, Worker() as second:
        worker.lease(client, INSTANCE, ipc.Done)
        worker.keepers.close()
        worker.keys.settimeout(20)
        channel.send(worker.keys, b"\0\x0agarbage")
        assert channel.receive(worker.keys) == (b"", [])
        assert second.lease(client, INSTANCE, ipc.Refused).error == "Conflict"
        assert is_open(client)


def test_lease_whose_descriptors_are_wrong_is_refused(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as worker, Path("/etc/passwd").open("rb") as file:
        lease = ipc.Lease(INSTANCE)
        right = (worker.keepers.fileno(), worker.pidfd)
        for fds in ((), right[:1], (*right, *right), (file.fileno(), worker.pidfd),
                    (worker.keepers.fileno(), file.fileno())):  # fmt: skip
            assert client.ask(lease, ipc.Refused, fds).error == "ProtocolError"
        client.ask(lease, ipc.Done, right)


def test_keeper_keeps_no_descriptor_of_a_refused_or_ended_lease(keeper: Box) -> None:
    assert keeper.process is not None
    descriptors = Path(f"/proc/{keeper.process.pid}/fd")
    with keeper.connect() as client:
        is_open(client)
        before = len(list(descriptors.iterdir()))
        for _ in range(20):
            new_key(client, INSTANCE)
            with Worker() as worker:
                client.ask(ipc.Lease(INSTANCE), ipc.Refused, (worker.pidfd,))
                client.ask(ipc.KeeperStatus(), ipc.KeeperState, (worker.pidfd, worker.pidfd))
        until("descriptors are closed", lambda: len(list(descriptors.iterdir())) == before)


def test_killed_keeper_starts_again_and_opens_the_same_data_key(keeper: Box) -> None:
    with keeper.connect() as client:
        first = new_key(client, INSTANCE)
    keeper.stop(signal.SIGKILL)
    keeper.start()
    with keeper.connect() as client, Worker() as worker:
        worker.lease(client, INSTANCE, ipc.Done)
        assert worker.key(first.wrapped, ipc.KeyGrant) == first


def test_terminated_keeper_ends_well_and_leaves_the_tpm_empty(keeper: Box) -> None:
    with keeper.connect() as client:
        assert is_open(client)
    assert keeper.stop() == 0
    assert keeper.swtpm.tool("tpm2_getcap", "handles-transient").strip() == ""


# --- enrolment ---


def test_enrolment_ends_in_certificates(keeper: Box, guest: Guest) -> None:
    with keeper.connect() as client:
        for _ in range(3):
            challenge = client.ask(guest.keys(), ipc.EnrolChallenge)
            client.ask(guest.activate(challenge), ipc.Done)
            certified = [client.ask(wish, ipc.Certified) for wish in guest.wishes()]
            assert len({each.certificate for each in certified}) == 3
            assert len(certified[0].chain) == 2


def test_wrong_proof_ends_the_enrolment(keeper: Box, guest: Guest) -> None:
    with keeper.connect() as client:
        proof = guest.activate(client.ask(guest.keys(), ipc.EnrolChallenge))
        wrong = ipc.EnrolProof(guest.id, bytes(32))
        assert client.ask(wrong, ipc.Refused).error == "IntegrityError"
        assert client.ask(proof, ipc.Refused).error == "NotFound"
        assert client.ask(guest.wishes()[0], ipc.Refused).error == "NotFound"


def test_nothing_is_certified_before_the_proof(keeper: Box, guest: Guest) -> None:
    with keeper.connect() as client:
        assert client.ask(guest.wishes()[2], ipc.Refused).error == "NotFound"
        client.ask(guest.keys(), ipc.EnrolChallenge)
        for wish in guest.wishes():
            assert client.ask(wish, ipc.Refused).error == "NotFound"


def test_each_key_is_certified_once_and_all_under_one_name(keeper: Box, guest: Guest) -> None:
    with keeper.connect() as client:
        proof = guest.activate(client.ask(guest.keys(), ipc.EnrolChallenge))
        client.ask(proof, ipc.Done)
        assert client.ask(proof, ipc.Refused).error == "NotFound"
        rsa, ecc, ak = guest.wishes()
        client.ask(ak, ipc.Certified)
        assert client.ask(ak, ipc.Refused).error == "Conflict"
        assert client.ask(guest.wishes("db")[0], ipc.Refused).error == "Conflict"
        client.ask(rsa, ipc.Certified)
        assert client.ask(rsa, ipc.Refused).error == "Conflict"
        client.ask(ecc, ipc.Certified)
        assert client.ask(ecc, ipc.Refused).error == "NotFound"  # it is over


def test_keys_that_do_not_follow_the_templates_are_refused(keeper: Box, guest: Guest) -> None:
    ecc, ak, rsa = guest.ek_ecc.encode(), guest.ak.encode(), guest.ek_rsa.encode()
    attributes = slice(4, 8)
    unrestricted = ak[:5] + bytes((ak[5] & ~1,)) + ak[6:]
    small = rsa[:-256] + bytes(192) + rsa[-64:]  # 2048 bits by its fields, 512 by its modulus
    assert unrestricted[attributes] != ak[attributes]
    with keeper.connect() as client:
        for changed in ((rsa, ak), (ecc, ecc), (ecc, unrestricted), (ecc[:-1], ak), (b"", ak)):
            refused = client.ask(ipc.EnrolKeys(uuid4(), *changed), ipc.Refused)
            assert refused.error in ("InvalidInput", "DecodeError")
        client.ask(guest.activate(client.ask(guest.keys(), ipc.EnrolChallenge)), ipc.Done)
        for public in (unrestricted, small, rsa[:-1], b""):
            refused = client.ask(ipc.Certify(guest.id, "web", public), ipc.Refused)
            assert refused.error in ("InvalidInput", "DecodeError")
        bad_name = ipc.Certify(guest.id, "no good\n", rsa)
        assert client.ask(bad_name, ipc.Refused).error == "InvalidInput"


# --- the host TPM ---


def test_identity_pcrs_and_quotes_are_answered(keeper: Box) -> None:
    with keeper.connect() as client:
        state = client.ask(ipc.KeeperStatus(), ipc.KeeperState)
        assert state.open
        assert state.stand_in
        assert "SW" in state.tpm
        identity = client.ask(ipc.HostIdentityRequest(), ipc.HostIdentity)
        assert identity.ca_attest
        assert identity.root_certificate
        pcrs = client.ask(ipc.HostPcrs(), ipc.HostPcrValues).pcrs
        assert len([value for value in pcrs if value.alg == 0x0B]) == 24
        refused = client.ask(ipc.RoundQuote(1, bytes(32)), ipc.Refused)
        assert (refused.error, "no daemon has shown" in refused.why) == ("Conflict", True)
        keeper.commit(client)
        client.ask(ipc.RoundQuote(1, bytes(32)), ipc.HostQuote)
        for bad in (ipc.RoundQuote(0, bytes(32)), ipc.RoundQuote(1, bytes(31))):
            assert client.ask(bad, ipc.Refused).error == "InvalidInput"


def test_a_round_s_quote_and_the_value_of_the_chain_are_signed_for_it_by_one_ak(
    keeper: Box,
) -> None:
    with keeper.connect() as client:
        ak = Public.decode(client.ask(ipc.HostIdentityRequest(), ipc.HostIdentity).ak_public)
        for _ in range(2):
            link = keeper.commit(client)
            said = client.ask(ipc.RoundQuote(3, bytes(32)), ipc.HostQuote)
            quote, certified = Attest.decode(said.attest), NvAttest.decode(said.anchor_attest)
            verify(ak, Signature.decode(said.signature), said.attest)
            verify(ak, Signature.decode(said.anchor_signature), said.anchor_attest)
            assert quote.extra_data == certified.extra_data == round_extra_data(3, bytes(32))
            index = NvPublic.decode(said.anchor_public)
            assert certified.attested == NvCertified(index.name, 0, link.value)
            boot = quote.clock_info.reset_count << 32 | quote.clock_info.restart_count
            assert boot == link.anchor.boot


def test_a_chain_that_holds_something_else_is_not_certified(box: Box) -> None:
    custody = box.custody()
    try:
        custody.chains.extend(Chain.HYBRID, bytes(32))
        value = hashlib.sha256(bytes(64)).digest()
        assert custody.quote_round(1, bytes(32), value).anchor_attest.endswith(value)
        with pytest.raises(HostError, match="does not hold"):
            custody.quote_round(1, bytes(32), bytes(32))
    finally:
        custody.close()


def test_keeper_without_its_tpm_serves_the_reason_and_opens_when_it_is_back(box: Box) -> None:
    box.swtpm.stop()
    box.start()
    with box.connect() as client, Worker() as worker:
        state = client.ask(ipc.KeeperStatus(), ipc.KeeperState)
        assert not state.open
        assert str(box.swtpm.socket) in state.why_not
        worker.lease(client, INSTANCE, ipc.Done)
        assert worker.key(b"", ipc.Refused).error == "HostError"
        box.swtpm.start()
        until("the keeper is open", lambda: is_open(client))


def test_tpm_that_is_reset_midway_costs_one_answer(keeper: Box) -> None:
    with keeper.connect() as client:
        first = new_key(client, INSTANCE)
        keeper.swtpm.stop()
        assert client.ask(ipc.HostPcrs(), ipc.Refused).error == "HostError"
        keeper.swtpm.start()
        until("the keeper is open", lambda: is_open(client))
        keeper.commit(client)
        client.ask(ipc.RoundQuote(1, bytes(32)), ipc.HostQuote)
        keeper.swtpm.stop()
        keeper.swtpm.start()  # reset, unseen: what was loaded is gone
        assert client.ask(ipc.RoundQuote(1, bytes(32)), ipc.Refused).error == "HostError"
        until("the keeper is open", lambda: is_open(client))  # it may have noticed by itself
        keeper.commit(client)
        client.ask(ipc.RoundQuote(1, bytes(32)), ipc.HostQuote)
        with Worker() as worker:
            ends = (worker.keepers.fileno(), worker.pidfd)
            client.ask(ipc.Lease(INSTANCE), ipc.Done, ends)
            assert worker.key(first.wrapped, ipc.KeyGrant) == first


def test_tpm_that_does_not_answer_is_refused_in_time(keeper: Box) -> None:
    with keeper.connect() as client:
        assert is_open(client)
        keeper.commit(client)
        assert keeper.swtpm.process is not None
        keeper.swtpm.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        refused = client.ask(ipc.RoundQuote(1, bytes(32)), ipc.Refused)
        assert refused.error == "HostError"
        assert "did not answer in time" in refused.why
        assert not is_open(client)
        assert time.monotonic() - started < 3 * PATIENCE
        keeper.swtpm.process.send_signal(signal.SIGCONT)
        until("the keeper is open", lambda: is_open(client), 30)


def test_other_boot_state_is_refused_until_it_is_authorized(keeper: Box) -> None:
    keeper.stop()
    keeper.swtpm.extend(7)
    keeper.start()
    with keeper.connect() as client:
        state = client.ask(ipc.KeeperStatus(), ipc.KeeperState)
        assert "PCR 7 differs" in state.why_not
        assert client.ask(ipc.HostPcrs(), ipc.Refused).error == "HostError"
        keeper.authorize()
        until("the keeper is open", lambda: is_open(client), 30)


# --- peers that misbehave ---


def test_garbage_costs_its_sender_the_connection_and_nobody_else(keeper: Box) -> None:
    chosen = random.Random(20)
    with keeper.connect() as good:
        for _ in range(40):
            with keeper.connect() as bad:
                channel.send(bad.sock, chosen.randbytes(chosen.randrange(1, 200)))
                with contextlib.suppress(ConnectionResetError):
                    assert channel.receive(bad.sock)[0] == b""
        assert is_open(good)
    assert "disconnected" in keeper.log


@pytest.mark.parametrize(
    "message", [ipc.Done(), ipc.KeyRequest(b""), ipc.KeyGrant(b"", b"", 0, b"")]
)
def test_message_for_somebody_else_ends_the_connection(keeper: Box, message: ipc.Message) -> None:
    with keeper.connect() as client:
        channel.send(client.sock, message.encode())
        assert channel.receive(client.sock)[0] == b""


def test_peer_that_does_not_read_does_not_stop_the_others(keeper: Box) -> None:
    with keeper.connect() as silent, keeper.connect() as good:
        silent.sock.settimeout(0.2)
        request = ipc.HostPcrs().encode()
        with pytest.raises(OSError):  # noqa: PT012 - at some point, which one is the kernel's
            for _ in range(10_000):
                channel.send(silent.sock, request)
        assert is_open(good)


def test_number_of_peers_is_bounded(keeper: Box) -> None:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(keeper.connect()) for _ in range(PEERS_MAX)]
        assert all(is_open(peer) for peer in peers)
        assert not _admitted(keeper)
        peers[0].sock.close()
        until("somebody is admitted", lambda: _admitted(keeper))


def _admitted(keeper: Box) -> bool:
    with keeper.connect() as client:
        try:
            channel.send(client.sock, ipc.KeeperStatus().encode())
            return channel.receive(client.sock)[0] != b""
        except OSError:
            return False


def test_peer_that_is_not_root_is_turned_away(keeper: Box) -> None:
    keeper.socket.chmod(0o666)
    code = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"s.connect({str(keeper.socket)!r})\n"
        "try:\n    s.send(bytes((0, 30)))\n    sys.exit(len(s.recv(100)))\n"
        "except (BrokenPipeError, ConnectionResetError):\n    sys.exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == 0
    until("the log says it", lambda: f"of user {NOBODY} turned away" in keeper.log)


# --- the box it is in ---


def test_running_keeper_has_given_everything_up(keeper: Box) -> None:
    assert keeper.process is not None
    with keeper.connect() as client:
        assert is_open(client)
    proc = Path(f"/proc/{keeper.process.pid}")
    lines = (line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    status = {name: value.split() for name, value in lines}
    assert status["Seccomp"] == ["2"]
    assert status["NoNewPrivs"] == ["1"]
    assert status["Uid"] == [str(NOBODY)] * 4
    assert status["Gid"] == [str(NOBODY)] * 4
    assert status["Groups"] == []
    assert status["CapEff"] == ["0" * 16]
    assert status["CapPrm"] == ["0" * 16]
    assert int(status["VmLck"][0]) > 0
    assert os.readlink(proc / "ns/net") != os.readlink("/proc/self/ns/net")
    limits = (proc / "limits").read_text()
    assert any(
        line.startswith("Max core file size") and " 0 " in line for line in limits.split("\n")
    )
    assert keeper.socket.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "attempt",
    [
        "os.execv('/bin/true', ['true'])",
        "os.fork()",
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
        "ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
        "ctypes.CDLL(None).unshare(0x10000000)",
    ],
)
def test_process_in_the_keepers_box_dies_of(attempt: str) -> None:
    code = (
        "import ctypes, mmap, os, socket\n"
        "from holdfast.sandbox import keeper\n"
        f"keeper.enter({NOBODY}, {NOBODY})\n"
        "socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).close()\n"  # this it may
        "os.write(1, b'in')\n"
        f"{attempt}\n"
        "os.write(1, b'out')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=60
    )
    assert (done.stdout, done.returncode) == (b"in", -signal.SIGSYS), done.stderr


def test_keeper_refuses_a_way_to_the_tpm_that_it_would_lose(box: Box) -> None:
    answer = box.run(
        "serve", "--tcti", "cmd:cat", "--socket", str(box.socket), *box.user(), ok=False
    )
    assert answer["error"] == "InvalidInput"
    assert not box.socket.exists()
