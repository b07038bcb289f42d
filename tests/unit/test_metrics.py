"""What is counted can be read by Prometheus, under the names that the page has."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from holdfast.daemon.config import Config, Paths
from holdfast.daemon.host import Host
from holdfast.daemon.metrics import TABLE, Kind, Metrics
from holdfast.errors import Conflict, NotFound
from holdfast.instance.counts import BOUNDS, Times

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    paths = Paths(state=tmp_path, run=tmp_path / "run", cdi=tmp_path / "cdi")
    made = Host(Config(paths=paths), lambda *_: None, lambda _: None)
    yield made
    asyncio.run(made.stop())


def samples(metrics: Metrics, *, fresh: bool = True) -> dict[str, float]:
    """What Prometheus' own parser reads, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(metrics.text(fresh=fresh).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_the_page_has_the_names_there_are() -> None:
    section = PAGE.partition("## Metrics")[2].partition("\n## ")[0]
    documented = dict(re.findall(r"^\| `(holdfast_\w+)(?:\{\w+\})?` \| (\w+) \|", section, re.M))
    suffix = {Kind.COUNTER: "_total"}
    assert documented == {row.name + suffix.get(row.kind, ""): row.kind.value for row in TABLE}


def test_prometheus_reads_every_metric(host: Host) -> None:
    metrics = Metrics(host)
    metrics.called("create")
    metrics.called("create")
    metrics.refused(Conflict("x"))
    metrics.refused(NotFound("x"))
    host.counts.restarts += 3
    host.counts.asleep += 2
    for seconds in (0.0005, 0.003, 0.003, 99.0):
        host.counts.wakes.note(seconds)
    found = samples(metrics)
    assert found["holdfast_api_calls_total{what=create}"] == 2
    assert found["holdfast_refusals_total{error=Conflict}"] == 1
    assert found["holdfast_worker_restarts_total"] == 3
    assert found["holdfast_vtpms_asleep"] == 2
    assert found["holdfast_vtpms_awake"] == 0
    assert found["holdfast_commits_total"] == 0
    assert found["holdfast_durable_anchors_left"] == 50
    assert found["holdfast_wake_seconds_bucket{le=0.001}"] == 1
    assert found["holdfast_wake_seconds_bucket{le=0.005}"] == 3
    assert found["holdfast_wake_seconds_bucket{le=10.0}"] == 3
    assert found["holdfast_wake_seconds_bucket{le=+Inf}"] == 4
    assert found["holdfast_wake_seconds_count"] == 4
    assert found["holdfast_wake_seconds_sum"] == pytest.approx(99.0065)
    assert all(name.startswith("holdfast_") for name in found)


def test_status_has_the_same_numbers_added_up(host: Host) -> None:
    metrics = Metrics(host)
    metrics.refused(Conflict("x"))
    metrics.refused(NotFound("x"))
    host.counts.wakes.note(1.0)
    short = metrics.short()
    assert (short["refusals"], short["wakes"], short["anchors_left"]) == (2, 1, 50)


def test_who_is_not_root_is_shown_what_was_added_up_a_moment_ago(host: Host) -> None:
    metrics = Metrics(host)
    before = metrics.text(fresh=False)
    host.counts.restarts += 1
    assert metrics.text(fresh=False) == before
    assert metrics.text(fresh=True) != before


def test_a_time_is_counted_at_the_first_bound_that_it_does_not_pass() -> None:
    times = Times()
    for bound in BOUNDS:
        times.note(bound)
    assert times.counts == [1] * len(BOUNDS) + [0]
    times.note(BOUNDS[-1] + 1)
    assert (times.counts[-1], times.count) == (1, len(BOUNDS) + 1)
