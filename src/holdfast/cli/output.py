"""Words, tables, colours and exit codes: what the program's edge adds to facts.

Exit codes: 0 done; 1 something else failed; 2 the command line is wrong; 3 there is no such thing;
4 not now: in use, or in another state; 5 not allowed; 6 the host lacks or refuses something;
7 integrity: evidence, state or a log is not what it should be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdfast.errors import (
    Conflict,
    DecodeError,
    Forbidden,
    HoldfastError,
    HostError,
    IntegrityError,
    InvalidInput,
    NotFound,
)

OUT: Final = Console(highlight=False)
ERR: Final = Console(stderr=True, highlight=False)
EXIT_CODES: Final[Mapping[type[HoldfastError], int]] = {
    InvalidInput: 2,
    NotFound: 3,
    Conflict: 4,
    Forbidden: 5,
    HostError: 6,
    IntegrityError: 7,
    DecodeError: 7,
}


@contextmanager
def failures() -> Iterator[None]:
    """Turn an error of ours into a line on standard error and its exit code."""
    try:
        yield
    except HoldfastError as error:
        fail(error)
    except PermissionError as error:
        fail(Forbidden(f"{error.filename}: {error.strerror}"))
    except OSError as error:
        fail(HostError(f"{error.filename or 'the system'}: {error.strerror}"))


def fail(error: HoldfastError) -> NoReturn:
    """Say what is wrong, and end with its code."""
    ERR.print(_plain(str(error), "[red]holdfast:[/red]"))
    code = next((c for kind, c in EXIT_CODES.items() if isinstance(error, kind)), 1)
    sys.exit(code)


def show(value: Any, as_json: bool, human: Callable[[Any], None]) -> None:
    """Print a value as JSON, or as people like it."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    else:
        human(value)


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A plain table; nothing in it is markup."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=True)
    for row in rows:
        made.add_row(*map(_plain, row))
    OUT.print(made)


def line(text: str, mark: str = "") -> None:
    """One line, after an optional coloured mark."""
    OUT.print(_plain(text, mark))


@contextmanager
def progress(what: str) -> Iterator[None]:
    """A spinner on a terminal, for what may take longer than a second."""
    if ERR.is_terminal:
        with ERR.status(what):
            yield
    else:
        yield


def _plain(text: str, mark: str = "") -> Text:
    """Text that is no markup and has no control characters, for names may come from anywhere;
    after a `mark` of ours, which is markup."""
    clean = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return Text.assemble(Text.from_markup(f"{mark} "), clean) if mark else Text(clean)
