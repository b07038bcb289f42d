"""Fuzz one decoder, or a whole TPM, with Atheris (coverage-guided, on libFuzzer).

How to run, from the root of the repository (Atheris 3.0.0 is a wheel for CPython 3.11 and newer,
and needs no compiler):

    python3.11 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris -e . hypothesis pytest
    /tmp/fuzz/bin/python -m fuzz.fuzz_decoders --seeds ipc corpus/
    /tmp/fuzz/bin/python -m fuzz.fuzz_decoders ipc -max_total_time=60 corpus/

The first argument is `tpm` (random frames to a TPM behind its filter: `fuzz.tpm`, which needs
libtpms) or one of `fuzz.properties.PROPERTIES`, the rest is libFuzzer's. `--seeds` writes valid
input into a directory, to begin with: without it the fuzzer finds few of the formats' tables. A
crash leaves its input in a file; `python -m fuzz.fuzz_decoders ipc FILE` runs it again, and without
Atheris `python -m fuzz.fuzz_decoders --replay ipc FILE...` does too. The same properties are what
tests/unit/test_decoders.py and tests/engine/test_random_frames.py hold with Hypothesis.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

USAGE = (
    "usage: python -m fuzz.fuzz_decoders DECODER [LIBFUZZER-ARGUMENT...]\n"
    "       python -m fuzz.fuzz_decoders --replay DECODER FILE...\n"
    "       python -m fuzz.fuzz_decoders --seeds DECODER DIRECTORY\n"
)
MODES = ("--replay", "--seeds")


def properties(instrumented: Any) -> Mapping[str, Callable[[bytes], bool]]:
    """All of them by name; imported only here, so that they can be instrumented."""
    with instrumented:
        from fuzz import tpm  # noqa: PLC0415
        from fuzz.properties import PROPERTIES  # noqa: PLC0415
    return {**PROPERTIES, "tpm": tpm.holds}


def replay(holds: Callable[[bytes], bool], files: list[str]) -> None:
    for name in files:
        sys.stdout.write(f"{name}: {'parses' if holds(Path(name).read_bytes()) else 'refused'}\n")


def write_seeds(name: str, directory: Path) -> None:
    """What the tests know to be valid, a file each."""
    if name == "tpm":
        seeds = importlib.import_module("tests.engine.test_random_frames").SEEDS
    else:
        seeds = importlib.import_module("tests.unit.test_decoders").examples()[name]
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (directory / f"{name}-{number}").write_bytes(seed)


def main(arguments: list[str]) -> int:
    mode = arguments[0] if arguments[:1] and arguments[0] in MODES else ""
    given = arguments[1:] if mode else arguments
    atheris: Any = None
    if not mode:
        try:
            atheris = importlib.import_module("atheris")
        except ModuleNotFoundError:  # not a dependency: only who fuzzes has it
            sys.stderr.write("Atheris is not installed; see the head of this file\n")
            return 2
    known = properties(
        atheris.instrument_imports(include=["holdfast"]) if atheris else nullcontext()
    )
    if not given or given[0] not in known or (mode == "--seeds" and len(given) != 2):
        sys.stderr.write(f"{USAGE}decoders: {', '.join(known)}\n")
        return 2
    holds = known[given[0]]
    match mode:
        case "--replay":
            replay(holds, given[1:])
        case "--seeds":
            write_seeds(given[0], Path(given[1]))
        case _:
            atheris.Setup([sys.argv[0], *given[1:]], lambda data: holds(data) and None)
            atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
