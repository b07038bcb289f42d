"""The CDI device of a vTPM, and the same edits made to a bundle."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import Conflict, InvalidInput
from holdfast.frontend.bundle import with_vtpm
from holdfast.frontend.cdi import (
    CDI_VERSION,
    KIND,
    cdi_spec,
    container_edits,
    remove_spec,
    spec_path,
    write_spec,
)
from holdfast.ids import instance_name
from holdfast.measure.config import Hook, hooks, hooks_after

HOST = Path("/run/holdfast/web")
HOOK = Path("/usr/libexec/holdfast-hook")
WEB = instance_name("web")
EDITS = container_edits(WEB, HOST, HOOK)
CONFIG: dict[str, Any] = {
    "process": {"args": ["sh"], "env": ["PATH=/bin", "TCTI=mssim"]},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "hooks": {"createRuntime": [{"path": "/bin/first"}], "poststop": None},
}


def test_the_device_is_named_as_podman_asks_for_it() -> None:
    spec = cdi_spec(WEB, EDITS)
    assert (
        (spec["cdiVersion"], spec["kind"]) == (CDI_VERSION, KIND) == ("0.5.0", "holdfast.dev/vtpm")
    )
    assert [device["name"] for device in spec["devices"]] == ["web"]


def test_every_mount_is_a_bind_without_suid_devices_or_programs() -> None:
    for mount in EDITS["mounts"]:
        assert mount["type"] == "bind"
        assert {"bind", "nosuid", "nodev", "noexec"} <= set(mount["options"])
    by_path = {mount["containerPath"]: mount for mount in EDITS["mounts"]}
    assert by_path["/dev/tpmrm0"]["hostPath"] == "/run/holdfast/web/dev/tpmrm0"
    assert "ro" in by_path["/run/vtpm"]["options"]
    assert "ro" not in by_path["/dev/tpmrm0"]["options"]


def test_hooks_start_and_stop_the_vtpm_and_never_time_out() -> None:
    assert EDITS["hooks"] == [
        {
            "hookName": stage,
            "path": str(HOOK),
            "args": ["holdfast-hook", stage, "--vtpm", "web"],
        }
        for stage in ("createRuntime", "poststop")
    ]


def test_hooks_are_told_what_a_runtime_does_not_tell_them() -> None:
    edits = container_edits(WEB, HOST, HOOK, ("WHERE=there",))
    assert [hook["env"] for hook in edits["hooks"]] == [["WHERE=there"]] * 2
    assert all("env" not in hook for hook in EDITS["hooks"])


def test_a_specification_is_written_whole_readable_and_removed(tmp_path: Path) -> None:
    directory = tmp_path / "cdi"
    path = spec_path(WEB, directory)
    for spec in (cdi_spec(WEB, container_edits(WEB, Path("/one"), HOOK)), cdi_spec(WEB, EDITS)):
        assert write_spec(spec, directory) == path
    assert list(directory.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert json.loads(path.read_text()) == cdi_spec(WEB, EDITS)
    remove_spec(WEB, directory)
    remove_spec(WEB, directory)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "A.b", "a:b_c-d", "x" * 63])
def test_every_name_has_a_file_of_its_own_in_the_directory(name: str) -> None:
    path = spec_path(instance_name(name), Path("/run/cdi"))
    assert path.parent == Path("/run/cdi")
    assert path.name == f"holdfast.dev-vtpm_{name}.json"


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "a..b"])
def test_a_specification_with_another_name_is_not_written(tmp_path: Path, name: str) -> None:
    spec = cdi_spec(WEB, EDITS)
    spec["devices"][0]["name"] = name
    with pytest.raises(InvalidInput):
        write_spec(spec, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_gets_what_cdi_gives_and_our_hook_last() -> None:
    before = copy.deepcopy(CONFIG)
    config = with_vtpm(CONFIG, EDITS)
    assert before == CONFIG
    assert config["process"]["env"][0] == "PATH=/bin"
    assert "TCTI=mssim" not in config["process"]["env"]
    assert "TCTI=device:/dev/tpmrm0" in config["process"]["env"]
    assert [mount["destination"] for mount in config["mounts"]] == [
        "/proc",
        "/dev/tpm0",
        "/dev/tpmrm0",
        "/run/vtpm",
    ]
    assert config["hooks"]["createRuntime"][-1] == {
        "path": str(HOOK),
        "args": ["holdfast-hook", "createRuntime", "--vtpm", "web"],
    }
    ours = Hook("createRuntime", str(HOOK), ("holdfast-hook", "createRuntime", "--vtpm", "web"))
    assert hooks_after(hooks(config), ours) == ()
    assert len(config["hooks"]["poststop"]) == 1


def test_a_bundle_gets_a_vtpm_once() -> None:
    with pytest.raises(Conflict):
        with_vtpm(with_vtpm(CONFIG, EDITS), EDITS)
    edited = with_vtpm(CONFIG, EDITS)
    edited["mounts"] = []
    with pytest.raises(Conflict, match="hook already"):
        with_vtpm(edited, EDITS)


@pytest.mark.parametrize(
    "spoilt",
    [
        {},
        {"process": []},
        {"process": {"env": {}}},
        {"process": {}, "mounts": 1},
        {"process": {}, "mounts": ["/a"]},
        {"process": {}, "hooks": []},
        {"process": {}, "hooks": {"createRuntime": {}}},
    ],
)
def test_what_is_no_configuration_is_refused(spoilt: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        with_vtpm(spoilt, EDITS)
