"""A guest that is a host of containers: Holdfast installed in it, with QEMU's TPM as its TPM.

To the guest that TPM is hardware: its kernel's driver at /dev/tpmrm0, its firmware's and its
kernel's logs, and a maker's certificate of its endorsement key.
"""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path
from typing import Any

from . import payload
from .guest import Guest

MODULES = ("fuse", "cuse", "tpm_vtpm_proxy", "overlay")
RUN = "/run/hf"
SOCKET = f"{RUN}/run/api.sock"
CONFIG = f"""
[paths]
state = "{RUN}/state"
run = "{RUN}/run"
cdi = "{RUN}/cdi"
[keeper]
user = "root"
"""
INIT_SECONDS = 120.0
START = f"""
setsid holdfast serve --config {RUN}/holdfast.toml >> {RUN}/log 2>&1 < /dev/null &
"""
ANSWERS = f"""
for turn in $(seq 400); do
  [ -S {SOCKET} ] && holdfast status > /dev/null 2>&1 && exit 0  # a program is dear here
  sleep 0.5
done
cat {RUN}/log; exit 1
"""


class ContainerHost:
    """`guest`, prepared; with `start` it serves."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def run(self, script: str, *, check: bool = True, seconds: float = 120.0) -> str:
        told = f"export HOLDFAST_CONFIG={RUN}/holdfast.toml HOLDFAST_SOCKET={SOCKET}\n"
        return self.guest.run(told + script, check=check, seconds=seconds)

    def prepare(self, recipient: str) -> dict[str, Any]:
        """Mount, load, initialise; what `holdfast init` said."""
        self.guest.run(payload.MOUNT)
        for module in MODULES:
            self.guest.run(f"modprobe {module}")
        self.guest.run(
            f"mkdir -p {RUN}/state /run/bundles && mount -t cgroup2 none /sys/fs/cgroup && "
            f"cat > {RUN}/holdfast.toml <<'END'\n{CONFIG}\nEND"
        )
        said = self.run(
            f"holdfast init --recovery-recipient {recipient} --out {RUN}/out --json",
            seconds=INIT_SECONDS,
        )
        value = json.loads(said)
        assert isinstance(value, dict)
        return value

    def start(self) -> None:
        self.run(START)
        self.answers()

    def stop(self) -> None:
        """End the service, in order."""
        self.run(
            "for p in /proc/[0-9]*; do grep -q holdfast.daemon.supervisor $p/cmdline 2>/dev/null "
            "&& kill ${p#/proc/} && pid=${p#/proc/}; done; "
            "for turn in $(seq 200); do [ -d /proc/$pid ] || exit 0; sleep 0.2; done; exit 1"
        )

    def answers(self) -> None:
        """Wait until the daemon does."""
        self.run(ANSWERS, seconds=240)

    def read(self, path: str) -> bytes:
        return base64.b64decode(self.guest.run(f"base64 {path}"))

    def state(self, name: str) -> dict[str, Any]:
        value = json.loads(self.run(f"holdfast inspect {name}"))
        assert isinstance(value, dict)
        return value

    def bundle(self, vtpm: str, name: str = "", **sections: Any) -> str:
        """A bundle with that vTPM, whose container sleeps; its directory in the guest."""
        place = f"/run/bundles/{name or vtpm}"
        change = f"""
import json
path = "{place}/config.json"
config = json.load(open(path))
config["process"]["terminal"] = False
config["process"].pop("rlimits", None)
config["process"]["args"] = ["sleep", "900"]
config["root"]["readonly"] = False
for name, value in json.loads({json.dumps(json.dumps(sections))}).items():
    config[name] = {{**config.get(name, {{}}), **value}}
json.dump(config, open(path, "w"))
"""
        self.run(
            f"rm -rf {place} && mkdir -p {place} && cp -a /mnt/holdfast/rootfs {place}/ && "
            f"cd {place} && runc spec && python3 -c {shlex.quote(change)} && "
            f"holdfast cdi {vtpm} --bundle {place}"
        )
        return place

    def begin(self, container: str, place: str, *, check: bool = True) -> str:
        """Start the bundle's container, mostly by its vTPM's name; what runc said."""
        return self.run(
            f"runc --root /run/runc run -d -b {place} {container} < /dev/null > {place}/out 2>&1; "
            f"status=$?; cat {place}/out; exit $status",
            check=check,
        )

    def inside(self, container: str, script: str, *, check: bool = True) -> str:
        return self.run(
            f"runc --root /run/runc exec {container} sh -c {shlex.quote(script)}", check=check
        )

    def end(self, vtpm: str) -> None:
        """End its container, and wait until the vTPM is off."""
        self.run(
            f"runc --root /run/runc delete -f {vtpm}; for turn in $(seq 60); do "
            f"holdfast ls | grep -q '^{vtpm}[[:space:]]*off' && exit 0; sleep 0.5; done; exit 1"
        )

    def worker(self) -> int:
        """The one worker that serves clients: it has more open than those that wait."""
        found = self.guest.run(
            'for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = holdfast-worker ] && '
            "[ $(ls $p/fd | wc -l) -gt 7 ] && echo ${p#/proc/}; done; true"
        )
        (pid,) = found.split()
        return int(pid)


def write(guest: Guest, path: str, source: Path | str) -> None:
    """A file of ours in the guest."""
    data = source.encode() if isinstance(source, str) else source.read_bytes()
    guest.run(f"echo {base64.b64encode(data).decode()} | base64 -d > {path}")
