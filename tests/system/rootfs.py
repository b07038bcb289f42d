"""A root file system of a few programs of the host."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

PROGRAMS = ("sh", "cat", "sleep", "mkdir", "rm", "env", "ls")


def make_rootfs(directory: Path, programs: tuple[str, ...] = PROGRAMS) -> Path:
    """A few programs of the host, with the libraries that they need, and little else."""
    for name in programs:
        program = Path(shutil.which(name) or "").resolve()
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
        copies = {Path("/bin", name): program}
        copies |= {Path(at): Path(at) for at in re.findall(r"(/\S+) \(0x", linked.stdout)}
        for place, source in copies.items():
            target = directory / str(place).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o755)
    (directory / "etc").mkdir()
    (directory / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (directory / "etc/group").write_text("root:x:0:\n")
    (directory / "tmp").mkdir()
    (directory / "tmp").chmod(0o1777)
    return directory
