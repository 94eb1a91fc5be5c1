"""What users ask for either becomes a machine that can be planned, or is refused with a reason; nothing in between."""

import json
import re
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.unit.test_plan import FIRMWARE, LAYERS, LAYOUT, VM_ID, capabilities

from atoll.errors import InvalidInput, Unsupported
from atoll.model import spec as model
from atoll.model.image import Image, ImageDisk
from atoll.model.launch import LaunchPlan
from atoll.model.requests import CreateRequest, DiskRequest
from atoll.model.spec import GuestSpec, NicSpec, PortSpec, SeedSpec, VmSpec
from atoll.model.units import GIB, MIB
from atoll.model.vm import Vm
from atoll.operations.resolve import as_request, check_labels, made_up_name, new_mac, resolve, with_disk_images
from atoll.operations.resolve_disks import further_disk
from atoll.qemu.plan import PlanInputs, plan

CAPS = {
    arch: replace(
        capabilities(arch),
        machines={"q35": "pc-q35-10.0", "pc-q35-10.0": "pc-q35-10.0", "microvm": "microvm"}
        if arch == "x86_64"
        else {"virt": "virt-10.0", "virt-10.0": "virt-10.0"},
    )
    for arch in get_args(model.Arch)
}


def image(name: str, **fields: Any) -> Image:
    whole = {"arch": "x86_64", "created_at": 0, "source": "", "sha256": "0", **fields}
    return Image(id=name, name=name, **whole)


ROOT = ImageDisk(name="root", size=2 * GIB, layer="above")
LINUX = image(
    "linux",
    disks=(ROOT,),
    firmware="kernel",
    firmwares=("kernel", "uefi"),
    kernel="a" * 64,
    initrd="b" * 64,
    cmdline="console=ttyS0",
    memory=256 * MIB,
    display=False,
    guest=GuestSpec(agent=True, seed="nocloud"),
)
PLAIN = image("plain", disks=(ROOT,), firmwares=("bios", "uefi"))
CD = image("cd", disks=(ImageDisk(name="cdrom", size=MIB, blob="c" * 64, bus="sata", media="cdrom"),))
FLOPPY = image("floppy", disks=(ImageDisk(name="floppy", size=1440 * 1024, blob="d" * 64, bus="floppy"),))
MICRO = replace(LINUX, id="micro", name="micro", machine="microvm")
ARM = replace(LINUX, id="arm", name="arm", arch="aarch64", firmwares=("kernel", "uefi", "bios"))
KERNEL_ONLY = replace(LINUX, id="only", name="only", disks=(), initrd=None, firmwares=("kernel",))
IMAGES = {each.name: each for each in (LINUX, PLAIN, CD, FLOPPY, MICRO, ARM, KERNEL_ONLY)}


def resolved(request: CreateRequest, *, host_cpus: int = 4, seed: SeedSpec | None = None) -> VmSpec:
    """The spec as `create` makes it."""
    chosen = IMAGES[request.image] if request.image else None
    arch = chosen.arch if chosen else request.arch or "x86_64"
    spec = resolve(
        request,
        image=chosen,
        cdroms=[IMAGES[name] for name in request.cdrom],
        caps=CAPS[arch],
        host_cpus=host_cpus,
        seed=seed or SeedSpec(),
    )
    return with_disk_images(spec, request, IMAGES)


def created(**options: Any) -> VmSpec:
    return resolved(as_request("linux", options) if "image" not in options else CreateRequest(**options))


def planned(spec: VmSpec) -> LaunchPlan:
    return plan(
        PlanInputs(
            vm=Vm(id=VM_ID, name="web", image="", created_at=0, spec=spec),
            spec=spec,
            caps=CAPS[spec.arch],
            accelerator="tcg",
            layout=LAYOUT,
            layers=LAYERS,
            firmware=FIRMWARE if spec.boot.firmware == "uefi" else None,
            seed=spec.wants_seed,
        )
    )


# Anything that can be asked: mostly what could be, with a few fields that are odd


def some(*values: Any) -> st.SearchStrategy[Any]:
    return st.none() | st.sampled_from(values)


NAMES = ["root", "data1", "cd0", "cdrom", "kernel", "events", "seed", "seed-iso", "firmware", "in0", "x-1", "x-file"]
TEXTS = st.text(max_size=12) | st.text("\0\n\udcff", max_size=3) | st.sampled_from(NAMES)
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "image": some(*sorted(IMAGES)),
    "cpus": some(1, 2, 4),
    "max_cpus": some(4, 8, 200),
    "sockets": some(1, 2),
    "threads": some(1, 2),
    "memory": some("512M", "1GiB", 5 * 10**8),
    "disk_size": some("3GiB", "64TiB"),
    "disks": st.lists(
        st.builds(
            DiskRequest,
            size=st.sampled_from(["1GiB", 10**9]),
            image=some("plain", "cd", "floppy"),
            bus=st.sampled_from(["scsi", None, *get_args(model.Bus)]),
        ),
        max_size=12,
    ).map(tuple),
    "ports": st.sets(st.integers(1, 65535), max_size=3).map(
        lambda numbers: tuple(PortSpec(host_port=number, guest_port=80) for number in numbers)
    ),
    "restrict_network": st.booleans(),
    "firmware": some("uefi"),
    "cdrom": st.lists(st.just("cd"), max_size=2).map(tuple),
    "disk_bus": some(*get_args(model.Bus)),
    "nic_model": some("virtio", "e1000e", "e1000"),
    "display": some("none", "vga", "virtio"),
}
ODD: dict[str, st.SearchStrategy[Any]] = {
    "cpus": st.integers(-2, 300) | st.just(2**70),
    "max_cpus": st.integers(-2, 300) | st.just(2**70),
    "sockets": st.integers(-1, 4),
    "threads": st.integers(-1, 4),
    "cpu_model": st.sampled_from(["max", "host", "max,+avx", "", "-cpu", "a b", "größe", "x\n"]),
    "memory": st.integers(-1, 2**50) | st.sampled_from(["64TiB", "no size", "", "0"]),
    "disk_size": st.integers(-1, 2**48) | st.sampled_from(["1GiB", "65TiB", ""]),
    "disks": st.lists(
        st.builds(
            DiskRequest,
            name=st.sampled_from(["", *NAMES]) | TEXTS,
            size=st.sampled_from([None, "1GiB", "0"]),
            image=some(*sorted(IMAGES)),
            bus=some(*get_args(model.Bus)),
        ),
        max_size=40,
    ).map(tuple),
    "ports": st.lists(
        st.builds(
            PortSpec,
            host_port=st.integers(-1, 65536),
            guest_port=st.integers(-1, 65536),
            host_address=st.sampled_from(["127.0.0.1", "0.0.0.0", "::1", "localhost", "1.2.3.4,x", "01.2.3.4"]) | TEXTS,
            protocol=st.sampled_from(get_args(model.Protocol)),
        ),
        max_size=3,
    ).map(tuple),
    "network": st.just("none"),
    "mac": st.sampled_from(["52:54:00:12:34:56", "52-54-00-12-34-56", "01:00:5e:00:00:01", "00:00:00:00:00:00"])
    | TEXTS,
    "arch": st.sampled_from(get_args(model.Arch)),
    "machine": st.sampled_from(get_args(model.Machine)),
    "firmware": st.sampled_from(get_args(model.Firmware)),
    "cdrom": st.lists(st.sampled_from(sorted(IMAGES)), max_size=3).map(tuple),
    "cmdline": TEXTS | st.text(min_size=1800, max_size=2100),
}


@st.composite
def requests(draw: st.DrawFn) -> CreateRequest:
    odd = draw(st.sets(st.sampled_from(sorted(ODD)), max_size=2))
    chosen = {name: draw(ODD[name] if name in odd else FITTING[name]) for name in sorted({*FITTING, *odd})}
    return CreateRequest(**chosen)


SEEDS = st.sampled_from([SeedSpec(), SeedSpec(user="me")])


@settings(max_examples=500)
@given(requests(), st.integers(1, 1000), SEEDS)
def test_a_request_is_refused_with_a_reason_or_its_machine_can_be_planned(
    request: CreateRequest, host_cpus: int, seed: SeedSpec
) -> None:
    try:
        spec = resolved(as_request(request, {}), host_cpus=host_cpus, seed=seed)
    except (InvalidInput, Unsupported) as refused:
        event("refused")
        assert refused.what
        assert refused.text.isprintable()
        assert len(refused.text) < 500
        return
    event("planned")
    launch = planned(spec)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=VmSpec) == spec
    for names in names_in(launch).values():
        assert len(set(names)) == len(names)
    assert max((len(name) for name in names_in(launch)["nodes"]), default=0) <= 31
    assert all("\0" not in word for word in launch.argv)


def names_in(launch: LaunchPlan) -> dict[str, list[str]]:
    """Everything in a plan that must be there once."""
    devices, nodes = [], []
    for flag, value in zip(launch.argv, launch.argv[1:], strict=False):
        if flag in ("-device", "-blockdev") and value.startswith("{"):
            (devices if flag == "-device" else nodes).append(json.loads(value))
    return {
        "descriptors": [each.name for each in (*launch.files, *launch.listeners, *launch.feeds, *launch.networks)],
        "nodes": [node["node-name"] for node in nodes],
        "devices": [device["id"] for device in devices],
        "slots": [device["addr"] for device in devices if device.get("bus") == "pcie.0"],
        "channels": [
            str(device["bus"]) for device in devices if str(device.get("bus", "")).startswith(("ide", "ahci"))
        ],
    }


# What comes from where


def test_what_is_not_asked_comes_from_the_image_or_from_atoll() -> None:
    spec = created()
    assert (spec.machine, spec.machine_type, spec.arch) == ("q35", "pc-q35-10.0", "x86_64")
    assert spec.memory == LINUX.memory
    assert spec.display == "none"
    assert (spec.boot.firmware, spec.boot.kernel, spec.boot.cmdline) == ("kernel", LINUX.kernel, LINUX.cmdline)
    assert [(disk.name, disk.size, disk.bus) for disk in spec.disks] == [("root", 2 * GIB, "virtio")]
    assert (spec.cpu.count, spec.cpu.maximum) == (1, 4)
    (nic,) = spec.nics
    assert re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", nic.mac)
    blank = resolved(CreateRequest(disk_size="1GiB"))
    assert (blank.memory, blank.boot.firmware, blank.display) == (GIB, "bios", "vga")


def test_what_is_asked_comes_first() -> None:
    spec = created(
        cpus=2, max_cpus=8, threads=2, memory="300MB", disk_size="5GiB", disk_bus="nvme", firmware="uefi",
        display="virtio", mac="52:54:00:AA:BB:CC", nic_model="e1000e", cpu_model="qemu64", accelerator="tcg",
    )  # fmt: skip
    assert (spec.cpu.count, spec.cpu.maximum, spec.cpu.threads, spec.cpu.model) == (2, 8, 2, "qemu64")
    assert spec.memory == 287 * MIB  # rounded up
    assert [(disk.size, disk.bus, disk.layer) for disk in spec.disks] == [(5 * GIB, "nvme", "above")]
    assert (spec.boot.firmware, spec.boot.kernel) == ("uefi", None)
    assert spec.nics == (NicSpec(name="net0", mac="52:54:00:aa:bb:cc", model="e1000e"),)
    assert created(cmdline="single").boot.cmdline == "console=ttyS0 single"
    assert created(network="none").nics == ()


def test_other_architectures_have_their_own_machine_and_firmware() -> None:
    spec = resolved(CreateRequest(arch="aarch64", disk_size="1GiB", cpus=3))
    assert (spec.machine, spec.machine_type, spec.boot.firmware, spec.display) == (
        "virt",
        "virt-10.0",
        "uefi",
        "virtio",
    )
    assert (spec.cpu.count, spec.cpu.maximum) == (3, 3)  # only a q35 takes CPUs while it runs
    assert resolved(CreateRequest(image="arm", cdrom=("cd",))).disks[1].bus == "scsi"


def test_disks_are_named_in_their_order_and_cds_come_last() -> None:
    request = CreateRequest(
        image="cd",
        disk_size="1GiB",
        disks=(DiskRequest(size="2GiB"), DiskRequest(name="cd0", size="3GiB"), DiskRequest(image="plain", bus="scsi")),
        cdrom=("cd", "cd"),
    )
    named = [(disk.name, disk.size, disk.bus, disk.media) for disk in resolved(request).disks]
    assert named == [
        ("root", GIB, "virtio", "disk"),
        ("cdrom", MIB, "sata", "cdrom"),
        ("data1", 2 * GIB, "virtio", "disk"),
        ("cd0", 3 * GIB, "virtio", "disk"),
        ("cd1", MIB, "sata", "cdrom"),
        ("cd2", MIB, "sata", "cdrom"),
        ("data2", 2 * GIB, "scsi", "disk"),
    ]


# What is refused

MANY = tuple(DiskRequest(size="1GiB") for _ in range(30))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cpus": 0}, "0 CPUs of at most 4 can't be"),
        ({"cpus": 4, "max_cpus": 2}, "4 CPUs of at most 2"),
        ({"cpus": 289}, "a VM has 1 to 288"),
        ({"cpus": 3, "sockets": 2}, "3 CPUs don't divide into 2 sockets"),
        ({"sockets": 0}, "0 sockets"),
        ({"threads": 0}, "sockets of 0 threads"),
        ({"cpu_model": "max; rm"}, "isn't a CPU model"),
        ({"memory": "1MiB"}, "1MiB of memory can't be"),
        ({"memory": "17TiB"}, "16MiB to 16TiB"),
        ({"memory": "much"}, "not a size"),
        ({"memory": -1}, "not a size"),
        ({"disk_size": "1GiB"}, "disks only grow"),
        ({"disk_size": "1"}, "a disk of 1B can't be"),
        ({"disk_size": "65TiB"}, "1MiB to 64TiB"),
        ({"disks": (DiskRequest(name="data"),)}, "the disk 'data' has no size"),
        ({"disks": (DiskRequest(name="Data", size="1GiB"),)}, "can't be the name of a disk: it has"),
        ({"disks": (DiskRequest(name="x" * 21, size="1GiB"),)}, "can't be the name of a disk: it has"),
        ({"disks": (DiskRequest(name="x-1", size="1GiB"),)}, "can't be the name of a disk: it has"),
        ({"disks": (DiskRequest(name="x-file", size="1GiB"),)}, "can't be the name of a disk: it has"),
        ({"disks": (DiskRequest(name="root", size="1GiB"),)}, "there is a disk 'root' already"),
        ({"disks": (DiskRequest(image="only"),)}, "the image only has no disk"),
        ({"disks": (DiskRequest(image="floppy", bus="sata"),)}, "a sata disk can't be"),
        ({"disks": tuple(replace(disk, bus="sata") for disk in MANY[:7])}, "7 sata disks are too many: sata takes 6"),
        ({"disks": tuple(replace(disk, bus="floppy") for disk in MANY[:3])}, "floppy takes 2"),
        ({"disks": MANY}, "too many for one machine: it has 30 slots"),
        ({"cdrom": ("plain",)}, "the image plain isn't a CD"),
        ({"ports": (PortSpec(host_port=0, guest_port=80),)}, "0 isn't a port"),
        ({"ports": (PortSpec(host_port=80, guest_port=65536),)}, "65536 isn't a port"),
        ({"ports": (PortSpec(host_port=80, guest_port=80, host_address="::1"),)}, "isn't an IPv4 address"),
        ({"ports": (PortSpec(host_port=8080, guest_port=80),), "network": "none"}, "without a network"),
        ({"mac": "52:54:00:12:34"}, "isn't a hardware address"),
        ({"mac": "01:00:5e:00:00:01"}, "isn't a hardware address of one card"),
        ({"mac": "00:00:00:00:00:00"}, "isn't a hardware address"),
        ({"arch": "aarch64"}, "the image linux is for x86_64, not aarch64"),
        ({"machine": "virt"}, "the machine 'virt' isn't for x86_64"),
        ({"firmware": "bios"}, "the image linux can't boot by bios: it boots by kernel or uefi"),
        ({"image": "plain", "cmdline": "quiet"}, "--cmdline needs a kernel"),
        ({"image": "micro", "firmware": "uefi"}, "the machine 'microvm' has no UEFI"),
        ({"image": "arm", "firmware": "bios"}, "arm64 machines have no BIOS"),
        ({"image": None, "firmware": "kernel"}, "there is no kernel to boot directly"),
        ({"image": None, "arch": "riscv64", "machine": "q35", "disk_size": "1GiB"}, "Use --machine virt"),
        ({"cmdline": "x" * 1900}, "it has 1914 bytes of at most 1900"),
        ({"cmdline": "x\0y"}, "zero byte"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_the_reason(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        created(**options)
    assert why in refused.value.text


def test_a_bus_or_machine_that_is_not_there_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"the machine 'microvm' has no floppy drive\. Use --machine q35"):
        created(image="micro", disks=(DiskRequest(image="floppy"),))
    without = replace(CAPS["x86_64"], machines={})
    with pytest.raises(Unsupported, match=r"this QEMU \(10\.0\.2\) has no machine 'q35'. Run `atoll doctor`"):
        resolve(CreateRequest(), image=LINUX, cdroms=[], caps=without, host_cpus=1, seed=SeedSpec())


def test_scsi_takes_as_many_disks_as_it_has_targets() -> None:
    disks = tuple(DiskRequest(size="1GiB", bus="scsi") for _ in range(257))
    assert len(created(disks=disks[:256]).disks) == 257
    with pytest.raises(InvalidInput, match="257 scsi disks are too many"):
        created(disks=disks)


def test_options_are_checked_whichever_way_they_come() -> None:
    assert as_request("tiny", {"memory": "1G"}) == as_request(CreateRequest(image="tiny"), {"memory": "1G"})
    request = CreateRequest(image="tiny", disks=(DiskRequest(size=5),), ports=(PortSpec(host_port=1, guest_port=2),))
    assert as_request(request, {}) == request
    for image in ("tiny", CreateRequest(image="tiny")):
        for options in ({"colour": "red"}, {"cpus": "two"}, {"memory": 1.5}, {"disk_bus": "usb"}, {"ports": [8080]}):
            with pytest.raises(InvalidInput, match="that can't be created: "):
                as_request(image, options)
    with pytest.raises(InvalidInput, match="can't be created"):
        as_request(CreateRequest(memory=1.5), {})  # type: ignore[arg-type]


def test_text_that_is_not_utf_8_is_refused() -> None:
    for options in ({"labels": {"a": "\udcff"}}, {"cmdline": "\ud800"}, {"password": "\udcff"}, {"name": "x\udcff"}):
        with pytest.raises(InvalidInput, match="aren't UTF-8") as refused:
            as_request("tiny", options)
        assert refused.value.text.isprintable()


@pytest.mark.parametrize("key", ["", "-a", "a b", "a=b", "größe", "🐧", "a\n", "x" * 64])
def test_labels_have_plain_keys_and_any_value(key: str) -> None:
    assert check_labels({"team/x.y-z_1": "größe 🐧\n", "0": ""})
    with pytest.raises(InvalidInput, match="can't be a label"):
        check_labels({"fine": "", key: "x"})


# Made up


def test_a_made_up_name_is_one_that_is_not_taken() -> None:
    taken: set[str] = set()
    for _ in range(700):  # more than there are pairs of words
        name = made_up_name(taken)
        assert re.fullmatch(r"[a-z]+-[a-z]+(-[0-9a-f]{6})?", name)
        assert name not in taken
        taken.add(name)


def test_made_up_addresses_are_for_one_card() -> None:
    assert all(created(mac=new_mac()).nics for _ in range(50))


def test_made_up_names_of_disks_never_run_out() -> None:
    disks = [model.DiskSpec(name=f"data{number}", size=1) for number in range(1, 1200)]
    assert further_disk(DiskRequest(size="1GiB"), disks).name == "data1200"
