"""Numbers of a host that runs are those of what was done to it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import NvAttr, Rh
from tests.asking import connect, exchange, rc, until

from .serve import Serve, a_host

INDEX = 0x01500040
NV = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.NO_DA


def numbers(api: Path) -> dict[str, float]:
    with connect(api) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, text = data.partition(b"\r\n\r\n")
    assert b"Content-Type: text/plain; version=" in head
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def worker_of(host: Serve) -> int:
    return until("a worker serves it", host.workers)[0]


def test_commits_workers_and_refusals_are_counted() -> None:
    with a_host() as host:
        host.create("web")
        host.power_on("web")
        before = numbers(host.api)
        assert before["holdfast_vtpms active"] == before["holdfast_vtpms_awake"] == 1
        assert before["holdfast_api_calls_total create"] == 1
        with connect(host.place("web") / "run" / "tpm.sock") as sock:
            assert rc(exchange(sock, rq.nv_define_space(Rh.OWNER, INDEX, NV, 8))) == 0
            for number in range(5):
                write = rq.nv_write(Rh.OWNER, INDEX, bytes([number]) * 8, 0)
                assert rc(exchange(sock, write)) == 0
        after = numbers(host.api)
        for name in ("commits", "commit_groups", "store_syncs"):
            grown = after[f"holdfast_{name}_total"] - before[f"holdfast_{name}_total"]
            assert grown >= 6, name
        used, left = after["holdfast_durable_anchors_used"], after["holdfast_durable_anchors_left"]
        assert used >= 1
        assert used + left == 50
        assert after["holdfast_durable_anchors_used"] == before["holdfast_durable_anchors_used"]
        assert after["holdfast_commits_unanchored"] >= before["holdfast_commits_unanchored"] + 6

        os.kill(worker_of(host), signal.SIGKILL)
        until(
            "the worker is replaced",
            lambda: numbers(host.api)["holdfast_worker_restarts_total"] == 1,
        )
        done = host.cli("create", "web")
        assert done.returncode == 4
        counts = host.call("GET", "/v1/status")["counts"]
        assert (counts["restarts"], counts["refusals"]) == (1, 1)
        shown = host.cli("status").stdout
        assert "1 active (1 awake, 0 asleep)" in shown
        assert "1 workers replaced, 1 calls refused" in shown
        assert "durable anchors: " in shown
