"""The real helpers of real VMs, looked at from outside: who they are, what they may do, and what they see."""

import os
from pathlib import Path

import pytest
from tests.helpers.machines import Factory
from tests.helpers.ports import free_port

from atoll.host import user_network
from atoll.host.helper_jail import CAP_NET_BIND_SERVICE
from atoll.host.sandbox import FIRST_USER
from atoll.model.spec import PortSpec

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes are looked at"),
]


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


def check_barriers(helper: Seen) -> None:
    assert helper.status["NoNewPrivs"] == ["1"]
    assert helper.status["Seccomp"] == ["2"]
    assert helper.status["NSpid"][1:] == ["1"], "the first process of a pid namespace"
    assert not any(helper.shares(kind) for kind in ("mnt", "pid", "ipc", "uts", "cgroup"))
    assert helper.files() <= {"lib", "lib64", "usr", "etc", "run", "dev", "proc", "root"}
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
    check_barriers(helper)
    assert helper.capabilities() == {CAP_NET_BIND_SERVICE}
    user = int(helper.status["Uid"][0])
    assert user >= FIRST_USER and set(helper.status["Uid"]) == {str(user)}
    assert helper.status["Groups"] == []
    engine = Seen(vm.pid)
    assert engine.status["Uid"] != helper.status["Uid"]
    assert helper.files("etc") <= {"resolv.conf", "ld.so.cache"} and helper.files("run") == {"control"}
    assert helper.shares("net")
    ours, its = (Path(f"/proc/{each}/cgroup").read_text() for each in (vm.pid, pid))
    assert ours == its, "what it takes is the VM's"
