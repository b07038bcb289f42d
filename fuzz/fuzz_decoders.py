"""Fuzz one decoder with Atheris (coverage-guided, on libFuzzer).

How to run, from the root of the repository:

    python3.11 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris -e .
    /tmp/fuzz/bin/python -m fuzz.fuzz_decoders ipc -max_total_time=60 corpus/

The first argument is one of `fuzz.properties.PROPERTIES`, the rest is libFuzzer's. A crash leaves
its input in a file; `python -m fuzz.fuzz_decoders ipc FILE` runs it again, and without Atheris
`python -m fuzz.fuzz_decoders --replay ipc FILE...` does too. The same properties are what
tests/unit/test_decoders.py holds with Hypothesis.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

USAGE = "usage: python -m fuzz.fuzz_decoders [--replay] DECODER [LIBFUZZER-ARGUMENT|FILE...]\n"


def main(arguments: list[str]) -> int:
    replay = arguments[:1] == ["--replay"]
    given = arguments[1:] if replay else arguments
    if replay:
        from fuzz.properties import PROPERTIES  # noqa: PLC0415 - else instrumented, below
    else:
        try:
            atheris = importlib.import_module("atheris")
        except ModuleNotFoundError:  # not a dependency: only who fuzzes has it
            sys.stderr.write("Atheris is not installed; see the head of this file\n")
            return 2
        with atheris.instrument_imports(include=["holdfast"]):
            from fuzz.properties import PROPERTIES  # noqa: PLC0415
    if not given or given[0] not in PROPERTIES:
        sys.stderr.write(f"{USAGE}decoders: {', '.join(PROPERTIES)}\n")
        return 2
    holds = PROPERTIES[given[0]]
    if replay:
        for name in given[1:]:
            sys.stdout.write(
                f"{name}: {'parses' if holds(Path(name).read_bytes()) else 'refused'}\n"
            )
        return 0

    def one_input(data: bytes) -> None:
        holds(data)

    atheris.Setup([sys.argv[0], *given[1:]], one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
