"""The plan is pure: golden files hold what QEMU is told, for each kind of machine.

To take over a change that is meant: `ATOLL_UPDATE_GOLDEN=1 ./dev test tests/unit/test_plan.py`, then read the diff.
"""

import os
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from atoll.errors import InvalidInput, Unsupported
from atoll.layout import Layout
from atoll.model.image import Layer
from atoll.model.launch import Capabilities, Firmware, LaunchPlan
from atoll.model.spec import BootSpec, CpuSpec, DiskSpec, GuestSpec, NicSpec, PortSpec, SeedSpec, ShareSpec, VmSpec
from atoll.model.units import GIB, MIB
from atoll.model.vm import Vm
from atoll.qemu.devices import assign_addresses, head_node
from atoll.qemu.plan import PlanInputs, PrivateRam, plan

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = Layout(data=Path("/data"), cache=Path("/cache"), run=Path("/run"))
VM_ID = "0123456789abcdef0123456789abcdef"
KERNEL, INITRD = "a" * 64, "b" * 64
FIRMWARE = Firmware(code="/fw/CODE.fd", variables="/fw/VARS.fd")
LAYERS = {
    "base": Layer(id="base", virtual_size=GIB, file_size=1, sha256="0"),
    "above": Layer(id="above", virtual_size=GIB, file_size=1, sha256="0", parent="base"),
}


def capabilities(arch: str, *, types: frozenset[str] = frozenset({"vmgenid"})) -> Capabilities:
    return Capabilities(
        binary=f"/usr/bin/qemu-system-{arch}",
        identity="this one",
        version=(10, 0, 2),
        package="",
        arch=arch,
        machines={"pc-q35-10.0": "pc-q35-10.0", "microvm": "microvm", "virt-10.0": "virt-10.0", "virt": "virt"},
        types=types,
        commands=frozenset(),
        cpus=frozenset({"max"}),
        options=frozenset({"sandbox"}),
    )


def inputs(
    spec: VmSpec, *, accelerator: str = "tcg", firmware: Firmware | None = None, seed: bool = False
) -> PlanInputs:
    spec = replace(spec, addresses=assign_addresses(spec))
    return PlanInputs(
        vm=Vm(id=VM_ID, name="web", image="debian:13", created_at=0, spec=spec),
        spec=spec,
        caps=capabilities(spec.arch),
        accelerator=accelerator,
        layout=LAYOUT,
        layers=LAYERS,
        firmware=firmware,
        seed=seed,
    )


ROOT = DiskSpec(name="root", size=10 * GIB, layer="above", head="f00d" * 8)
NIC = NicSpec(name="net0", mac="52:54:00:00:00:01", ports=(PortSpec(host_port=8080, guest_port=80),))
TINY = VmSpec(
    machine_type="pc-q35-10.0",
    boot=BootSpec(firmware="kernel", kernel=KERNEL, initrd=INITRD, cmdline="console=ttyS0 quiet"),
    disks=(ROOT,),
    nics=(NIC,),
    display="none",
    guest=GuestSpec(agent=True, seed="cmdline"),
)
CASES: dict[str, PlanInputs] = {
    "q35-kernel": inputs(TINY),
    "q35-kernel-kvm": inputs(replace(TINY, cpu=CpuSpec(count=2, maximum=8, threads=2)), accelerator="kvm"),
    "q35-kernel-fork": replace(inputs(TINY), incoming=True, ram=PrivateRam(path="/memory/m", offset=MIB)),
    "q35-kernel-plugged-disk": inputs(
        replace(TINY, disks=(ROOT, DiskSpec(name="hot", size=GIB, head="cafe" * 8)), addresses={"disk-hot": "hotplug0"})
    ),
    "q35-kernel-shares": inputs(replace(TINY, shares=(ShareSpec(number=3, host_path="/srv", guest_path="/mnt"),))),
    "q35-bios-cd-floppy": inputs(
        VmSpec(
            machine_type="pc-q35-10.0",
            memory=64 * MIB,
            disks=(
                DiskSpec(name="root", size=GIB, head="beef" * 8, bus="sata"),
                DiskSpec(name="cd0", size=MIB, blob=KERNEL, bus="sata", media="cdrom"),
                DiskSpec(name="fd0", size=1440 * 1024, blob=INITRD, bus="floppy"),
            ),
            nics=(replace(NIC, model="e1000e", ports=(), restrict=True),),
        )
    ),
    "q35-uefi-nvme-seed": inputs(
        VmSpec(
            machine_type="pc-q35-10.0",
            boot=BootSpec(firmware="uefi"),
            disks=(replace(ROOT, bus="nvme"), DiskSpec(name="data1", size=GIB, head="cafe" * 8, bus="scsi")),
            display="virtio",
            guest=GuestSpec(seed="nocloud"),
            seed=SeedSpec(user="me"),
        ),
        firmware=FIRMWARE,
        seed=True,
    ),
    "microvm": inputs(replace(TINY, machine="microvm", machine_type="microvm")),
    "arm64-uefi": inputs(
        VmSpec(arch="aarch64", machine="virt", machine_type="virt-10.0", boot=BootSpec(firmware="uefi"), disks=(ROOT,)),
        firmware=FIRMWARE,
    ),
    "riscv64-kernel": inputs(replace(TINY, arch="riscv64", machine="virt", machine_type="virt")),
}


def as_text(launch: LaunchPlan) -> str:
    lines = [launch.binary]
    lines += [word if word.startswith("-") else f"    {word}" for word in launch.argv]
    lines += ["", *(f"file {file.name} {file.access} {file.path}" for file in launch.files)]
    lines += [f"listen {listener.name} {listener.path}" for listener in launch.listeners]
    lines += [f"feed {feed.name} {feed.content!r}" for feed in launch.feeds]
    for network in launch.networks:
        ways = f"{network.link} {network.control}"
        lines += [f"network {network.name} {ways} {'restricted ' if network.restrict else ''}{list(network.ports)}"]
    return "\n".join([*lines, f"in {launch.working_folder}", ""])


@pytest.mark.parametrize("case", CASES)
def test_plan_is_as_its_golden_file_says(case: str) -> None:
    golden = GOLDEN / f"{case}.txt"
    text = as_text(plan(CASES[case]))
    if os.environ.get("ATOLL_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_planning_twice_gives_the_same_and_leaves_the_inputs_alone() -> None:
    case = CASES["q35-kernel"]
    before = msgspec.json.encode(case.spec)
    assert plan(case) == plan(case)
    assert msgspec.json.encode(case.spec) == before


def test_every_descriptor_that_the_argv_names_is_handed_over() -> None:
    import re

    for case in CASES.values():
        launch = plan(case)
        named = set(re.findall(r"@fd:([^@]+)@", " ".join(launch.argv)))
        given = [entry.name for entry in (*launch.files, *launch.listeners, *launch.feeds, *launch.networks)]
        assert named == set(given)
        assert len(given) == len(set(given))


def test_node_names_fit_into_qemus_limit_of_31_bytes() -> None:
    from atoll.qemu.plan import disk_nodes

    disk = DiskSpec(name="x" * 20, size=GIB, layer="above", head="f00d" * 8)
    nodes = disk_nodes(disk, layout=LAYOUT, vm_id=VM_ID, layers=LAYERS, hand_over=lambda name, path, access: 1)
    assert max(len(node["node-name"]) for node in nodes) <= 31
    assert nodes[-1]["node-name"] == head_node(disk)


def test_addresses_that_were_given_stay_when_devices_come_and_go() -> None:
    spec = replace(TINY, addresses=assign_addresses(TINY))
    grown = replace(spec, disks=(DiskSpec(name="new", size=GIB), *spec.disks), display="vga")
    after = assign_addresses(grown)
    assert {device: after[device] for device in spec.addresses} == spec.addresses
    assert len(set(after.values())) == len(after)
    shrunk = assign_addresses(replace(grown, addresses=after, disks=()))
    assert "disk-new" not in shrunk
    assert shrunk["rng"] == after["rng"]


def test_a_machine_that_this_qemu_lacks_is_told() -> None:
    with pytest.raises(Unsupported, match="has no machine"):
        plan(inputs(replace(TINY, machine_type="pc-q35-99.0")))


def test_uefi_without_a_firmware_is_told() -> None:
    with pytest.raises(Unsupported, match="no firmware was found"):
        plan(inputs(replace(TINY, boot=BootSpec(firmware="uefi"))))


def test_too_many_disks_on_a_bus_are_told() -> None:
    disks = tuple(DiskSpec(name=f"d{letter}", size=GIB, bus="sata") for letter in "abcdefg")
    with pytest.raises(InvalidInput, match="sata takes 6"):
        plan(inputs(replace(TINY, disks=disks)))
