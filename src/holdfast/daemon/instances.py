"""What is wrong with vTPMs, and what to do about it: of a running host, or of a registry on disk.

`python -m holdfast.daemon.instances --name NAME` prints what the CLI's `inspect` shows while no
daemon answers.

Not here: what is wrong with the host (`ground`, `doctor`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from holdfast.daemon.config import Config, load
from holdfast.daemon.findings import Finding
from holdfast.errors import Conflict, HoldfastError, HostError, IntegrityError, NotFound
from holdfast.ids import instance_name
from holdfast.instance.lifecycle import State
from holdfast.store.looking import looked_at
from holdfast.store.registry import Instance, Registry

SHOWN_MAX: Final = 100  # findings about vTPMs
REGISTRY: Final = "registry.sqlite"
_LEFT: Final = "it is left as it is, and so is its state"


def row_finding(name: str, why: str) -> Finding:
    """About a row that is no instance."""
    return Finding(
        f"vTPM {name}", "problem",
        f"its row in the registry is damaged ({why}): {_LEFT}; put back a copy of the registry "
        "from before, or recover it",
    )  # fmt: skip


def findings_of(registry: Registry, record: Instance) -> Iterator[Finding]:
    """What is wrong with one vTPM, as far as it can be seen without opening its state."""
    what = f"vTPM {record.name}"
    if record.state == State.FAILED.value:
        yield Finding(
            what, "warning",
            f"it has failed: {record.why_failed or 'for a reason that was not kept'}; its state "
            f"is as it was. When that is mended: holdfast retry {record.name}",
        )  # fmt: skip
    if record.state not in {state.value for state in State}:
        yield Finding(what, "problem", f"it is {record.state[:32]!a}, which is no state: {_LEFT}")
    if record.device or record.state == State.DEFINED.value:
        return  # its state is elsewhere, or there is none yet
    try:
        registry.states.state(record.id)
        registry.keys(record.id)
    except NotFound as error:
        says = f"{error}, though it was made: {_LEFT}; put back a copy from before, or recover it"
        yield Finding(what, "problem", says)
    except HostError as error:
        yield Finding(what, "problem", f"{error}: {_LEFT}")
    except (IntegrityError, ValueError, TypeError) as error:
        yield Finding(what, "problem", f"{error}: {_LEFT}; put it back, or recover it")


def of_disk(config: Config) -> Iterator[Finding]:
    """About all vTPMs of a host on which no daemon runs."""
    path = config.paths.state / REGISTRY
    try:
        with looked_at(path) as registry:
            records, wrong = registry.all()
            found = [row_finding(name, why) for name, why in wrong]
            for record in records:
                found += findings_of(registry, record)
    except NotFound:
        return
    except Conflict as error:
        yield Finding("registry", "problem", str(error))
    except (HoldfastError, OSError) as error:
        yield Finding("registry", "problem", f"{error}; it is left as it is")
    else:
        yield Finding("registry", "ok", f"{len(records)} vTPMs are in it")
        yield from limited(found)


def limited(found: list[Finding]) -> list[Finding]:
    """Not more of them than somebody reads."""
    if len(found) <= SHOWN_MAX:
        return found
    more = Finding("vTPMs", "problem", f"{len(found) - SHOWN_MAX} more have something wrong")
    return [*found[:SHOWN_MAX], more]


def summary(record: Instance) -> dict[str, Any]:
    """What a vTPM is, and what has become of it, as the API gives it."""
    return {
        "name": record.name,
        "id": str(record.id),
        "state": record.state,
        "profile": record.profile,
        "owner": record.owner,
        "created": record.created,
        "run": record.run,
        "restarts": record.restarts,
        "why_failed": record.why_failed,
    }


def settings(record: Instance) -> dict[str, Any]:
    """What a vTPM was made with, as the API gives it."""
    return {
        "banks": list(record.banks),
        "start_policy": record.start_policy,
        "unsafe_unlinked": record.unlinked,
        "ports": record.ports,
        "devices": record.nodes or "fuse",
        "mode": "passthrough" if record.device else "vtpm",
        "tpm": record.device,
    }


def _inspected(config: Config, name: str) -> dict[str, Any]:
    """One vTPM from the disk; NotFound."""
    with looked_at(config.paths.state / REGISTRY) as registry:
        records, wrong = registry.all()
        for other, why in wrong:
            if other == name:
                raise IntegrityError(row_finding(name, why).says)
        record = next((each for each in records if each.name == name), None)
        if record is None:
            raise NotFound(f"there is no vTPM named {name}")
        found = [asdict(finding) for finding in findings_of(registry, record)]
    return {**summary(record), **settings(record), "findings": found, "daemon": False}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--name", required=True)
    options = parser.parse_args(arguments)
    try:
        value = _inspected(load(options.config), instance_name(options.name))
    except (HoldfastError, OSError) as error:
        json.dump({"error": type(error).__name__, "why": str(error)}, sys.stdout)
        return 1
    json.dump(value, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
