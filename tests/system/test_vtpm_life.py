"""A vTPM's life with real processes: made, powered on, used, killed, powered off, on again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from holdfast.errors import Conflict, HoldfastError, IntegrityError
from holdfast.ids import InstanceName
from holdfast.instance.committer import REFUSED_SECONDS
from holdfast.linux import channel
from holdfast.protocol import ipc
from holdfast.protocol import lifecycle as lc
from holdfast.store.states import SealedState
from holdfast.tpm2.algorithms import Alg

from .conftest import Box
from .running import a_vtpm, make_run

Runner = Callable[[Callable[[], Awaitable[None]]], None]


async def tool(place: Path, *command: str, device: str = "tpmrm0") -> str:
    environment = {**os.environ, "TPM2TOOLS_TCTI": f"device:{place}/dev/{device}"}
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0, out.decode()
    return out.decode()


def test_tools_work_over_device_and_socket(box: Box, tmp_path: Path, run: Runner) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            place = tmp_path / "place"
            await vtpm.power_on(make_run())
            assert len(await tool(place, "tpm2_getrandom", "--hex", "8")) == 16
            assert len(await tool(place, "tpm2_getrandom", "--hex", "8", device="tpm0")) == 16
            out = await tool(place, "tpm2_pcrread", "sha256:0,13")
            for pcr in (0, 13):
                assert vtpm.ledger[Alg.SHA256][pcr].hex().upper() in out
            work = tmp_path / "w"
            work.mkdir()
            await tool(place, "tpm2_createprimary", "-C", "o", "-c", f"{work}/p", "-Q")
            await tool(
                place, "tpm2_create", "-C", f"{work}/p", "-u", f"{work}/u", "-r", f"{work}/r", "-Q"
            )
            await tool(
                place, "tpm2_load", "-C", f"{work}/p", "-u", f"{work}/u", "-r", f"{work}/r",
                "-c", f"{work}/k", "-Q",
            )  # fmt: skip
            assert await tool(place, "tpm2_getcap", "handles-transient") == ""

    run(body)


def test_certificates_are_in_nv_and_chain_to_the_site(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            await vtpm.power_on(make_run())
            place = tmp_path / "place"
            for index in ("0x1c00002", "0x1c0000a"):
                await tool(place, "tpm2_nvread", "-C", "o", "-o", f"{tmp_path}/c", index)
                certificate = x509.load_der_x509_certificate((tmp_path / "c").read_bytes())
                name = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0]
                assert name.value == f"web:{vtpm.record.id}"
            (tmp_path / "ek.der").write_bytes((tmp_path / "c").read_bytes())
            await tool(place, "tpm2_nvread", "-C", "o", "-o", f"{tmp_path}/chain", "0x1c00100")
            chain = (tmp_path / "chain").read_bytes()
            assert chain.startswith(b"\x30\x82")

    run(body)


def test_a_killed_worker_is_replaced_and_the_open_device_goes_on(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            place = tmp_path / "place"
            await vtpm.power_on(make_run())
            before = await tool(place, "tpm2_pcrread", "sha256:0,11,13,15")
            device = os.open(place / "dev" / "tpmrm0", os.O_RDWR)
            command = bytes.fromhex("80010000000c0000017b0008")
            assert os.write(device, command) == 12
            assert len(os.read(device, 4096)) == 20
            worker = vtpm._worker
            assert worker is not None
            held, _ = await vtpm._around.spawner.ask(lc.ListHeld(), lc.HeldList)
            pid = next(e.pid for e in held.entries if e.instance == vtpm.record.id)
            os.kill(pid, signal.SIGKILL)
            for _ in range(200):
                await asyncio.sleep(0.02)
                if vtpm.worker_alive and vtpm._worker is not worker:
                    break

            def again() -> bytes:
                os.write(device, command)
                return os.read(device, 4096)

            assert len(await asyncio.to_thread(again)) == 20
            os.close(device)
            assert vtpm.record.restarts == 1
            assert await tool(place, "tpm2_pcrread", "sha256:0,11,13,15") == before

    run(body)


def test_nv_survives_power_cycles_and_a_container_cannot_write_host_pcrs(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            place = tmp_path / "place"
            await vtpm.power_on(make_run())
            (tmp_path / "data").write_bytes(b"kept")
            await tool(place, "tpm2_nvdefine", "0x1500001", "-s", "4", "-Q")
            await tool(place, "tpm2_nvwrite", "0x1500001", "-i", f"{tmp_path}/data")
            with pytest.raises(AssertionError, match=r"0x907|locality"):
                await tool(place, "tpm2_pcrextend", "13:sha256=" + "00" * 32)
            await vtpm.power_off()
            await vtpm.power_on(make_run())
            out = await tool(place, "tpm2_nvread", "0x1500001")
            assert "kept" in out

    run(body)


def test_a_second_power_on_is_refused(box: Box, tmp_path: Path, run: Runner) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            await vtpm.power_on(make_run())
            with pytest.raises(Conflict):
                await vtpm.power_on(make_run())

    run(body)


def test_an_older_state_does_not_open(box: Box, tmp_path: Path, run: Runner) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            await vtpm.power_on(make_run())
            around = vtpm._around
            older = around.registry.states.state(vtpm.record.id)
            await vtpm.power_off()
            newest = around.registry.states.state(vtpm.record.id)

            def put(state: SealedState, told: bytes) -> None:
                row = (state.epoch, state.sealed, told, str(vtpm.record.id))
                with around.registry.database.durable() as db:
                    db.execute("UPDATE states SET epoch=?, sealed=?, leaf=? WHERE id=?", row)

            leaf = around.committer.leaf(vtpm.record.id)
            assert leaf is not None
            digest = hashlib.sha256(older.sealed).digest()
            for told, why in (
                (leaf, "is not the one that was written last"),
                (replace(leaf, epoch=older.epoch, digest=digest), "not the newest"),
            ):
                put(older, told.encode())
                with pytest.raises(IntegrityError, match=why):
                    await vtpm.power_on(make_run())
            around.committer.suspect()
            with pytest.raises(IntegrityError, match="older than this boot"):
                await vtpm.power_on(make_run())
            put(newest, leaf.encode())
            await asyncio.sleep(REFUSED_SECONDS)
            await vtpm.power_on(make_run())

    run(body)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": InstanceName("mallory")},
        {"owner": 65534},
        {"unlinked": True},
        {"profile": "plain"},
        {"start_policy": {"any": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_does_not_open_for_another_name_owner_or_policy(
    box: Box, tmp_path: Path, run: Runner, changes: dict[str, object]
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            own = vtpm.record
            vtpm.record = replace(own, **changes)  # type: ignore[arg-type]
            with pytest.raises(HoldfastError, match="does not open"):
                await vtpm.power_on(make_run())
            vtpm.record = own
            await vtpm.power_on(make_run())

    run(body)


def test_the_control_socket_gives_a_container_only_what_is_its(
    box: Box, tmp_path: Path, run: Runner
) -> None:
    async def body() -> None:
        async with a_vtpm(box, tmp_path) as vtpm:
            await vtpm.power_on(make_run())
            path = str(tmp_path / "place" / "run" / "tpm.sock.ctrl")

            def ask(request: bytes) -> bytes:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(5)
                    sock.connect(path)
                    sock.send(request)
                    return sock.recv(4096)

            async def asked(text: str) -> str:
                return (await asyncio.to_thread(ask, bytes.fromhex(text))).hex()

            assert await asked("0000000500") == "00000000"
            assert await asked("0000000503") == "0000003d"
            for refused in (
                "00000002" + "00000000",
                "00000006",
                "000000ff",
            ):
                assert await asked(refused) == "0000000a"
            # Its errors have the whole header: so swtpm's drivers read it.
            assert await asked("0000000c" + "00" * 12) == "0000000a" + "00" * 12

    run(body)


def test_a_keeper_that_was_replaced_knows_who_lives(box: Box, tmp_path: Path, run: Runner) -> None:
    """A data key is given out once while its worker lives, whatever happens to the keeper."""

    async def body() -> None:
        async with a_vtpm(box, tmp_path / "one") as one, a_vtpm(box, tmp_path / "two") as two:
            await one.power_on(make_run())
            box.processes["keeper"].kill()
            box.processes.pop("keeper").wait()
            box.start("keeper")
            await two.power_on(make_run())  # the spawner meets the new keeper here
            left, right = channel.pair()
            pidfd = os.pidfd_open(os.getpid())
            with left, right:
                message = ipc.Lease(one.record.id)
                with pytest.raises(Conflict, match="living worker"):
                    await one._around.keeper.ask(message, ipc.Done, (right.fileno(), pidfd))
            os.close(pidfd)

    run(body)
