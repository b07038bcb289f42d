"""Opening a file below a root while mounts change elsewhere, as beside every container's start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.linux.opening import open_in_root

OPENED = 5000
# A namespace after the other: each has all mounts copied, under a lock that `..` looks at.
CHURN = "import ctypes\nunshare = ctypes.CDLL(None).unshare\nwhile not unshare(0x20000): pass\n"


@pytest.mark.needs_root
def test_a_path_is_opened_however_mounts_change_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "layers" / "l").mkdir(parents=True)
    (tmp_path / "layer").write_bytes(b"")
    (tmp_path / "layers" / "l" / "short").symlink_to("../../layers/../layer")
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with subprocess.Popen([sys.executable, "-c", CHURN]) as churn:
        try:
            for _ in range(OPENED):
                os.close(open_in_root(root, b"layers/l/short", os.O_PATH))
            assert churn.poll() is None, "nothing has changed meanwhile"
        finally:
            churn.kill()
            os.close(root)
