"""The normalised configuration: what it forgets, what it does not, and the hooks after ours."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, InvalidInput, NotFound
from holdfast.measure.config import (
    CONFIG_MAX,
    DROPPED_ANNOTATIONS,
    Hook,
    IdMap,
    canonical_order,
    config_facts,
    hooks,
    hooks_after,
    parse_config,
)

Json = dict[str, Any]
ID_ONE = "3e9339b43ca33e47bb2b8441c08f0be46aa1ee73f7c25964d134d4a939c51a84"
ID_TWO = "9e8add6a8c4f6840d62a8d02fcbecee33c1c80fd29bd3a1942fe478bf11b70aa"
VOLUME_ONE = "fb1446f3d798003379b99fd5ee610bab898a5e55bf83174a9e086e0142fcb961"
VOLUME_TWO = "f27c1aa14cbb36c9eccb0928fef8fda97f6ab842235e70dc621ca8d3aa1ec274"


def podman_config(
    container: str = ID_ONE, volume: str = VOLUME_ONE, created: str = "10:41", netns: str = "1"
) -> Json:
    """What podman 4.3.1 writes, shortened."""
    userdata = f"/graph/run/overlay-containers/{container}/userdata"
    return {
        "ociVersion": "1.0.2-dev",
        "process": {
            "terminal": False,
            "consoleSize": {"height": int(netns), "width": 80},
            "user": {"uid": 0, "gid": 0, "additionalGids": [27, 5]},
            "args": ["app", "first"],
            "env": ["PATH=/bin", "A=1", f"HOSTNAME={container[:12]}", "A=2"],
            "cwd": "/work",
            "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"]},
            "rlimits": [
                {"type": "RLIMIT_NPROC", "hard": 2**64 - 1, "soft": 1024},
                {"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024},
            ],
        },
        "root": {"path": f"/graph/overlay/{container[::-1]}/merged"},
        "hostname": container[:12],
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "type": "bind", "source": f"{userdata}/hosts"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["b", "a"]},
            {"destination": "/dev/shm", "type": "bind", "source": f"{userdata}/shm"},
            {"destination": "/volume", "type": "bind", "source": f"/g/volumes/{volume}/_data"},
        ],
        "hooks": {
            "prestart": [{"path": "/bin/old"}],
            "createRuntime": [{"path": "/bin/before"}, {"path": "/bin/ours", "args": ["ours"]}],
        },
        "annotations": {
            "io.container.manager": "libpod",
            "io.kubernetes.cri-o.Created": created,
        },
        "linux": {
            "cgroupsPath": f"/libpod_parent/libpod-{container}",
            "namespaces": [
                {"type": "pid"},
                {
                    "type": "network",
                    "path": f"/run/netns/cni-0000000{netns}-0000-4000-8000-000000000000",
                },
            ],
            "maskedPaths": ["/proc/kcore", "/proc/acpi"],
            "seccomp": {"architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": []},
        },
    }


def encoded(config: Json) -> bytes:
    return json.dumps(config).encode()


def normalised(config: Json, container_id: str = ID_ONE) -> bytes:
    return config_facts(encoded(config), container_id).normalised


def test_two_runs_of_one_command_are_one_configuration() -> None:
    two = podman_config(ID_TWO, VOLUME_TWO, "10:45", "2")
    two["mounts"] = [two["mounts"][index] for index in (2, 3, 1, 4, 0)]
    two["process"]["capabilities"]["bounding"].reverse()
    two["process"]["env"] = ["A=1", "A=2", f"HOSTNAME={ID_TWO[:12]}", "PATH=/bin"]
    two["linux"]["namespaces"].reverse()
    assert normalised(podman_config()) == normalised(two, ID_TWO)


def test_the_measured_form_is_known_byte_for_byte() -> None:
    config = {
        "process": {"env": ["B=1", "A=2"], "args": ["é"]},
        "hostname": ID_ONE[:12],
        "root": {"path": "/x"},
    }
    assert (
        normalised(config)
        == (
            '{"hostname":"{short-id}","process":{"args":["é"],"env":["A=2","B=1"]},'
            '"root":{"path":"{rootfs}"}}'
        ).encode()
    )


def set_in(*path: Any, value: Any) -> Callable[[Json], None]:
    def change(config: Json) -> None:
        section: Any = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value

    return change


CHANGES: dict[str, Callable[[Json], Any]] = {
    "an argument": set_in("process", "args", 1, value="again"),
    "a variable": set_in("process", "env", 1, value="A=3"),
    "which of two values is the later": set_in(
        "process", "env", value=["PATH=/bin", "A=2", f"HOSTNAME={ID_ONE[:12]}", "A=1"]
    ),
    "a mount": lambda config: config["mounts"].pop(),
    "a mount's source": set_in("mounts", 4, "source", value="/g/volumes/named/_data"),
    "mounts over one another": lambda config: config["mounts"].insert(2, config["mounts"].pop(3)),
    "the order of a mount's options": set_in("mounts", 2, "options", value=["a", "b"]),
    "a hook": lambda config: config["hooks"]["createRuntime"].append({"path": "/bin/after"}),
    "the order of hooks": lambda config: config["hooks"]["createRuntime"].reverse(),
    "a hook's timeout": set_in("hooks", "prestart", 0, "timeout", value=1),
    "a capability": lambda config: config["process"]["capabilities"]["bounding"].pop(),
    "the host name": set_in("hostname", value="web"),
    "a masked path": lambda config: config["linux"]["maskedPaths"].pop(),
    "an annotation": set_in("annotations", "io.container.manager", value="other"),
    "a limit": set_in("process", "rlimits", 0, "hard", value=2**64 - 2),
    "a named network": set_in("linux", "namespaces", 1, "path", value="/run/netns/web"),
    "a read-only root": set_in("root", "readonly", value=True),
    "something we have not heard of": set_in("future", value={}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_other_change_is_another_configuration(change: Callable[[Json], Any]) -> None:
    config = podman_config()
    changed = copy.deepcopy(config)
    change(changed)
    assert normalised(changed) != normalised(config)


def test_an_id_that_a_person_chose_is_left_alone() -> None:
    config = {"process": {"args": ["a"]}, "hostname": "a", "root": {"path": "/x"}}
    assert json.loads(normalised(config, "a")) == {**config, "root": {"path": "{rootfs}"}}


@pytest.mark.parametrize(
    "placeholder",
    ["{container-id}", "{short-id}", "{rootfs}", "{anonymous-volume}", "{network-namespace}"],
)
def test_a_placeholder_in_a_configuration_is_refused(placeholder: str) -> None:
    config = podman_config()
    config["process"]["args"].append(f"--id={placeholder}")
    with pytest.raises(InvalidInput, match=r"stands for itself"):
        normalised(config)


def test_annotations_that_a_runtime_acts_upon_are_not_dropped() -> None:
    prefixes = ("run.oci.", "org.systemd.property.", "org.criu.")
    assert not any(name.startswith(prefixes) for name in DROPPED_ANNOTATIONS)


paths = st.sampled_from(["/", "/a", "/a/b", "/a/b/c", "/a/c", "/b", "/b/a", "/ab", "/a/../b"])


def related(one: str, two: str) -> bool:
    short, long = sorted((one.rstrip("/") + "/", two.rstrip("/") + "/"), key=len)
    return long.startswith(short)


@given(st.lists(paths.filter(lambda path: ".." not in path), max_size=8), st.randoms())
def test_mounts_that_do_not_touch_may_come_in_any_order(
    destinations: list[str], rng: random.Random
) -> None:
    mounts = [{"destination": path, "n": n} for n, path in enumerate(destinations)]
    ordered = canonical_order(mounts)
    assert sorted(mount["n"] for mount in ordered) == list(range(len(mounts)))
    for later, mount in enumerate(ordered):
        for earlier in ordered[:later]:
            if related(mount["destination"], earlier["destination"]):
                assert earlier["n"] < mount["n"]
    shuffled = list(mounts)
    for _ in range(50):  # swaps of neighbours that commute reach every order of the same effect
        if len(shuffled) > 1:
            at = rng.randrange(len(shuffled) - 1)
            one, two = shuffled[at : at + 2]
            if not related(str(one["destination"]), str(two["destination"])):
                shuffled[at : at + 2] = [two, one]
    assert canonical_order(shuffled) == ordered


def test_dots_in_a_destination_are_resolved_before_comparing() -> None:
    mounts = [{"destination": "/b/c"}, {"destination": "/a/../b"}]
    assert canonical_order(mounts) == mounts
    facts = config_facts(encoded({"root": {"path": "r"}, "mounts": mounts}), "x")
    assert facts.provision.mountpoints == {b"b/c", b"b"}


def test_hooks_after_ours_are_those_that_run_before_user_code() -> None:
    config = podman_config()
    config["hooks"]["createRuntime"].append({"path": "/bin/after", "args": ["x"]})
    config["hooks"] |= {
        "startContainer": [{"path": "/bin/inside"}],
        "createContainer": [{"path": "/bin/create"}],
        "poststart": [{"path": "/bin/late"}],
        "poststop": [{"path": "/bin/last"}],
    }
    ours, old = (
        next(hook for hook in hooks(config) if hook.path == path)
        for path in ("/bin/ours", "/bin/old")
    )
    assert hooks_after(hooks(config), ours) == (
        Hook("createRuntime", "/bin/after", ("x",)),
        Hook("createContainer", "/bin/create", ()),
        Hook("startContainer", "/bin/inside", ()),
    )
    assert [hook.path for hook in hooks_after(hooks(config), old)][:3] == [
        "/bin/before",
        "/bin/ours",
        "/bin/after",
    ]


def test_what_lies_between_two_runs_of_our_hook_comes_after_ours() -> None:
    config = {"hooks": {"createRuntime": [{"path": path} for path in ("/us", "/them", "/us")]}}
    us = Hook("createRuntime", "/us", ())
    assert [hook.path for hook in hooks_after(hooks(config), us)] == ["/them", "/us"]


@pytest.mark.parametrize(
    "other",
    [
        {"path": "/us"},
        {"path": "/us", "args": ["us", "createRuntime", "--vtpm", "other"]},
        {"path": "/bin/../us", "args": ["us", "createRuntime"]},
        {"path": "/us", "args": ["us", "createRuntime"], "env": ["PYTHONPATH=/evil"]},
    ],
)
def test_our_hook_with_anything_else_about_it_is_not_ours(other: dict[str, Any]) -> None:
    us = Hook("createRuntime", "/us", ("us", "createRuntime"))
    ours = {"path": "/us", "args": ["us", "createRuntime"]}
    with pytest.raises(NotFound, match="exactly '/us'"):
        hooks_after(hooks({"hooks": {"createRuntime": [other]}}), us)
    for order in ([ours, other], [other, ours, {"path": "/them"}]):
        (after, *_) = hooks_after(hooks({"hooks": {"createRuntime": order}}), us)
        assert after.path == order[-1]["path"]


def test_a_configuration_without_our_hook_is_an_error() -> None:
    with pytest.raises(NotFound):
        hooks_after(hooks(podman_config()), Hook("createRuntime", "/bin/theirs", ()))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"hooks":{},"hooks":{}}', "twice"),
        (b'{"process":{"env":[],"env":[]}}', "twice"),
        (b'{"Hooks":{}}', "another case"),
        ('{"hooks":{"createRuntime":[{"path":"/a","arg\u017f":[]}]}}'.encode(), "another case"),
        (b'{"hooks":{"preStart":[]}}', "another case"),
        (b'{"mounts":[{"Destination":"/a"}]}', "another case"),
        (b'{"linux":{"uidmappings":[]}}', "another case"),
        (b"[]", "not an object"),
        (b"{} {}", "Extra data"),
        (b'{"a":1.0}', "not an integer"),
        (b'{"a":1e3}', "not an integer"),
        (b'{"a":NaN}', "not an integer"),
        (b'{"a":"\\ud800"}', "UTF-8"),
        (b'{"\\ud800":1}', "surrogates"),
        (b'{"a":"\xff"}', "decode"),
        (b'{"a":' * 100_000, "deeply"),
        (b'{"mounts":{}}', "list of objects"),
        (b'{"hooks":{"prestart":[{"args":[]}]}}', "path of hook"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
        (b" " * (CONFIG_MAX + 1), "more than"),
    ],
)
def test_a_configuration_that_could_be_read_two_ways_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        parse_config(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
KEYS = ("process", "root", "linux", "mounts", "hooks", "annotations", "hostname")
configs = st.dictionaries(st.sampled_from(KEYS), values).map(encoded)


@given(st.binary(max_size=200) | configs | st.text().map(str.encode))
def test_a_configuration_is_read_or_refused_with_a_reason(data: bytes) -> None:
    for read in (parse_config, lambda data: config_facts(data, ID_ONE)):
        with contextlib.suppress(DecodeError, InvalidInput):
            read(data)


@given(st.data())
def test_a_spoilt_field_of_a_real_configuration_is_read_or_refused(draws: st.DataObject) -> None:
    config = podman_config()
    section: Any = config
    while True:
        keys = list(section) if isinstance(section, dict) else list(range(len(section)))
        key = draws.draw(st.sampled_from(keys))
        below = section[key]
        if not isinstance(below, dict | list) or not below or draws.draw(st.booleans()):
            section[key] = draws.draw(values)
            break
        section = below
    with contextlib.suppress(DecodeError, InvalidInput):
        config_facts(encoded(config), ID_ONE)


def test_ids_are_mapped_as_the_kernel_does() -> None:
    mapped = IdMap(((0, 1000, 1), (1, 100_000, 10)))
    assert [mapped.host(number) for number in (0, 1, 10, 11)] == [1000, 100_000, 100_009, None]
    assert IdMap().host(7) == 7
