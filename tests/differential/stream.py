"""A recorded stream: commands of real clients in order, each with the code it was answered with.

One line a step: response code in hexadecimal, command in base64; `=N` for a command is that of
the Nth step again. Lines with # say where it comes from.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from holdfast.tpm2.commands import Cc

STREAMS = Path(__file__).with_name("streams")
SUFFIX = ".stream"
NAMES = tuple(sorted(path.stem for path in STREAMS.glob(f"*{SUFFIX}")))


@dataclass(frozen=True)
class Step:
    """A command and the code Debian's swtpm answered while the stream was recorded."""

    rc: int
    command: bytes

    @property
    def code(self) -> int:
        return int.from_bytes(self.command[6:10], "big")


def name_of(code: int) -> str:
    return Cc(code).name if code in Cc._value2member_map_ else f"0x{code:08X}"


def write(path: Path, about: Iterable[str], steps: Iterable[Step]) -> None:
    lines = [f"# {line}" for line in about]
    seen: dict[bytes, int] = {}
    for number, step in enumerate(steps):
        first = seen.setdefault(step.command, number)
        lines.append(
            f"{step.rc:x} " + (b64encode(step.command).decode() if first == number else f"={first}")
        )
    path.write_text("\n".join(lines) + "\n")


def read(path: Path) -> list[Step]:
    steps: list[Step] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            rc, command = line.split(" ")
            again = command.startswith("=")
            known = steps[int(command[1:])].command if again else b64decode(command)
            steps.append(Step(int(rc, 16), known))
    return steps


def steps_of(name: str) -> list[Step]:
    """The stream of that name."""
    return read(STREAMS / f"{name}{SUFFIX}")
