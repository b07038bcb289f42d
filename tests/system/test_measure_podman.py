"""Measuring with real podman and runc: what holds at createRuntime time, of real containers.

Images are made from a few of the host's own programs; the storage is one of our own. The hook is
the measuring code itself, started by runc as any hook is.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.frontend.bundle import with_vtpm
from holdfast.frontend.cdi import cdi_spec, container_edits, remove_spec, write_spec
from holdfast.ids import instance_name
from holdfast.measure.cache import MemoryTreeCache, layer_digest
from holdfast.measure.config import Provision, config_facts, parse_config
from holdfast.measure.rootfs import EMPTY, plain_digest, upper_digest
from holdfast.measure.tree import open_tree

from .rootfs import make_rootfs

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers of the system need root"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
    pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed"),
]

SOURCE = Path(holdfast.__file__).parents[1]
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--network", "none")
HOOK = """\
#!{python} -I
import json, os, sys
sys.path[:0] = [{source!r}] + {path!r}
from pathlib import Path
from holdfast.measure.cache import MemoryTreeCache
from holdfast.measure.config import config_facts
from holdfast.measure.events import config_content, image_contents
from holdfast.measure.rootfs import image_facts, rootfs_path
from holdfast.protocol.oci_state import parse_state
state = parse_state(sys.stdin.buffer.read())
data = Path(state.bundle, "config.json").read_bytes()
config = config_facts(data, state.id)
process = os.open(f"/proc/{{state.pid}}", os.O_RDONLY | os.O_DIRECTORY)
rootfs = rootfs_path(state.bundle, config.rootfs)
image = image_facts(process, rootfs, config, state.id, MemoryTreeCache())
result = {{
    "id": state.id,
    "config": data.decode(),
    "normalised": config.normalised.decode(),
    "pcr12": config_content(config).content,
    "pcr13": [event.content for event in image_contents(image)],
}}
Path({out!r}).write_text(json.dumps(result))
"""


@dataclass
class Host:
    """A podman with its own storage, and our hook in every container's createRuntime stage."""

    directory: Path
    hooks: Path

    @property
    def out(self) -> Path:
        return self.directory / "facts.json"

    def podman(self, *args: str, check: bool = True) -> str:
        command = ["podman", "--root", str(self.directory / "root")]
        command += ["--runroot", str(self.directory / "run"), "--runtime", "runc"]
        command += ["--hooks-dir", str(self.hooks), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *args: str) -> dict[str, Any]:
        """What the hook saw of `podman run` with these arguments."""
        self.podman("run", *LIMITS, *args)
        return self.facts()

    def facts(self) -> dict[str, Any]:
        facts = json.loads(self.out.read_text())
        self.out.unlink()
        assert isinstance(facts, dict)
        return facts


def write_hook(directory: Path, out: Path, name: str = "measure") -> Path:
    hook = directory / name
    text = HOOK.format(python=sys.executable, source=str(SOURCE), path=sys.path[1:], out=str(out))
    hook.write_text(text)
    hook.chmod(0o755)
    return hook


def write_hook_entry(hooks: Path, hook: Path) -> None:
    entry = {
        "version": "1.0.0",
        "hook": {"path": str(hook)},
        "when": {"always": True},
        "stages": ["createRuntime"],
    }
    (hooks / f"{hook.name}.json").write_text(json.dumps(entry))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("podman")
    hooks = directory / "hooks"
    hooks.mkdir()
    host = Host(directory, hooks)
    rootfs = make_rootfs(directory / "rootfs")
    archive = directory / "base.tar"
    subprocess.run(["tar", "-C", rootfs, "-cf", archive, "."], check=True)
    host.podman("import", str(archive), "localhost/base")
    context = directory / "context"
    (context / "usr/local/share").mkdir(parents=True)
    (context / "usr/local/share/data").write_text("one byte of this counts\n")
    (context / "Containerfile").write_text(
        "FROM localhost/base\nCOPY usr /usr\nWORKDIR /made/by/podman\nVOLUME /volume\n"
    )
    host.podman("build", "--network", "none", "--tag", "localhost/app", str(context))
    write_hook_entry(hooks, write_hook(directory, host.out))
    yield host
    host.podman("rm", "--all", "--force", "--volumes", check=False)
    host.podman("rmi", "--all", "--force", check=False)
    # podman leaves its storage mounted over itself
    subprocess.run(["umount", directory / "root/overlay"], check=False, capture_output=True)


def layer_digests(host: Host, image: str) -> list[str]:
    """The image's layers, bottom first, digested where podman keeps them, with nothing running."""
    data = json.loads(host.podman("image", "inspect", image))[0]["GraphDriver"]["Data"]
    paths = [data["UpperDir"], *filter(None, data.get("LowerDir", "").split(":"))]
    digests = []
    for path in reversed(paths):
        fd = open_tree(path)
        digests.append(f"sha256:{layer_digest(fd, MemoryTreeCache()).hex()}")
        os.close(fd)
    return digests


def layers(facts: dict[str, Any]) -> list[str]:
    return [event["digest"] for event in facts["pcr13"] if event["part"] == "layer"]


def upper(facts: dict[str, Any]) -> str | None:
    (event,) = [event for event in facts["pcr13"] if event["part"] == "upper"]
    digest = event["digest"]
    assert digest is None or isinstance(digest, str)
    return digest


def test_a_fresh_container_is_its_images_layers_and_an_empty_upper(host: Host) -> None:
    facts = host.run("--rm", "localhost/app", "ls")
    assert layers(facts) == layer_digests(host, "localhost/app")
    assert len(layers(facts)) == 2
    assert upper(facts) == EMPTY


def test_the_claim_is_what_podman_says_of_the_image(host: Host) -> None:
    facts = host.run("--rm", "localhost/app", "ls")
    (image,) = json.loads(host.podman("image", "inspect", "localhost/app"))
    assert facts["pcr13"][0] == {
        "part": "claimed",
        "kind": "overlay",
        "claimed": {
            "source": "containers-storage",
            "image_id": f"sha256:{image['Id']}",
            "manifest_digest": image["Digest"],
            "reference": None,
        },
    }


@pytest.mark.parametrize(
    "options",
    [
        ("--volume", "{directory}/hooks:/not/in/the/image:ro"),
        ("--tmpfs", "/scratch/deep"),
        ("--read-only",),
        ("--uidmap", "0:100000:65536"),
        ("--privileged",),
        ("--hostname", "elsewhere"),
        ("--systemd", "always"),
        ("--user", "0:0", "--volume", "named:/bin/sub"),
    ],
    ids=lambda options: options[0],
)
def test_whatever_is_mounted_a_fresh_upper_is_empty(host: Host, options: tuple[str, ...]) -> None:
    options = tuple(text.format(directory=host.directory) for text in options)
    facts = host.run("--rm", *options, "localhost/app", "ls")
    assert upper(facts) == EMPTY
    assert layers(facts) == layer_digests(host, "localhost/app")


def test_a_user_unknown_to_the_image_is_written_into_the_upper_the_same_way_each_time(
    host: Host,
) -> None:
    uppers = [upper(host.run("--rm", "--user", "1234", "localhost/app", "ls")) for _ in range(2)]
    assert uppers[0] == uppers[1] != EMPTY


def test_what_a_container_wrote_shows_at_its_next_start(host: Host) -> None:
    facts = host.run("--name", "writer", "localhost/app", "sh", "-c", "echo x > /etc/x")
    assert upper(facts) == EMPTY
    digests = set()
    for _ in range(2):
        host.podman("start", "--attach", "writer")
        digests.add(upper(host.facts()))
    host.podman("rm", "writer")
    assert len(digests) == 1
    assert digests.isdisjoint({None, EMPTY})


def test_an_upper_changed_by_one_byte_has_another_digest(host: Host) -> None:
    host.run("--name", "changed", "localhost/app", "sh", "-c", "[ -e /etc/x ] || echo x > /etc/x")
    host.podman("start", "--attach", "changed")
    before = upper(host.facts())
    (container,) = json.loads(host.podman("container", "inspect", "changed"))
    Path(container["GraphDriver"]["Data"]["UpperDir"], "etc/x").write_text("y\n")
    host.podman("start", "--attach", "changed")
    assert upper(host.facts()) not in (before, EMPTY)
    host.podman("rm", "changed")


@pytest.mark.parametrize(
    "script", ["mkdir /empty", "rm /etc/passwd", "rm -rf /usr/local/share; mkdir /usr/local/share"]
)
def test_directories_made_and_files_removed_are_not_taken_for_the_runtimes(
    host: Host, script: str
) -> None:
    host.run("--name", "tidy", "localhost/app", "sh", "-c", f"({script}) 2>&-; true")
    host.podman("start", "--attach", "tidy")
    assert upper(host.facts()) != EMPTY
    host.podman("rm", "tidy")


def test_one_byte_of_a_layer_changed_on_disk_changes_its_digest(host: Host) -> None:
    before = host.run("--rm", "localhost/app", "ls")
    (image,) = json.loads(host.podman("image", "inspect", "localhost/app"))
    file = Path(image["GraphDriver"]["Data"]["UpperDir"], "usr/local/share/data")
    text = file.read_text()
    file.write_text(text.replace("one", "One"))
    after = host.run("--rm", "localhost/app", "ls")
    file.write_text(text)
    assert layers(after)[0] == layers(before)[0]
    assert layers(after)[1] != layers(before)[1]


def test_the_same_command_is_the_same_configuration_every_time(host: Host) -> None:
    runs = [host.run("--rm", "--env", "A=1", "localhost/app", "ls") for _ in range(4)]
    assert len({facts["normalised"] for facts in runs}) == 1
    assert len({facts["config"] for facts in runs}) == 4
    for facts in runs:
        # and it is what anybody computes from the file
        assert (
            config_facts(facts["config"].encode(), facts["id"]).normalised
            == facts["normalised"].encode()
        )
        assert facts["id"][:12] not in facts["normalised"]


def test_every_change_of_a_command_is_another_configuration(host: Host) -> None:
    variants: list[tuple[str, ...]] = [
        ("--rm", "localhost/app", "ls"),
        ("--rm", "localhost/app", "ls", "/"),
        ("--rm", "--env", "A=1", "localhost/app", "ls"),
        ("--rm", "--env", "A=2", "localhost/app", "ls"),
        ("--rm", "--volume", f"{host.hooks}:/hooks", "localhost/app", "ls"),
        ("--rm", "--volume", f"{host.hooks}:/hooks:ro", "localhost/app", "ls"),
        ("--rm", "--cap-drop", "CHOWN", "localhost/app", "ls"),
        ("--rm", "--hostname", "other", "localhost/app", "ls"),
        ("--rm", "--security-opt", "seccomp=unconfined", "localhost/app", "ls"),
    ]
    digests = [host.run(*variant)["pcr12"]["normalised"] for variant in variants]
    other = host.hooks / "other"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    write_hook_entry(host.hooks, other)
    digests.append(host.run(*variants[0])["pcr12"]["normalised"])
    (host.hooks / "other.json").unlink()
    assert len(set(digests)) == len(variants) + 1


def test_a_plain_root_file_system_is_predicted_before_it_ever_ran(
    host: Host, tmp_path: Path
) -> None:
    rootfs = make_rootfs(tmp_path / "rootfs")
    points = frozenset({b"proc", b"dev", b"sys", b"etc/hosts", b"etc/hostname", b"a/b/c"})
    fd = open_tree(rootfs)
    predicted = f"sha256:{plain_digest(fd, Provision(points)).hex()}"
    os.close(fd)
    option = f"{host.hooks}:/a/b/c"
    for _ in range(2):
        facts = host.run("--rm", "--volume", option, "--rootfs", str(rootfs), "ls")
        assert facts["pcr13"][0]["kind"] == "plain"
        assert layers(facts) == [predicted]
        assert upper(facts) is None
    assert (rootfs / "a/b/c").is_dir()  # runc left its mount points behind
    (rootfs / "etc/passwd").write_text("root:x:0:0:Root:/:/bin/sh\n")
    facts = host.run("--rm", "--volume", option, "--rootfs", str(rootfs), "ls")
    assert layers(facts) != [predicted]


def test_a_failing_measurement_stops_the_container(host: Host) -> None:
    for value, runs in (("{container-id}", False), ("{container}", True)):
        command = ["run", "--rm", *LIMITS, "--env", f"X={value}", "localhost/app"]
        assert ("ran" in host.podman(*command, "sh", "-c", "echo ran", check=False)) is runs


@pytest.fixture
def vtpm(tmp_path: Path) -> Path:
    """What a vTPM's directory on the host looks like; its devices are files here."""
    directory = tmp_path / "vtpm"
    (directory / "dev").mkdir(parents=True)
    (directory / "run").mkdir()
    (directory / "run/tpm.sock").write_text("socket\n")
    for name in ("tpm0", "tpmrm0"):
        (directory / "dev" / name).write_text(f"{name}\n")
    return directory


SHOW = "cat /dev/tpm0 /dev/tpmrm0 /run/vtpm/tpm.sock; env; echo x > /run/vtpm/y || echo read-only"


def check_shown(output: str) -> None:
    assert output.startswith("tpm0\ntpmrm0\nsocket\n")
    assert "TPM2TOOLS_TCTI=device:/dev/tpmrm0\n" in output
    assert "read-only" in output


def test_podman_gives_a_container_the_cdi_device(host: Host, vtpm: Path, tmp_path: Path) -> None:
    name = instance_name(f"test-{os.getpid()}")
    seen = tmp_path / "seen"
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$0 $*" >> {seen}\n')
    hook.chmod(0o755)
    directory = Path("/run/cdi")
    path = write_spec(cdi_spec(name, container_edits(name, vtpm, hook)), directory)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        for options in ((), ("--uidmap", "0:100000:65536"), ("--read-only", "--cap-drop", "all")):
            output = host.podman(
                "run", "--rm", *LIMITS, "--device", f"holdfast.dev/vtpm={name}", *options,
                "localhost/app", "sh", "-c", SHOW,
            )  # fmt: skip
            check_shown(output + "\n")
            assert upper(host.facts()) == EMPTY
    finally:
        remove_spec(name, directory)
    assert not path.exists()
    lines = seen.read_text().splitlines()
    assert lines[0].endswith(f"createRuntime --vtpm {name}")
    assert lines[1].endswith(f"poststop --vtpm {name}")
    assert len(lines) == 6


def test_runc_starts_a_bundle_with_the_vtpm_and_runs_our_hook_last(
    vtpm: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "facts.json"
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    make_rootfs(bundle / "rootfs")
    subprocess.run(["runc", "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {"args": ["sh", "-c", SHOW], "terminal": False}
    config["process"]["rlimits"] = []
    config["root"]["readonly"] = False
    before = tmp_path / "before"
    before.write_text(f"#!/bin/sh\n[ ! -e {seen} ]\n")
    before.chmod(0o755)
    config["hooks"] = {"createRuntime": [{"path": str(before)}]}
    hook = write_hook(tmp_path, seen)
    edits = container_edits(instance_name("web"), vtpm, hook)
    # the hook of this test measures, whatever its arguments; at poststop there is nothing to
    edits["hooks"] = edits["hooks"][:1]
    edited = with_vtpm(config, edits)
    (bundle / "config.json").write_text(json.dumps(edited))
    name = f"holdfast-test-{os.getpid()}"
    done = subprocess.run(
        ["runc", "--root", tmp_path / "runc", "run", "--bundle", bundle, name],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_shown(done.stdout)
    facts = json.loads(seen.read_text())
    assert facts["pcr13"][0] == {"part": "claimed", "kind": "plain", "claimed": None}
    assert parse_config((bundle / "config.json").read_bytes()) == edited


def test_the_upper_layer_is_computed_offline_from_the_storage(host: Host) -> None:
    host.run("--name", "offline", "localhost/app", "sh", "-c", "echo x > /etc/x")
    host.podman("start", "--attach", "offline")
    facts = host.facts()
    (container,) = json.loads(host.podman("container", "inspect", "offline"))
    data = container["GraphDriver"]["Data"]
    opened = [open_tree(path) for path in [data["UpperDir"], *data["LowerDir"].split(":")]]
    points = {
        mount["destination"].strip("/").encode()
        for mount in parse_config(facts["config"].encode())["mounts"]
    }
    provision = Provision(frozenset(points | {b"made/by/podman"}))
    digest = upper_digest(opened[0], opened[:0:-1], provision)
    for fd in opened:
        os.close(fd)
    assert isinstance(digest, bytes)
    assert upper(facts) == f"sha256:{digest.hex()}"
    host.podman("rm", "offline")


RELATIVE = """\
import os, sys
sys.path[:0] = [{source!r}] + {path!r}
from holdfast.measure.cache import MemoryTreeCache
from holdfast.measure.config import config_facts
from holdfast.measure.rootfs import image_facts
config = config_facts(b'{{"root":{{"path":"x"}}}}', "x")
process = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
image = image_facts(process, {merged!r}, config, "x", MemoryTreeCache())
print([layer.hex() for layer in image.layers], image.upper)
"""


def test_layers_given_relative_to_the_storage_and_with_awkward_names_are_found(
    tmp_path: Path,
) -> None:
    for name in ("layer/merged", "layer/diff", "layer/work", "one/a:b", "two/c d", "l"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "one/a:b/one").touch()
    (tmp_path / "two/c d/two").touch()
    (tmp_path / "l/TWO").symlink_to("../two/c d")
    script = RELATIVE.format(
        source=str(SOURCE), path=sys.path[1:], merged=str(tmp_path / "layer/merged")
    )
    options = r"lowerdir=l/TWO:one/a\:b,upperdir=layer/diff,workdir=layer/work"
    command = 'mount -t overlay overlay -o "$1" layer/merged && exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", options, sys.executable, script],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    digests = []
    for name in ("one/a:b", "two/c d"):
        fd = open_tree(tmp_path / name)
        digests.append(layer_digest(fd, MemoryTreeCache()).hex())
        os.close(fd)
    assert done.stdout == f"{digests} empty\n"


@pytest.mark.parametrize("shown", ["link", "file", "nothing", "whiteout", "directory"])
def test_a_directory_in_place_of_something_else_is_no_mount_point(
    tmp_path: Path, shown: str
) -> None:
    """Where a mount's destination lies below it, in the writable layer of an earlier run."""
    lower, upper_layer = tmp_path / "lower", tmp_path / "upper"
    lower.mkdir()
    (upper_layer / "var/run").mkdir(parents=True)
    for directory in (upper_layer, upper_layer / "var", upper_layer / "var/run"):
        directory.chmod(0o755)
    (lower / "var").mkdir(mode=0o755)
    lower.chmod(0o755)
    place = lower / "var/run"
    match shown:
        case "link":
            place.symlink_to("/run")
        case "file":
            place.write_text("policy")
        case "whiteout":
            os.mknod(place, stat.S_IFCHR, os.makedev(0, 0))
        case "directory":
            place.mkdir(mode=0o755)
    provision = Provision(frozenset({b"var/run/secrets/token"}))
    opened = [open_tree(path) for path in (upper_layer, lower)]
    try:
        digest = upper_digest(opened[0], opened[1:], provision)
    finally:
        for fd in opened:
            os.close(fd)
    assert (digest == EMPTY) == (shown not in ("link", "file"))
