"""Record what unmodified clients send Debian's swtpm: tpm2-tools (`tools`) and tpm2-tss' ESAPI.

    scripts/record-streams [NAME...]        makes all streams anew, and the state they begin in

Every stream begins in the same state, so whatever is in a command can be sent again: handles,
nonces, contexts and HMACs are the same as long as the random generator is asked for the same. The
recorder stands between client and swtpm and changes nothing. Keys that swtpm makes at random are
in the commands that load them, encrypted to a parent that can be made again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import AF_UNIX, socket

from tests.asking import connect, receive

from . import esapi, tools
from .sides import State, Swtpm, running
from .stream import STREAMS, SUFFIX, Step, write

STREAM_SECONDS = 120


class Recorder:
    """Passes commands on to an swtpm and writes them down."""

    def __init__(self, swtpm: Swtpm, directory: Path) -> None:
        self._swtpm = swtpm
        self.path = directory / "tpm.sock"
        self.steps: list[Step] = []
        self._listeners = []
        for path, serve in (
            (self.path, self._data),
            (directory / "tpm.sock.ctrl", self._control),
        ):
            listener = socket(AF_UNIX)
            listener.bind(os.fspath(path))
            listener.listen(16)
            self._listeners.append(listener)
            threading.Thread(target=self._accept, args=(listener, serve), daemon=True).start()

    def _accept(self, listener: socket, serve: object) -> None:
        assert callable(serve)
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(ConnectionError):
                serve(sock)

    def _data(self, sock: socket) -> None:
        while True:
            command = receive(sock)
            response = self._swtpm.send(command)
            self.steps.append(Step(int.from_bytes(response[6:10], "big"), command))
            sock.sendall(response)

    def _control(self, sock: socket) -> None:
        with connect(self._swtpm.control_path) as its:
            while request := sock.recv(4096):
                its.sendall(request)
                sock.sendall(its.recv(4096))

    def take(self) -> list[Step]:
        steps, self.steps = self.steps, []
        return steps

    def close(self) -> None:
        for listener in self._listeners:
            listener.shutdown(2)
            listener.close()


@contextmanager
def recording(directory: Path) -> Iterator[tuple[Swtpm, Recorder]]:
    """An swtpm with the keys that swtpm_setup makes, and the recorder before it."""
    with running("swtpm", directory / "swtpm", setup=True) as swtpm:
        recorder = Recorder(swtpm, directory)
        try:
            yield swtpm, recorder
        finally:
            recorder.close()


def version(package: str) -> str:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}", package],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def run_tools(name: str, directory: Path, tcti: str) -> None:
    """Run one script of tpm2-tools; it writes down what did not go as it should."""
    work = directory / name
    work.mkdir()
    environment = {**os.environ, "TPM2TOOLS_TCTI": tcti, "TSS2_LOG": "all+NONE"}
    done = subprocess.run(
        ["bash", "-c", tools.PRELUDE + tools.SCRIPTS[name]], cwd=work, env=environment,
        stderr=subprocess.PIPE, text=True, timeout=STREAM_SECONDS, check=False,
    )  # fmt: skip
    problems = directory / "problems"
    if problems.exists():
        raise SystemExit(f"{name}: {problems.read_text()}")
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")


def main(names: list[str]) -> None:
    STREAMS.mkdir(exist_ok=True)
    source = f"recorded from {version('swtpm')}, {version('libtpms0')}."
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hfr")))
        swtpm, recorder = stack.enter_context(recording(place))
        if names:
            state = State.stored()
        else:
            state = swtpm.state()
            state.store()
        tcti = f"swtpm:path={recorder.path}"
        for name in names or (*tools.SCRIPTS, *esapi.SCENARIOS):
            swtpm.restore(state)
            if name in tools.SCRIPTS:
                run_tools(name, place, tcti)
                who, made = version("tpm2-tools"), "tools.SCRIPTS"
            else:
                esapi.SCENARIOS[name](tcti)
                who = f"tpm2-pytss' ESAPI and {version('libtss2-esys-3.0.2-0')}"
                made = "esapi.SCENARIOS"
            about = (f"By {who}; {source}", f"Made by scripts/record-streams: {made}[{name!r}]")
            write(STREAMS / f"{name}{SUFFIX}", about, recorder.take())


if __name__ == "__main__":
    main(sys.argv[1:])
