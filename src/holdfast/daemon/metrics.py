"""What is counted, for Prometheus (`GET /metrics`) and `status`: one table, read when asked.

Who counts keeps a plain integer; nothing here is called in anybody's way. No name of a vTPM, user
or container is in it, so that anyone may read it. Names do not change once released.

Not here: what is wrong (`doctor`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from holdfast import __version__
from holdfast.daemon.doctor import by_state
from holdfast.daemon.host import Host
from holdfast.instance.counts import BOUNDS, Times

KEPT_SECONDS: Final = 0.25  # for callers who are not root: to add up costs the daemon time


class Kind(Enum):
    """What Prometheus makes of a number."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass
class Seen:
    """What is read: the host, and what its API has counted."""

    host: Host
    calls: dict[str, int]
    refusals: dict[str, int]


@dataclass(frozen=True)
class Row:
    """One metric; with a `label`, one number for each of its values. `short` is `status`' name."""

    name: str
    kind: Kind
    help: str
    read: Callable[[Seen], float | Mapping[str, float] | Times]
    label: str = ""
    short: str = ""


def _awake(seen: Seen) -> int:
    return sum(vtpm.worker_alive for vtpm in seen.host.all())


def _left(seen: Seen) -> int:
    used, allowed = seen.host.committer.durable_writes()
    return max(0, allowed - used)


TABLE: Final = (
    Row("holdfast_info", Kind.GAUGE, "1, with the version", lambda _: {__version__: 1}, "version"),
    Row("holdfast_vtpms", Kind.GAUGE, "vTPMs by state", lambda s: by_state(s.host), "state"),
    Row("holdfast_vtpms_awake", Kind.GAUGE, "vTPMs with a worker", _awake, short="awake"),
    Row(
        "holdfast_vtpms_asleep", Kind.GAUGE, "vTPMs that are on, and sleep",
        lambda s: s.host.counts.asleep, short="asleep",
    ),
    Row(
        "holdfast_commits", Kind.COUNTER, "States made durable",
        lambda s: s.host.committer.commits, short="commits",
    ),
    Row(
        "holdfast_commit_groups", Kind.COUNTER, "Groups in which they were",
        lambda s: s.host.committer.groups, short="groups",
    ),
    Row(
        "holdfast_store_syncs", Kind.COUNTER, "Times that the disk was waited for",
        lambda s: s.host.registry.database.syncs, short="syncs",
    ),
    Row(
        "holdfast_commits_unanchored", Kind.GAUGE,
        "Commits that a power cut could take back unseen: the durable chain does not have them",
        lambda s: s.host.committer.unanchored, short="unanchored",
    ),
    Row(
        "holdfast_durable_anchors_used", Kind.GAUGE,
        "Durable writes to the host TPM in the last day",
        lambda s: s.host.committer.durable_writes()[0], short="anchors_used",
    ),
    Row(
        "holdfast_durable_anchors_left", Kind.GAUGE, "Durable writes that the day's budget allows",
        _left, short="anchors_left",
    ),
    Row(
        "holdfast_durable_anchor_owed", Kind.GAUGE, "1 if one is put off for want of budget",
        lambda s: int(s.host.committer.anchor_owed),
    ),
    Row(
        "holdfast_boots_unclean", Kind.GAUGE,
        "Boots of the host before which not all was put in order",
        lambda s: s.host.committer.anchor.unclean,
    ),
    Row(
        "holdfast_recoveries", Kind.GAUGE, "Times that an administrator had older states accepted",
        lambda s: s.host.committer.anchor.recoveries,
    ),
    Row(
        "holdfast_sleeps", Kind.COUNTER, "Times that a vTPM went to sleep",
        lambda s: s.host.counts.sleeps, short="sleeps",
    ),
    Row(
        "holdfast_wake_seconds", Kind.HISTOGRAM,
        "Wakes, from a client's first byte to the first answer",
        lambda s: s.host.counts.wakes, short="wakes",
    ),
    Row(
        "holdfast_worker_restarts", Kind.COUNTER, "Workers put in the place of one that died",
        lambda s: s.host.counts.restarts, short="restarts",
    ),
    Row(
        "holdfast_api_calls", Kind.COUNTER, "API calls that changed something",
        lambda s: s.calls, "what",
    ),
    Row(
        "holdfast_refusals", Kind.COUNTER, "API calls that were refused",
        lambda s: s.refusals, "error", "refusals",
    ),
)  # fmt: skip


def store_of(host: Host) -> dict[str, Any]:
    """What `status` shows of the store."""
    committer = host.committer
    used, allowed = committer.durable_writes()
    return {
        "durability": host.config.store.durability.value,
        "commits": committer.commits,
        "groups": committer.groups,
        "syncs": host.registry.database.syncs,
        "unanchored": committer.unanchored,
        "durable_anchors": {"used": used, "left": max(0, allowed - used)},
    }


class Metrics:
    """The table, of one host."""

    def __init__(self, host: Host) -> None:
        self._seen = Seen(host, {}, {})
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._kept = -KEPT_SECONDS, b""

    def called(self, what: str) -> None:
        """Count a call that changed something."""
        self._seen.calls[what] = self._seen.calls.get(what, 0) + 1

    def refused(self, error: Exception) -> None:
        """Count a call that was refused, by the error's name."""
        name = type(error).__name__
        self._seen.refusals[name] = self._seen.refusals.get(name, 0) + 1

    def text(self, *, fresh: bool) -> bytes:
        """What Prometheus reads; unless it is to be `fresh`, as it was a moment ago."""
        at, text = self._kept
        now = time.monotonic()
        if fresh or now - at >= KEPT_SECONDS:
            text = generate_latest(self._registry)
            self._kept = now, text
        return text

    def short(self) -> dict[str, int]:
        """What `status` shows."""
        return {row.short: _sum(row.read(self._seen)) for row in TABLE if row.short}

    # --- as prometheus_client asks ---

    def describe(self) -> list[Metric]:
        return []  # names are read from `collect`

    def collect(self) -> Iterator[Metric]:
        for row in TABLE:
            yield _metric(row, row.read(self._seen))


def _sum(value: float | Mapping[str, float] | Times) -> int:
    if isinstance(value, Times):
        return value.count
    return int(sum(value.values()) if isinstance(value, Mapping) else value)


def _metric(row: Row, value: float | Mapping[str, float] | Times) -> Metric:
    if isinstance(value, Times):
        return HistogramMetricFamily(row.name, row.help, _buckets(value), value.total)
    family: Any = GaugeMetricFamily if row.kind is Kind.GAUGE else CounterMetricFamily
    if not isinstance(value, Mapping):
        found: Metric = family(row.name, row.help, value)
        return found
    labelled: Metric = family(row.name, row.help, labels=[row.label])
    for label, number in value.items():
        labelled.add_metric([label], number)  # type: ignore[attr-defined]
    return labelled


def _buckets(times: Times) -> list[tuple[str, float]]:
    bounds = [*(f"{bound}" for bound in BOUNDS), "+Inf"]
    return list(zip(bounds, map(float, accumulate(times.counts)), strict=True))
