"""The real helpers of real VMs, looked at from outside: who they are, what they may do, and what they see."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.helpers.command import ATOLL
from tests.helpers.machines import Factory
from tests.helpers.person import USER, WITH_IDS, somebody, subordinate_of
from tests.helpers.ports import free_port
from tests.helpers.root import only_root

from atoll.host import cables, facts, namespace, process, slirp, user_network
from atoll.host.helper_jail import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE
from atoll.host.link_text import UPLINK
from atoll.host.sandbox import FIRST_USER
from atoll.layout import Layout, NetworkPaths
from atoll.model.requests import ImpairRequest, NetworkRequest, NicRequest, ShareRequest
from atoll.model.spec import PortSpec
from atoll.operations import shares

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    only_root("other users' processes are looked at"),
]


OF_ROOT = range(FIRST_USER, FIRST_USER + (1 << 27))


class Seen:
    """A process, as root sees it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        self.status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}

    def capabilities(self) -> set[int]:
        """All that it has or could come by."""
        sets = (int(self.status[kind][0], 16) for kind in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb"))
        return {number for each in sets for number in range(64) if each >> number & 1}

    def files(self, folder: str = "") -> set[str]:
        return {path.name for path in Path(f"/proc/{self.pid}/root/{folder}").iterdir()}

    def writable(self) -> set[str]:
        """Where something is mounted that can be written."""
        mounts = Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        return {fields[4] for fields in map(str.split, mounts) if "rw" in fields[5].split(",")}

    def shares(self, kind: str) -> bool:
        """Whether this kind of namespace is ours as well."""
        return Path(f"/proc/{self.pid}/ns/{kind}").readlink() == Path(f"/proc/self/ns/{kind}").readlink()


def check_barriers(helper: Seen, *, user: set[int] | range, folders_to_home: set[str] | None = None) -> None:
    (its_user,) = set(map(int, helper.status["Uid"]))
    assert its_user in user and set(helper.status["Gid"]) == set(helper.status["Uid"])
    assert helper.status["NoNewPrivs"] == ["1"]
    assert helper.status["Seccomp"] == ["2"]
    assert not any(helper.shares(kind) for kind in ("mnt", "pid", "ipc", "uts", "cgroup"))
    assert helper.files() <= {"lib", "lib64", "usr", "etc", "run", "dev", "proc", *(folders_to_home or ())}
    assert helper.writable() <= {"/run", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"}


async def test_root_s_helper_of_a_user_mode_network(factory: Factory) -> None:
    port = PortSpec(host_port=1023, guest_port=80, host_address="127.0.0.7")
    vm = await factory.run(
        "tiny", name="v", memory="96MiB", ports=(port, PortSpec(host_port=free_port(), guest_port=1))
    )
    control = factory.layout.vm(vm.id).network_control("net0")
    pid = user_network.helper_of(control)
    assert pid is not None
    helper = Seen(pid)
    check_barriers(helper, user=OF_ROOT)
    assert helper.capabilities() == {CAP_NET_BIND_SERVICE}
    assert helper.status["Groups"] == []
    engine = Seen(vm.pid)
    assert engine.status["Uid"] != helper.status["Uid"]
    assert helper.files("etc") <= {"resolv.conf", "ld.so.cache"} and helper.files("run") == {"control"}
    assert helper.shares("net")
    ours, its = (Path(f"/proc/{each}/cgroup").read_text() for each in (vm.pid, pid))
    assert ours == its, "what it takes is the VM's"


def groups_of(owner: str) -> dict[str, dict[str, str]]:
    """The control groups of a VM or a network: by controller, the settings in it."""
    found = {}
    for controller in ("cpu", "pids", "memory"):
        for folder in Path("/sys/fs/cgroup", controller).glob(f"**/atoll/{owner}.*"):
            found[controller] = {
                each.name: each.read_text().strip()
                for each in folder.iterdir()
                if each.name in ("tasks", "cpu.shares", "cpu.cfs_quota_us", "pids.max", "memory.limit_in_bytes")
            }
    return found


FIRST_VERSION = pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/cpu", os.W_OK), reason="control groups of the first version"
)


@FIRST_VERSION
async def test_what_serves_a_network_is_bounded_together_and_leaves_no_group(factory: Factory) -> None:
    network = await factory.host.networks.create(NetworkRequest(name="lab", mode="nat"))
    vm = await factory.run("tiny", name="v", memory="96MiB", nics=(NicRequest(network="lab"),))
    await vm.net_impair(ImpairRequest(network="lab", delay=0.001))
    paths = factory.layout.network(network.id)
    holder, names, uplink = helpers_of(paths)
    ((relay, _),) = cables.relays_of(paths).values()
    inside = {str(pid) for pid in (holder.pid, uplink.pid, relay, *(each.pid for each in names))}
    groups = groups_of(network.id)
    assert set(groups) == {"cpu", "pids", "memory"}
    assert all(inside <= set(settings["tasks"].split()) for settings in groups.values())
    assert groups["cpu"]["cpu.shares"] == "512" and groups["cpu"]["cpu.cfs_quota_us"] == "200000"
    assert groups["pids"]["pids.max"] == "1024" and groups["memory"]["memory.limit_in_bytes"] == str(2 << 30)
    assert groups_of(vm.id)["cpu"]["cpu.shares"] == "1024"
    for pid in inside:
        # The holder takes others along.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    await vm.rm(force=True)
    await factory.host.networks.rm("lab")
    assert groups_of(network.id) == {} and groups_of(vm.id) == {}


@FIRST_VERSION
async def test_the_server_of_a_folder_is_in_its_vm_s_groups(factory: Factory, tmp_path: Path) -> None:
    share = ShareRequest(host_path=str(tmp_path), guest_path="/mnt/data")
    vm = await factory.run("tiny", name="v", memory="96MiB", shares=(share,))
    await vm.wait()
    server = shares.server_of(factory.layout.vm(vm.id), vm.record.spec.shares[0])
    assert server is not None
    assert all(str(server.process.pid) in settings["tasks"].split() for settings in groups_of(vm.id).values())
    await vm.stop(force=True)
    assert groups_of(vm.id) == {} and facts.identity_of(server.process.pid) is None


def helpers_of(network: NetworkPaths) -> tuple[Seen, list[Seen], Seen]:
    """The holder, the processes of dnsmasq that it keeps, and the uplink."""
    holder, uplink = namespace.holder_of(network), slirp.listener(network.uplink)
    assert holder is not None and uplink is not None
    found = subprocess.run(["pgrep", "-f", str(network.names)], capture_output=True, check=False)
    names = [Seen(int(pid)) for pid in found.stdout.split() if int(pid) != holder.pid]
    return Seen(holder.pid), names, Seen(uplink)


def check_network(paths: NetworkPaths, *, user: set[int] | range) -> None:
    holder, names, uplink = helpers_of(paths)
    assert len(names) == 4, "two of dnsmasq, and what starts them again"
    for helper in (holder, *names):
        check_barriers(helper, user=user, folders_to_home={paths.names.parts[1]})
        assert helper.capabilities() == {CAP_NET_BIND_SERVICE, CAP_NET_ADMIN}
        assert not helper.shares("user") and not helper.shares("net"), "and those in its own network only"
        assert helper.files("etc") <= {"ld.so.cache"}
        assert helper.files(str(paths.names)) == {"dns.conf", "dhcp.conf", "hosts", "leases"}
        assert helper.files(str(paths.run)) == {"names"}
    check_barriers(uplink, user=user)
    assert uplink.capabilities() == {CAP_NET_BIND_SERVICE}
    assert uplink.files() == {"etc", "run"} and uplink.files("run") == {paths.uplink.name}
    assert uplink.files("etc") <= {"resolv.conf", "ld.so.cache"}
    assert uplink.writable() == set(), "its own sandbox makes the folder of its socket read-only as well"
    assert uplink.shares("net")


async def test_root_s_helpers_of_a_shared_network(factory: Factory) -> None:
    port = PortSpec(host_port=1022, guest_port=80, host_address="127.0.0.7")
    network = await factory.host.networks.create(NetworkRequest(name="wan", mode="nat"))
    vm = await factory.run("tiny", name="v", memory="96MiB", nics=(NicRequest(network="wan"),), ports=(port,))
    paths = factory.layout.network(network.id)
    check_network(paths, user=OF_ROOT)
    _, names, _ = helpers_of(paths)
    for each in names:
        os.kill(each.pid, signal.SIGKILL)
    await vm.rm(force=True)
    await factory.host.networks.rm("wan")
    assert not any(facts.identity_of(each.pid) for each in names)


async def test_root_s_network_leads_out_where_the_device_of_taps_is_root_s_alone(factory: Factory) -> None:
    """As on a computer without udev."""
    device = "mount -t tmpfs tmpfs /dev/net && mknod -m 600 /dev/net/tun c 10 200"
    words = f'{device} && "$@" net create lab --mode nat && "$@" net exec lab -- cat /proc/net/dev'
    seen = await process.run(["unshare", "--mount", "sh", "-c", words, "sh", *ATOLL])
    assert UPLINK in seen.stdout.decode()
    await factory.host.networks.rm("lab")


@pytest.mark.parametrize("uid", [USER, WITH_IDS], ids=["without subordinate ids", "with them"])
def test_an_ordinary_user_s_helpers(uid: int) -> None:
    with somebody(uid) as person:
        user = subordinate_of(uid)
        person.atoll("image", "build", "tiny", "--quiet")
        person.atoll("net", "create", "lab", "--mode", "nat")
        vm = json.loads(person.atoll("run", "tiny", "--name", "v", "--memory", "96MiB", "--quiet", "--format", "json"))
        person.atoll("net", "attach", "v", "lab")
        layout = Layout(
            *(person.home / folder for folder in (".local/share/atoll", ".cache/atoll", ".local/share/atoll/run"))
        )
        control = layout.vm(vm["vm"]["id"]).network_control("net0")
        pid = user_network.helper_of(control)
        assert pid is not None
        helper = Seen(pid)
        check_barriers(helper, user=user)
        assert helper.capabilities() == set()
        assert helper.files("run") == {"control"}
        (folder,) = (layout.run / "networks").iterdir()
        check_network(NetworkPaths(run=folder), user=user)
        person.atoll("rm", "--force", "v")
        person.atoll("net", "rm", "lab")
        assert facts.identity_of(pid) is None
