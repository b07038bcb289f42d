"""What holdfast-swtpm-setup is asked for and configured with, without a TPM."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Conflict, HoldfastError, HostError, InvalidInput
from holdfast.swtpm.options import KeySource
from holdfast.swtpm.setup import config, durable, options
from holdfast.swtpm.setup.certificates import common_name
from holdfast.swtpm.setup.keys import ECC, RSA, STORAGE_ECC, STORAGE_RSA
from holdfast.swtpm.setup.options import Existing, parse
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.certificates import CN_MAX
from holdfast.tpm2.structures import Public

REQUIRED = ["--tpm2", "--tpmstate", "state"]


def test_nothing_is_asked_for_by_default() -> None:
    asked = parse(REQUIRED)
    assert (asked.state, asked.existing, asked.key) == ("state", Existing.REFUSE, None)
    assert not any((asked.create_ek, asked.create_spk, asked.lock_nvram, asked.reconfigure))


@pytest.mark.parametrize("option", ["--createek", "--create-ek-cert", "--create-platform-cert"])
def test_certificates_imply_keys(option: str) -> None:
    asked = parse([*REQUIRED, option])
    assert asked.create_ek
    assert asked.create_ek_cert == (option == "--create-ek-cert")
    assert asked.create_platform_cert == (option == "--create-platform-cert")


@pytest.mark.parametrize(
    ("given_options", "source"),
    [
        (["--keyfile", "k"], KeySource(file="k")),
        (["--keyfile-fd", "5"], KeySource(fd=5)),
        (["--pwdfile", "p", "--cipher", "aes-256-cbc"], KeySource("p", password=True, size=32)),
        (["--pwdfile-fd", "0", "--cipher", "aes-cbc"], KeySource(fd=0, password=True)),
    ],
)
def test_a_key_has_one_source(given_options: list[str], source: KeySource) -> None:
    assert parse([*REQUIRED, *given_options]).key == source


@pytest.mark.parametrize("option", options.REFUSED)
def test_what_is_not_offered_is_refused_by_name(option: str) -> None:
    for arguments in ([f"--{option}"], [f"--{option}", "value"], ["--version", f"--{option}"]):
        with pytest.raises(InvalidInput, match=option):
            parse([*REQUIRED, *arguments])


def test_banks_are_names_or_all() -> None:
    assert options.banks("-") is None
    assert options.banks("sha1, sha512") == (Alg.SHA1, Alg.SHA512)
    for text in ("", "sha1,,sha256", "SHA1", "sha3-256", "all"):
        with pytest.raises(InvalidInput, match="is not known"):
            options.banks(text)


def test_a_key_size_is_one_that_is_offered() -> None:
    assert options.rsa_bits("max", (2048, 3072)) == 3072
    assert options.rsa_bits("2048", (2048, 3072)) == 2048
    for text in ("", "0", "1024", "+2048", "2048 ", "\u0662\u0660\u0664\u0668"):
        with pytest.raises(InvalidInput):
            options.rsa_bits(text, (2048, 3072))


@given(st.lists(st.text(max_size=20) | st.sampled_from(["--tpm2", "--tpmstate", "-", "--"])))
def test_any_command_line_is_options_or_invalid(arguments: list[str]) -> None:
    if not {"-h", "--help"} & set(arguments):
        with contextlib.suppress(InvalidInput):
            parse(arguments)


@pytest.mark.parametrize(
    ("vmid", "name"),
    [
        (None, "unknown"),
        ("a vm", "a vm"),
        (" a,b+c=d ", "a_b_c=d"),
        ("é" * 10, "é" * 10),
        (f"{'n' * 90}:{'u' * 36}", f"{'n' * 27}:{'u' * 36}"),
    ],
)
def test_a_vms_name_is_a_common_name(vmid: str | None, name: str) -> None:
    assert common_name(vmid) == name


@given(st.text())
def test_any_vms_name_fits_or_is_invalid(vmid: str) -> None:
    try:
        name = common_name(vmid)
    except InvalidInput:
        return
    assert 1 <= len(name.encode()) <= CN_MAX
    assert name.isprintable()


def test_templates_are_public_areas() -> None:
    keys = [*RSA.values(), ECC]
    signing = [key.signing(decrypts=decrypts) for key in keys for decrypts in (False, True)]
    templates = [key.template for key in (*keys, *signing)]
    for template in (*templates, STORAGE_ECC, *STORAGE_RSA.values()):
        assert Public.decode(template.encode()) == template


# --- configuration files -----------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "conf"
    path.write_text(text)
    return path


def test_a_configuration_has_comments_and_the_environment(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "# all of it\ncreate_certs_tool= ${BIN}/tool # a comment\n\n"
        "create_certs_tool_config =${BIN}${ETC}\nactive_pcr_banks = sha1,sha256\n"
        "local_profiles_dir = /somewhere\n",
    )
    read = config.setup(path, {"BIN": "/b", "ETC": "/e"})
    assert read == config.SetupConfig(
        "/b/tool", "/b/e", "", 60, "sha1,sha256", profiles="/somewhere"
    )


@pytest.mark.parametrize("missing", ["statedir", "signingkey", "issuercert"])
def test_a_local_ca_needs_its_places(tmp_path: Path, missing: str) -> None:
    names = ("statedir", "signingkey", "issuercert")
    text = "".join(f"{name} = /x/{name}\n" for name in names if name != missing)
    with pytest.raises(InvalidInput, match=f"Missing '{missing}'"):
        config.authority(written(tmp_path, text), {})


def test_serial_numbers_are_in_the_state_directory_by_default(tmp_path: Path) -> None:
    text = "statedir = /s\nsigningkey = /k\nissuercert = /i\nsigningkey_password = p\n"
    read = config.authority(written(tmp_path, text), {})
    assert (read.serial, read.password) == (Path("/s/certserial"), b"p")


def test_a_user_without_a_configuration_has_a_ca_at_home() -> None:
    state = config.authority(None, {"HOME": "/h"}).state
    where = "/h/.config/var/lib/swtpm-localca" if os.getuid() else "/var/lib/swtpm-localca"
    assert state == Path(where)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--platform-model", "has no value"),
        ("--days 3", "--days is not known here"),
        ("--platform-model a --platform-model b", "is given twice"),
    ],
)
def test_options_of_platforms_are_known_or_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        config.platform(written(tmp_path, text))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_a_configuration_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    for read in (
        lambda: config.setup(path, {}),
        lambda: config.authority(path, {}),
        lambda: config.platform(path),
    ):
        said = str(path)
        try:
            read()
        except HoldfastError as error:
            said = str(error)
        assert str(path) in said


@pytest.mark.parametrize("read", [
    lambda path: config.setup(path, {}), lambda path: config.authority(path, {}), config.platform,
], ids=["setup", "authority", "platform"])  # fmt: skip
def test_a_configuration_that_nobody_writes_is_not_waited_for(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(HostError, match="fifo: not a regular file"):
        read(tmp_path / "fifo")


def test_a_file_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="longer than"):
        config.setup(written(tmp_path, "#" * (1 << 17)), {})
    with pytest.raises(HostError, match="No such file"):
        config.setup(tmp_path / "none", {})


def test_no_configuration_file_is_written_where_one_is(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    (tmp_path / config.LOCALCA).symlink_to("nowhere")
    with pytest.raises(Conflict, match="already exists"):
        config.create(["root"], environ)
    assert config.create(["root", "skip-if-exist"], environ) == []
    assert len(config.create(["root", "overwrite"], environ)) == 3
    assert not (tmp_path / "nowhere").exists()
    assert config.setup(tmp_path / config.SETUP, {}).tool == ""
    state = config.authority(tmp_path / config.LOCALCA, {}).state
    assert state.is_relative_to(tmp_path)
    assert state.is_dir()
    assert set(config.platform(tmp_path / config.LOCALCA_OPTIONS)) == {
        "manufacturer", "model", "version"
    }  # fmt: skip
    with pytest.raises(HostError, match="HOME"):
        config.create(["root"], {})


# --- files -------------------------------------------------------------------------------------


def test_a_created_file_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    durable.create(path, b"one", 0o600)
    for there in (path, tmp_path / "link"):
        if not there.exists():
            there.symlink_to("elsewhere")
        with pytest.raises(FileExistsError):
            durable.create(there, b"two", 0o644)
    assert path.read_bytes() == b"one"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a", "link"]


def test_a_replaced_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"kept")
    link.symlink_to(target)
    durable.replace(link, b"new", 0o644)
    assert (target.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"kept", b"new", False)


def test_of_many_that_create_one_file_one_does(tmp_path: Path) -> None:
    path, done, start = tmp_path / "a", [], threading.Barrier(8)

    def create(number: int) -> None:
        start.wait()
        try:
            durable.create(path, bytes((number,)), 0o600)
        except FileExistsError:
            return
        done.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bytes((number,)) for number in done] == [path.read_bytes()]
    assert [found.name for found in tmp_path.iterdir()] == ["a"]
