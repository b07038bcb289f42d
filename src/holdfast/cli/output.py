"""Words, tables, colours and exit codes: what the program's edge adds to facts.

Exit codes: 0 done; 1 something else failed; 2 the command line or a file is wrong; 3 there is no
such thing; 4 not now: in use, or in another state; 5 not allowed; 6 the host lacks or refuses
something; 7 integrity: evidence, state or a log is not what it should be; 130 interrupted.

An error is one line on standard error. Standard output may be closed, full, or read by nobody.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdfast.errors import (
    Forbidden,
    HoldfastError,
    HostError,
    InvalidInput,
    exit_code,
)

_ITS_PATH: Final = (  # the path is wrong, not the host
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
OUT: Final = Console(highlight=False)
ERR: Final = Console(stderr=True, highlight=False)
_lines_to = OUT
MARKS: Final = {
    "ok": "[green]ok[/green]",
    "note": "[cyan]note[/cyan]",
    "warning": "[yellow]warning[/yellow]",
    "problem": "[red]problem[/red]",
}


def prepare() -> None:
    """Have somewhere to write, whoever started us, and never fail for a character."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as we run
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def leave(code: int) -> NoReturn:
    """End with `code` once the output is written; if it cannot be, say so and end with another."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        if code == 0 and not isinstance(error, BrokenPipeError):
            fail(HostError(f"standard output: {error.strerror}"))
        sys.exit(code or 1)  # nobody reads: nothing is to be said either
    sys.exit(code)


def _discard_output() -> None:
    """What could not be written is dropped; the interpreter would try once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def failures() -> Iterator[None]:
    """Turn an error of ours into a line on standard error and its exit code."""
    try:
        yield
    except HoldfastError as error:
        fail(error)
    except BrokenPipeError:
        raise  # whoever read our output went away; the client makes its own a HostError
    except OSError as error:
        fail(of_the_system(error))


def of_the_system(error: OSError) -> HoldfastError:
    """What a failure of the operating system is to whoever named the file."""
    text = f"{error.filename or 'standard output'}: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return Forbidden(text)
    return InvalidInput(text) if error.errno in _ITS_PATH else HostError(text)


def fail(error: HoldfastError) -> NoReturn:
    """Say what is wrong, and end with its code."""
    say(str(error))
    sys.exit(exit_code(error))


def say(text: str) -> None:
    """One line on standard error, however long and whatever is in it."""
    with suppress(OSError):  # nowhere is left to say that
        ERR.print(_plain(" ".join(text.split()), "[red]holdfast:[/red]"), soft_wrap=True)


def show(value: Any, as_json: bool, human: Callable[[Any], None]) -> None:
    """Print a value as JSON, or as people like it."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    else:
        human(value)


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A plain table; nothing in it is markup. For a program: fields with a tab between them."""
    if not OUT.is_terminal:
        for row in (columns, *rows):
            sys.stdout.write("\t".join(_plain(field).plain for field in row) + "\n")
        return
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=True)
    for row in rows:
        made.add_row(*map(_plain, row))
    OUT.print(made)


def line(text: str, mark: str = "") -> None:
    """One line, after an optional coloured mark."""
    _lines_to.print(_plain(text, mark), soft_wrap=True)


@contextmanager
def standard_error(wanted: bool) -> Iterator[None]:
    """While `wanted`, lines go to standard error: a document has standard output to itself."""
    global _lines_to  # noqa: PLW0603 - as the streams themselves are the process'
    _lines_to = ERR if wanted else OUT
    try:
        yield
    finally:
        _lines_to = OUT


@contextmanager
def progress(what: str) -> Iterator[None]:
    """A spinner on a terminal, for what may take longer than a second."""
    if ERR.is_terminal:
        with ERR.status(what):
            yield
    else:
        yield


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """The same for what can be counted: to be told how many there are, of how many."""
    if ERR.is_terminal:
        with ERR.status(what) as status:
            yield lambda some, of: status.update(f"{what}: {some} of {of}")
    else:
        yield lambda _some, _of: None


def _plain(text: str, mark: str = "") -> Text:
    """Text that is no markup and has no control characters, for names may come from anywhere;
    after a `mark` of ours, which is markup."""
    clean = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return Text.assemble(Text.from_markup(f"{mark} "), clean) if mark else Text(clean)
