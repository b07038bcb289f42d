"""A Linux guest in QEMU by software emulation: firmware, Debian's kernel, a TPM of a program's.

The guest's first program reads shell commands from a serial line and writes back what they print,
so a test drives it as it drives a program. Its root file system is read-only; what it writes is in
memory. Nothing of the machine it runs on is used: no KVM, no network.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "lab"
OVMF = Path("/usr/share/OVMF")
BOOT_SECONDS = 240.0
COMMAND_SECONDS = 120.0
MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc none /proc; $b mount -t sysfs none /sys; $b mount -t devtmpfs none /dev
for module in $($b cat /modules); do $b insmod /$module || echo "no $module" >/dev/console; done
$b mount -o ro -t ext4 /dev/vda /root || echo "no root" > /dev/console
for place in proc sys dev; do $b mount --move /$place /root/$place; done
for place in tmp run var/tmp var/lib etc/lab lab mnt opt; do
  [ -d /root/$place ] && $b mount -t tmpfs none /root/$place
done
$b cp /agent /root/lab/agent
exec $b switch_root /root /bin/sh /lab/agent
"""
AGENT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/run LANG=C.UTF-8
mount -t securityfs none /sys/kernel/security
ip link set lo up
exec < /dev/ttyS1 > /dev/ttyS1 2> /dev/console
stty raw -echo
echo READY
while read -r line; do
  printf %s "$line" | base64 -d > /run/.command
  sh /run/.command > /run/.out 2>&1 < /dev/null
  status=$?
  echo "BEGIN $status"
  base64 -w 1000 /run/.out
  echo END
done
"""


class GuestError(AssertionError):
    """The guest did not do what it was asked for; with what its console said."""


def kernel_directory() -> Path:
    (found,) = CACHE.glob("linux-image-*/boot")
    return found.parent


def root_image() -> Path:
    (found,) = CACHE.glob("root-*.ext4")
    return found


def initrd(work: Path) -> Path:
    """An archive with busybox and the modules that lead to the root file system."""
    place = work / "initrd.d"
    for name in ("bin", "proc", "sys", "dev", "root"):
        (place / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, place / "bin" / "busybox")
    modules = _with_dependencies(MODULES)
    for module in modules:
        shutil.copy(module, place / module.name)
    (place / "modules").write_text("".join(f"{module.name}\n" for module in modules))
    for name, text in (("init", INIT), ("agent", AGENT)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    for name in names:
        os.utime(place / name, (0, 0))
    archive = subprocess.run(
        [busybox, "cpio", "-o", "-H", "newc"], cwd=place,
        input="".join(f"{name}\n" for name in names).encode(), check=True, capture_output=True,
    ).stdout  # fmt: skip
    made = work / "initrd"
    made.write_bytes(gzip.compress(archive, 1, mtime=0))
    return made


def _with_dependencies(names: Iterable[str]) -> list[Path]:
    """Module files in an order in which they can be loaded."""
    (directory,) = (kernel_directory() / "lib" / "modules").iterdir()
    needs = {}
    paths = {}
    for path in directory.rglob("*.ko"):
        paths[path.stem.replace("-", "_")] = path
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = paths[name]
        if path in ordered:
            return
        if name not in needs:
            data = path.read_bytes()
            at = data.index(b"\0depends=") + 9
            needs[name] = data[at : data.index(b"\0", at)].decode()
        for other in filter(None, needs[name].split(",")):
            add(other.replace("-", "_"))
        ordered.append(path)

    for name in names:
        add(name)
    return ordered


@dataclass
class Guest:
    """One virtual machine; `work` is its directory, `tpm` the control socket of its TPM."""

    work: Path
    tpm: Path
    initrd: Path
    append: str = ""
    model: str = "tpm-crb"
    incoming: str = ""
    disks: tuple[Path, ...] = ()
    memory: int = 768  # MiB
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _line: socket.socket | None = field(default=None, repr=False)
    _monitor: socket.socket | None = field(default=None, repr=False)
    _heard: bytes = b""

    def start(self) -> None:
        """Power on; without `incoming`, wait until the guest takes commands."""
        self.work.mkdir(exist_ok=True)
        (kernel,) = (kernel_directory() / "boot").glob("vmlinuz-*")
        firmware = self.work / "vars.fd"
        if not firmware.exists():
            shutil.copy(OVMF / "OVMF_VARS_4M.fd", firmware)
        command = [
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max",
            "-m", str(self.memory),
            "-display", "none", "-nodefaults",
            "-drive", f"if=pflash,format=raw,readonly=on,file={OVMF / 'OVMF_CODE_4M.fd'}",
            "-drive", f"if=pflash,format=raw,file={firmware}",
            "-chardev", f"socket,id=chrtpm,path={self.tpm}",
            "-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", f"{self.model},tpmdev=tpm0",
            "-serial", f"file:{self.work / 'console'}",
            "-serial", f"unix:{self.work / 'line'},server=on,wait=off",
            "-qmp", f"unix:{self.work / 'qmp'},server=on,wait=off",
            "-kernel", os.fspath(kernel), "-initrd", os.fspath(self.initrd),
            "-append", f"console=ttyS0 panic=-1 {self.append}",
        ]  # fmt: skip
        for number, disk in enumerate((root_image(), *self.disks)):
            command += [
                "-drive", f"if=none,id=d{number},format=raw,readonly=on,file={disk}",
                "-device", f"virtio-blk-pci,drive=d{number}",
            ]  # fmt: skip
        if self.incoming:
            command += ["-incoming", self.incoming]
        with (self.work / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self._line = self._connect("line")
        self._monitor = self._connect("qmp")
        self.monitor("qmp_capabilities")
        if not self.incoming:
            self.wait_ready()

    def _connect(self, name: str) -> socket.socket:
        deadline = time.monotonic() + 20
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(os.fspath(self.work / name))
            except OSError:
                sock.close()
                assert self.process is not None
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise GuestError((self.work / "qemu.log").read_text()) from None
                time.sleep(0.05)
            else:
                return sock

    def wait_ready(self) -> None:
        """Wait until the guest, just powered on or reset, takes commands."""
        self._heard = b""
        self._until(b"READY", BOOT_SECONDS)

    def run(self, script: str, *, check: bool = True, seconds: float = COMMAND_SECONDS) -> str:
        """Have the guest run a shell script; what it printed."""
        assert self._line is not None
        self._line.sendall(base64.b64encode(script.encode()) + b"\n")
        lines = self._until(b"END", seconds)
        begin = next(i for i, line in enumerate(lines) if line.startswith(b"BEGIN "))
        status = int(lines[begin].split()[1])
        text = base64.b64decode(b"".join(lines[begin + 1 : -1])).decode(errors="replace")
        if check and status:
            raise GuestError(f"{script!r} ended with {status}:\n{text}")
        return text

    def _until(self, end: bytes, seconds: float) -> list[bytes]:
        """Lines up to one that is `end`."""
        assert self._line is not None
        deadline = time.monotonic() + seconds
        while True:
            lines = self._heard.replace(b"\r", b"").split(b"\n")
            if end in lines[:-1]:
                at = lines.index(end)
                self._heard = b"\n".join(lines[at + 1 :])
                return lines[: at + 1]
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(f"no {end!r} within {seconds} s\n{self.console()[-3000:]}")
            self._line.settimeout(left)
            try:
                data = self._line.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise GuestError(f"QEMU has ended\n{self.console()[-3000:]}")
            self._heard += data

    def console(self) -> str:
        log = (self.work / "qemu.log").read_text()
        return (self.work / "console").read_text(errors="replace") + log

    def monitor(self, command: str, **arguments: object) -> object:
        """One command of QEMU's machine protocol (QMP)."""
        assert self._monitor is not None
        request = {"execute": command, "arguments": arguments}
        self._monitor.sendall(json.dumps(request).encode() + b"\n")
        self._monitor.settimeout(60)
        heard = b""
        while True:
            heard += self._monitor.recv(65536)
            for line in heard.split(b"\n")[:-1]:
                message = json.loads(line)
                if "return" in message:
                    return message["return"]
                if "error" in message:
                    raise GuestError(f"{command}: {message['error']['desc']}")

    def reset(self) -> None:
        """Press the reset button."""
        self.monitor("system_reset")
        self.wait_ready()

    def power_off(self) -> None:
        """Have QEMU end in order, as libvirt does."""
        if self.process is None:
            return
        self.monitor("quit")
        self.process.wait(30)
        self._close()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._close()

    def _close(self) -> None:
        self.process = None
        for sock in (self._line, self._monitor):
            if sock is not None:
                sock.close()
