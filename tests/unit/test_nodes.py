"""A container's device nodes: what its configuration gets, what is measured of it, who answers.

Real devices are made in the lab (lab/test_host.py): the kernel of this machine may have none.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.daemon.reservations import Reservations
from holdfast.daemon.starting import check_nodes
from holdfast.daemon.wanted import wanted
from holdfast.errors import Conflict, DecodeError, HostError, InvalidInput
from holdfast.frontend import nodes, page
from holdfast.frontend.bundle import with_vtpm
from holdfast.frontend.cdi import container_edits
from holdfast.frontend.nodes import Asked, NodeKind, Nodes, Number
from holdfast.frontend.page import PROXY_COMMAND, SharedPage
from holdfast.frontend.proxy import SET_LOCALITY, ProxyConnection, locality_answer
from holdfast.frontend.sockets import GONE, IDLE, SERVED
from holdfast.ids import instance_name
from holdfast.linux import cgroup
from holdfast.measure.config import config_facts
from holdfast.protocol import fuse
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import Rc

WEB = instance_name("web")
HOST, HOOK = Path("/run/holdfast/web"), Path("/usr/bin/holdfast-hook")
NUMBERS = (Number(253, 7), Number(253, 65543))
CONFIG: dict[str, Any] = {
    "process": {"args": ["sh"]},
    "root": {"path": "rootfs"},
    "linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}},
}


def bundle(numbers: tuple[Number, ...]) -> dict[str, Any]:
    return with_vtpm(CONFIG, container_edits(WEB, HOST, HOOK, (), numbers))


# --- what a container is given ---


def test_a_container_gets_nodes_instead_of_files_and_leave_to_use_them() -> None:
    edits = container_edits(WEB, HOST, HOOK, (), NUMBERS)
    assert [mount["containerPath"] for mount in edits["mounts"]] == ["/run/vtpm"]
    assert [(node["path"], node["major"], node["minor"]) for node in edits["deviceNodes"]] == [
        ("/dev/tpm0", 253, 7),
        ("/dev/tpmrm0", 253, 65543),
    ]
    config = bundle(NUMBERS)
    assert [device["path"] for device in config["linux"]["devices"]] == ["/dev/tpm0", "/dev/tpmrm0"]
    first, *rules = config["linux"]["resources"]["devices"]
    assert first == {"allow": False, "access": "rwm"}
    assert rules == [
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rw"}
        for major, minor in NUMBERS
    ]
    assert "deviceNodes" not in container_edits(WEB, HOST, HOOK)


@pytest.mark.parametrize("linux", [[], {"devices": {}}, {"resources": []}, {"devices": [1]}])
def test_a_bundle_whose_devices_are_none_is_refused(linux: Any) -> None:
    with pytest.raises(InvalidInput):
        with_vtpm({**CONFIG, "linux": linux}, container_edits(WEB, HOST, HOOK, (), NUMBERS))


def test_a_bundle_that_has_such_a_device_already_is_refused() -> None:
    with pytest.raises(Conflict, match="/dev/tpm0"):
        with_vtpm(bundle(NUMBERS) | {"mounts": [], "hooks": {}},
                  container_edits(WEB, HOST, HOOK, (), NUMBERS))  # fmt: skip


# --- what is measured ---


def digest(numbers: tuple[Number, ...], ours: tuple[Number, ...]) -> bytes:
    return config_facts(json.dumps(bundle(numbers)).encode(), "c1", ours).normalised_digest


def test_numbers_that_the_kernel_made_up_are_not_measured() -> None:
    other = (Number(240, 0), Number(241, 0))
    assert digest(NUMBERS, NUMBERS) == digest(other, other)


def test_a_device_that_is_not_the_vtpms_is_measured_as_it_is() -> None:
    other = (Number(10, 224), Number(253, 65536))
    assert len({digest(NUMBERS, NUMBERS), digest(other, NUMBERS), digest(NUMBERS, ())}) == 3
    swapped = (NUMBERS[1], NUMBERS[0])
    assert digest(swapped, NUMBERS) != digest(NUMBERS, NUMBERS)


def test_no_configuration_stands_for_another_by_our_words() -> None:
    config = {**CONFIG, "annotations": {"a": "{vtpm-device}"}}
    with pytest.raises(InvalidInput, match="stands for itself"):
        config_facts(json.dumps(config).encode(), "c1", NUMBERS)


@pytest.mark.parametrize("where", ["devices", "resources"])
@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(("minor", value) for value in (True, "7", [], {}, "{}")),
        ("major", False), ("type", ["c"]), ("allow", 1), ("access", True), ("path", 7),
        ("Minor", 7), ("Access", "rwm"), ("ALLOW", True),
    ],
)  # fmt: skip
def test_a_device_of_another_shape_is_refused(where: str, part: str, value: Any) -> None:
    """crun takes a number that is none for any: `"minor": true` would be every device."""
    device = {"type": "c", "major": 1, "minor": 1, part: value}
    linux = {"devices": [device]} if where == "devices" else {"resources": {"devices": [device]}}
    with pytest.raises(DecodeError, match="a device"):
        config_facts(json.dumps({**CONFIG, "linux": linux}).encode(), "c1", (Number(1, 1),))


def test_a_rule_for_any_device_is_measured_as_it_is() -> None:
    for part in ({}, {"major": None}, {"major": 253}):
        rule = {"allow": True, "type": "c", "access": "rw", **part}
        config = {**CONFIG, "linux": {"resources": {"devices": [rule]}}}
        facts = config_facts(json.dumps(config).encode(), "c1", NUMBERS)
        assert b"{vtpm-device}" not in facts.normalised


# --- numbers that are still in use ---


def test_a_number_is_taken_until_its_container_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives a free number to the next device: an old container would have that TPM."""
    group = tmp_path / "group"
    (group / "below").mkdir(parents=True)
    monkeypatch.setattr(cgroup, "of_devices", lambda pid: group)
    (group / "cgroup.procs").write_text("")
    (group / "below" / "cgroup.procs").write_text("4711\n")
    reservations = Reservations(tmp_path / "nodes")
    assert reservations.taken() == frozenset()
    reservations.reserve(NUMBERS, 4711)
    assert reservations.taken() == Reservations(tmp_path / "nodes").taken() == set(NUMBERS)
    (group / "below" / "cgroup.procs").write_text("")
    assert reservations.taken() == frozenset()
    assert list((tmp_path / "nodes").iterdir()) == []
    # By version 2, which says so itself.
    reservations.reserve(NUMBERS, 4711)
    (group / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert reservations.taken() == set(NUMBERS)
    (group / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    assert reservations.taken() == frozenset()


def test_a_device_that_is_kept_answers_without_power_and_goes_with_its_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / "cgroup.procs").write_text("4711\n")
    monkeypatch.setattr(cgroup, "of_devices", lambda pid: group)

    async def scene() -> None:
        kernel, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kernel.setblocking(False)
        loop = asyncio.get_running_loop()
        with kernel:
            reservations = Reservations(tmp_path / "nodes")
            reservations.reserve(NUMBERS, 4711)
            made = Nodes(NodeKind.VTPM_PROXY, (server.detach(),), (), NUMBERS[:1])
            reservations.keep(made)
            await loop.sock_sendall(kernel, rq.get_random(8))
            assert await loop.sock_recv(kernel, 100) == rq.error_response(Rc.INITIALIZE)
            assert reservations.taken() == set(NUMBERS)
            (group / "cgroup.procs").write_text("")
            assert reservations.taken() == frozenset()
            assert await loop.sock_recv(kernel, 100) == b""  # it is closed

    asyncio.run(scene())


def test_of_another_boot_or_a_group_that_is_gone_nothing_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "of_devices", lambda pid: tmp_path / "gone")
    reservations = Reservations(tmp_path / "nodes")
    reservations.reserve(NUMBERS, 1)
    assert reservations.taken() == frozenset()
    (tmp_path / "cgroup.procs").write_text("1\n")
    monkeypatch.setattr(cgroup, "of_devices", lambda pid: tmp_path)
    reservations.reserve(NUMBERS, 1)
    (file,) = (tmp_path / "nodes").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot": "another"}))
    assert reservations.taken() == frozenset()


def test_a_container_in_everybodys_group_gets_no_nodes(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="--devices fuse"):
        Reservations(tmp_path / "nodes").reserve(NUMBERS, 2)  # a kernel thread's is the root


def test_the_kernel_s_numbers_are_asked_for_until_one_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(range(1, 100))

    def new_device() -> nodes.vtpm_proxy.ProxyDevice:
        number = next(asked)
        return nodes.vtpm_proxy.ProxyDevice(os.open("/dev/null", os.O_RDWR), number, 253, number)

    monkeypatch.setattr(nodes.vtpm_proxy, "new_device", new_device)
    taken = frozenset((Number(253, 1), Number(253, 65537), Number(253, 2), Number(253, 65538)))
    made, surplus = nodes.make(NodeKind.VTPM_PROXY, "web", taken)
    assert made.given == (Number(253, 3),)
    assert [each.given for each in surplus] == [(Number(253, 1),), (Number(253, 2),)]
    for each in surplus:
        each.close()
    made.close()
    # One that never is, is not asked for for ever.
    monkeypatch.setattr(
        nodes.vtpm_proxy, "new_device",
        lambda: nodes.vtpm_proxy.ProxyDevice(os.open("/dev/null", os.O_RDWR), 1, 253, 1),
    )  # fmt: skip
    with pytest.raises(HostError, match="not in use"):
        nodes.make(NodeKind.VTPM_PROXY, "web", taken)


def test_a_runtime_that_puts_another_device_there_starts_nothing(tmp_path: Path) -> None:
    """For a container in a user namespace runc binds the host's /dev/tpm0."""
    (tmp_path / "dev").mkdir()
    for device in nodes.DEVICES:
        (tmp_path / "dev" / device).touch()
    process = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(Conflict, match="--devices fuse"):
            check_nodes(process, str(tmp_path), NUMBERS)
        check_nodes(process, str(tmp_path), ())
        real = os.stat("/dev/null").st_rdev
        null = Number(os.major(real), os.minor(real))
        for device in nodes.DEVICES:
            (tmp_path / "dev" / device).unlink()
            (tmp_path / "dev" / device).symlink_to("/dev/null")
        with pytest.raises(Conflict):
            check_nodes(process, str(tmp_path), NUMBERS)
        check_nodes(process, str(tmp_path), (null, null))
    finally:
        os.close(process)


# --- what is asked for ---


def test_what_the_kernel_has_is_chosen_and_what_it_has_not_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy, cuse = tmp_path / "vtpmx", tmp_path / "cuse"
    monkeypatch.setattr(nodes.vtpm_proxy, "DEVICE", str(proxy))
    monkeypatch.setattr(nodes, "CUSE", str(cuse))
    assert nodes.chosen(Asked.AUTO) is nodes.chosen(Asked.FUSE) is NodeKind.NONE
    with pytest.raises(InvalidInput, match="modprobe tpm_vtpm_proxy"):
        nodes.chosen(Asked.VTPM_PROXY)
    with pytest.raises(InvalidInput, match="modprobe cuse"):
        nodes.chosen(Asked.CUSE)
    cuse.touch()
    assert nodes.chosen(Asked.AUTO) is nodes.chosen(Asked.CUSE) is NodeKind.CUSE
    proxy.touch()
    assert nodes.chosen(Asked.AUTO) is nodes.chosen(Asked.VTPM_PROXY) is NodeKind.VTPM_PROXY
    assert nodes.chosen(Asked.CUSE) is NodeKind.CUSE
    assert nodes.chosen(Asked.FUSE) is NodeKind.NONE


def test_devices_are_a_containers() -> None:
    assert wanted({"name": "web"}).nodes == "auto"
    assert wanted({"name": "web", "devices": "fuse"}).nodes == "fuse"
    assert wanted({"name": "web", "profile": "plain"}).nodes == ""
    for body in ({"devices": "usb"}, {"devices": "fuse", "profile": "plain"}):
        with pytest.raises(InvalidInput, match="devices are"):
            wanted({"name": "web", **body})


def test_nodes_that_are_not_made_yet_have_no_numbers() -> None:
    assert nodes.numbers(Nodes()) == ()
    made = Nodes(NodeKind.VTPM_PROXY, (), ("tpm/tpm4711", "tpmrm/tpmrm4711"))
    assert nodes.numbers_yet(made) is None
    with pytest.raises(HostError, match="no device node by vtpm-proxy"):
        nodes.numbers(made)


# --- CUSE ---


def cuse_init(opcode: int = 4096, body: bytes = struct.pack("=IIII", 7, 31, 0, 1)) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, 2, 0, 0, 0, 0, 0, 0) + body


def test_a_cuse_device_is_named_and_takes_whole_commands() -> None:
    answer = fuse.cuse_init_reply(cuse_init(), "holdfast!web!tpm0")
    assert struct.unpack_from("=IiQ", answer) == (len(answer), 0, 2)
    major, minor, _, _, most_read, most_write, *numbers = struct.unpack_from("=8I", answer, 16)
    assert (major, minor, most_read, most_write, numbers) == (7, 31, 4096, 4096, [0, 0])
    assert answer.endswith(b"DEVNAME=holdfast!web!tpm0\0")


@pytest.mark.parametrize(
    "data",
    [b"", cuse_init(26), cuse_init(body=b"\7"), cuse_init(body=struct.pack("=IIII", 8, 0, 0, 0))],
)
def test_another_request_does_not_begin_a_cuse_device(data: bytes) -> None:
    with pytest.raises(DecodeError):
        fuse.cuse_init_reply(data, "x")


# --- vtpm_proxy ---


@pytest.fixture
def driver() -> Iterator[tuple[socket.socket, ProxyConnection, SharedPage]]:
    """The kernel's end, which gives a command with each read and waits, as packets do."""
    kernel, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = page.create()
    shared = SharedPage(fd)
    os.close(fd)
    with kernel:
        connection = ProxyConnection(lambda command: command[::-1], shared, server.detach())
        yield kernel, connection, shared
        connection.close()
        shared.close()


def test_a_driver_s_commands_are_answered_one_by_one(
    driver: tuple[socket.socket, ProxyConnection, SharedPage],
) -> None:
    kernel, connection, shared = driver
    assert connection.readable() == IDLE  # and has not waited
    kernel.send(rq.get_random(8))
    kernel.send(rq.get_random(9))
    assert connection.readable() == SERVED
    assert kernel.recv(4096) == rq.get_random(8)[::-1]
    assert connection.readable() == SERVED
    assert shared.in_flight == 0
    kernel.close()
    assert connection.readable() == GONE


def test_a_driver_that_has_waited_long_enough_is_served_again(
    driver: tuple[socket.socket, ProxyConnection, SharedPage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vtpm_proxy answers EIO to an answer that comes when it has sent its next command."""
    kernel, connection, shared = driver
    kernel.send(rq.get_random(8))
    write = os.write

    def late(_fd: int, _data: bytes) -> int:
        raise OSError(errno.EIO, "the driver has gone on")

    monkeypatch.setattr(os, "write", late)
    assert connection.readable() == SERVED
    monkeypatch.setattr(os, "write", write)
    assert shared.in_flight == 0
    kernel.send(rq.get_random(9))
    assert connection.readable() == SERVED
    assert kernel.recv(4096) == rq.get_random(9)[::-1]


def test_no_locality_but_0_is_granted_in_band() -> None:
    head = b"\x80\x01" + (11).to_bytes(4, "big") + SET_LOCALITY
    assert locality_answer(head + b"\0") == rq.error_response(Rc.SUCCESS)
    for rest in (*(bytes((n,)) for n in range(1, 256)), b"", b"\0\0", b"\0\1"):
        assert locality_answer(head + rest) == rq.error_response(Rc.LOCALITY)
    assert locality_answer(rq.get_random(8)) is None
    assert locality_answer(b"\x80") is None


def test_a_command_that_a_dead_worker_took_is_answered_to_the_driver(
    driver: tuple[socket.socket, ProxyConnection, SharedPage],
) -> None:
    kernel, connection, shared = driver
    device, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with device, other:
        shared.in_flight = PROXY_COMMAND
        shared.fail_in_flight(device.fileno(), NodeKind.VTPM_PROXY, (connection.fd,))
        assert kernel.recv(100) == rq.error_response(Rc.CANCELED)
        assert shared.in_flight == 0
        shared.in_flight = 42  # FUSE's own
        shared.fail_in_flight(device.fileno(), NodeKind.VTPM_PROXY, (connection.fd,))
        assert other.recv(100) == fuse.error(42, 5)
        kernel.setblocking(False)
        with pytest.raises(BlockingIOError):
            kernel.recv(100)
