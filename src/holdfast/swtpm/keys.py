"""Keys of state files and of leaving state, read from where the caller put them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from holdfast.errors import HostError, InvalidInput
from holdfast.protocol.stateblob import Key, key_from_password
from holdfast.swtpm.options import KeySource

_FILE_MAX: Final = 4096


def load(source: KeySource) -> Key:
    """The key; its file is removed if that was asked for. HostError or InvalidInput."""
    data = _read(source)
    name = source.file or f"descriptor {source.fd}"
    if source.password:
        if not data:
            raise InvalidInput(f"the password in {name} is empty")
        return key_from_password(data, source.size, source.kdf)
    if source.hexadecimal:
        try:
            data = bytes.fromhex(data.decode("ascii").strip().removeprefix("0x"))
        except ValueError:
            raise InvalidInput(f"the key in {name} is not hexadecimal") from None
    if len(data) < source.size or (source.hexadecimal and len(data) != source.size):
        raise InvalidInput(
            f"the key in {name} has {8 * len(data)} bits, its mode wants {8 * source.size}"
        )
    return Key(data[: source.size])


def _read(source: KeySource) -> bytes:
    try:
        if source.fd >= 0:
            with os.fdopen(source.fd, "rb") as file:
                return file.read(_FILE_MAX)
        path = Path(source.file)
        with path.open("rb") as file:
            data = file.read(_FILE_MAX)
        if source.remove:
            path.unlink()
    except OSError as error:
        name = source.file or f"descriptor {source.fd}"
        raise HostError(f"Unable to open file {name}: {error.strerror}") from None
    return data
