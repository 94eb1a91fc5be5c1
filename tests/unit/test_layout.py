"""Where things are kept: for a user, for root, and under ATOLL_HOME; and that no two of them share a path."""

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import InvalidInput
from atoll.layout import Layout, VmPaths, find
from atoll.model.spec import DiskSpec
from atoll.qemu.devices import channel_names
from atoll.qemu.plan import MONITORS

USER = 1000


def test_root_uses_the_systems_folders_whatever_xdg_says() -> None:
    layout = find({"HOME": "/root", "XDG_DATA_HOME": "/elsewhere", "XDG_RUNTIME_DIR": "/run/user/0"}, user_id=0)
    assert layout == Layout(data=Path("/var/lib/atoll"), cache=Path("/var/cache/atoll"), run=Path("/run/atoll"))


def test_a_user_has_the_xdg_folders() -> None:
    assert find({"HOME": "/home/me"}, USER) == Layout(
        data=Path("/home/me/.local/share/atoll"),
        cache=Path("/home/me/.cache/atoll"),
        run=Path("/home/me/.local/share/atoll/run"),
    )
    assert find({"HOME": "/home/me", "XDG_DATA_HOME": "/d", "XDG_CACHE_HOME": "/c"}, USER) == Layout(
        data=Path("/d/atoll"), cache=Path("/c/atoll"), run=Path("/d/atoll/run")
    )


def test_every_session_of_a_user_finds_the_same_locks_and_sockets(tmp_path: Path) -> None:
    # A login has this variable and its folder, `su` and cron don't; and at logout the folder goes.
    cron = {"HOME": "/home/me"}
    login = {**cron, "XDG_RUNTIME_DIR": str(tmp_path)}
    assert find(login, USER) == find(cron, USER)


@pytest.mark.parametrize("value", ["", "relative", "./here", "~/data"])
def test_a_base_folder_that_is_not_absolute_counts_for_none(value: str) -> None:
    env = {"HOME": "/home/me", "XDG_DATA_HOME": value, "XDG_CACHE_HOME": value}
    assert find(env, USER) == find({"HOME": "/home/me"}, USER)


@pytest.mark.parametrize("home", ["", "relative"])
def test_without_a_home_in_the_environment_the_users_own_is_looked_up(home: str) -> None:
    own = Path("~").expanduser()
    assert find({"HOME": home}, USER).data == own / ".local/share/atoll"
    assert find({}, USER).cache == own / ".cache/atoll"


@pytest.mark.parametrize("user_id", [0, USER])
def test_atoll_home_comes_before_all_else(user_id: int) -> None:
    env = {"ATOLL_HOME": "/vm home", "HOME": "/home/me", "XDG_DATA_HOME": "/d"}
    root = Path("/vm home")
    assert find(env, user_id) == Layout(data=root / "data", cache=root / "cache", run=root / "run")


def test_atoll_home_may_be_relative_or_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert find({"ATOLL_HOME": "vms"}).data == tmp_path / "vms/data"
    assert find({"ATOLL_HOME": "~/vms"}).data == Path("/home/me/vms/data")
    assert find({"ATOLL_HOME": ""}, USER) == find({}, USER)


def test_the_home_of_nobody_is_told_with_a_way_out() -> None:
    with pytest.raises(InvalidInput, match="~no-such-user/vms is no folder") as refused:
        find({"ATOLL_HOME": "~no-such-user/vms"})
    assert refused.value.next_step == "Set ATOLL_HOME to a full path."


def test_the_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path))
    assert find().data == tmp_path / "data"
    monkeypatch.delenv("ATOLL_HOME")
    assert find() == find(dict(os.environ), os.getuid())


# Paths within

LAYOUT = Layout(data=Path("/data"), cache=Path("/cache"), run=Path("/run"))
DISKS = st.builds(
    DiskSpec,
    name=st.from_regex(r"[a-z][a-z0-9-]{0,19}", fullmatch=True),
    size=st.just(1),
    head=st.sampled_from(["a" * 32, "b" * 32]),
)


def properties(thing: Layout | VmPaths) -> dict[str, Path]:
    """The paths that take no argument."""
    fields = {field.name for field in dataclasses.fields(thing)}
    names = [name for name in dir(type(thing)) if isinstance(getattr(type(thing), name), property)]
    return {name: getattr(thing, name) for name in names if name not in fields}


def test_each_thing_has_a_path_of_its_own() -> None:
    vms = [LAYOUT.vm("a" * 32), LAYOUT.vm("b" * 32)]
    sockets = [*MONITORS, *channel_names(), "serial"]
    paths = [
        *properties(LAYOUT).values(),
        *(path for vm in vms for path in (vm.home, vm.run, *properties(vm).values())),
        *(vm.socket(name) for vm in vms for name in sockets),
        *(path for vm in vms for path in (vm.network_link("net0"), vm.network_control("net0"))),
        *(vm.lock(name) for vm in vms for name in sockets),
        *(vm.head(DiskSpec(name=name, size=1, head="ab" * 16)) for vm in vms for name in ("root", "data1")),
        *(LAYOUT.vm_lock(letter * 32) for letter in "ab"),
        LAYOUT.layer("c"),
        LAYOUT.blob("d"),
        LAYOUT.memory_file("e"),
    ]
    assert len(set(paths)) == len(paths)
    assert {path.parts[1] for path in paths} == {"data", "cache", "run", "dev"}


def test_what_is_renamed_into_place_is_on_the_same_file_system() -> None:
    for folder in (LAYOUT.layers, LAYOUT.blobs, LAYOUT.memory, LAYOUT.temporary):
        assert folder.parent == LAYOUT.data


@given(DISKS, DISKS)
def test_heads_have_files_of_their_own_whatever_the_names_of_disks(one: DiskSpec, other: DiskSpec) -> None:
    vm = LAYOUT.vm("a" * 32)
    taken = {vm.nvram, vm.seed, vm.logs, *properties(vm).values()}
    assert vm.head(one).parent == vm.home
    assert vm.head(one) not in taken
    assert (vm.head(one) == vm.head(other)) == (one == other)


def test_looking_makes_nothing(tmp_path: Path) -> None:
    find({"ATOLL_HOME": str(tmp_path / "home")})
    find({"HOME": str(tmp_path)}, USER)
    assert list(tmp_path.iterdir()) == []
