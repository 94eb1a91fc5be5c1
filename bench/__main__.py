"""Measures Atoll beside raw QEMU and, with --peers, libvirt: `./dev bench [--peers] [--quick]`."""

import argparse
import asyncio
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import agent, barriers, consolidation, history, libvirt, networks, raw, report
from bench.harness import Case, Figures, Goal, measure
from bench.ours import NAME, TWIN, Atoll

HERE = Path(__file__).resolve().parent


def tell(text: str) -> None:
    """Say something to whoever waits."""
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="measure libvirt too (./dev installs it)")
    parser.add_argument("--quick", action="store_true", help="two repetitions and 50 VMs: only to see that it works")
    parser.add_argument("--repetitions", type=int, default=9, help="how often each thing is measured")
    parser.add_argument("--vms", type=int, default=1000, help="how many stopped VMs `ls` meets")
    return parser.parse_args()


def main() -> None:
    """Measure, write the results, print the table."""
    options = arguments()
    repetitions, many = (2, 50) if options.quick else (options.repetitions, options.vms)
    # libvirt's QEMU may be another user's; our home keeps its own modes.
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as folder, contextlib.ExitStack() as stack:
        home = Path(folder)
        atoll = Atoll(home / "home")
        tell("Building the tiny image")
        image = atoll.prepare()
        hand = twin(atoll, home)
        kvm, daemon = hand.accelerator == "kvm", None
        if options.peers:
            daemon = stack.enter_context(libvirt.daemon())
            stack.callback(libvirt.undefine_all)
        about = report.machine(accelerator=hand.accelerator, peers=options.peers)
        peer = prepare_peer(atoll, image, hand, home, kvm=kvm) if options.peers else None
        rows = [
            *(measure(case, tell) for case in starts(atoll, hand, repetitions, peers=options.peers)),
            *(measure(case, tell) for case in barriers.cases(repetitions)),
            *networks_of(
                atoll,
                hand,
                home / "networks",
                repetitions,
                peer=networks.Peer(peer, daemon) if peer and daemon else None,
            ),
            *execs(atoll, hand, repetitions, peers=options.peers),
            *history.figures(atoll, home / "history", repetitions, tell, peers=options.peers),
            *listings(atoll, peer, home, many, repetitions),
            *consolidation.figures(crowd(home), tell, 8 if options.quick else 50),
        ]
        results = home / "results" if options.quick else HERE / "results"
        page = home / "performance.md" if options.quick else HERE.parent / "docs/performance.md"
        file = report.write(results, page, about, rows)
        print(report.as_table(rows))
        tell("" if options.quick else f"Written: {file}, {page}")


def crowd(home: Path) -> dict[str, str]:
    """The environment of a home that has the image and no VM yet."""
    atoll = Atoll(home / "crowd")
    atoll.run("image", "build", "tiny")
    return atoll.env


def twin(atoll: Atoll, home: Path) -> raw.ByHand:
    """The command line of the VM that is started by hand."""
    sockets = home / "sockets"
    sockets.mkdir()
    with atoll.booted(TWIN):
        pass  # its folders are made, and its first boot is behind it, as with the other one
    with atoll.booted(NAME):
        pass
    return asyncio.run(raw.by_hand(atoll.layout, TWIN, sockets=sockets))


def prepare_peer(atoll: Atoll, image: dict[str, Any], hand: raw.ByHand, home: Path, *, kvm: bool) -> libvirt.Domain:
    """libvirt's domain: the image's kernel, and an overlay of its own on the image's disk."""
    layout = atoll.layout
    home.chmod(0o755)
    disk = home / "peer.qcow2"
    layer = layout.layer(image["disks"][0]["layer"])
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", layer, disk], check=True, capture_output=True
    )
    domain = libvirt.Domain(
        kernel=layout.blob(image["kernel"]),
        initrd=layout.blob(image["initrd"]),
        cmdline=hand.argument("-append"),
        disk=disk,
        kvm=kvm,
    )
    libvirt.undefine_all()
    domain.define()
    return domain


def starts(atoll: Atoll, hand: raw.ByHand, repetitions: int, *, peers: bool) -> list[Case]:
    """Starting a VM."""
    return [
        Case(
            "start returns",
            repetitions,
            {
                "atoll": atoll.start,
                "raw": lambda: raw.start(hand),
                **({"virsh": libvirt.start} if peers else {}),
            },
            (Goal("raw", 1.5), Goal("virsh", 0.4)),
        ),
        Case(
            "start of a confined one",
            repetitions,
            {"atoll": atoll.start, "unconfined": atoll.start_unconfined},
            (Goal("unconfined", plus=10),),
        ),
        Case(
            "guest answers",
            repetitions,
            {
                "atoll": atoll.ready,
                "raw": lambda: raw.ready(hand),
                **({"virsh": libvirt.ready} if peers else {}),
            },
            (Goal("raw", 1.05),),
        ),
    ]


def networks_of(
    atoll: Atoll, hand: raw.ByHand, folder: Path, repetitions: int, *, peer: networks.Peer | None
) -> list[Figures]:
    """Throughput and latency, with the guests up for as long. A libvirtd that isn't ours has the machine's own network,
    which is left alone.
    """
    with networks.cases(atoll, hand, folder, repetitions, peer=peer) as cases:
        return [measure(case, tell) for case in cases]


def execs(atoll: Atoll, hand: raw.ByHand, repetitions: int, *, peers: bool) -> Iterator[Figures]:
    """Running `true` in guests that are up, and what stays beside them."""
    with contextlib.ExitStack() as guests:
        guests.enter_context(atoll.booted())
        beside = {"atoll": atoll.resident}
        yield measure(Case("processes beside a running VM", 1, beside, (Goal(limit=0),), unit=""), tell)
        with raw.going(hand):
            tell("exec, connection open")
            values = json.loads(atoll.sdk("exec", NAME, str(hand.socket("agent")), str(3 * repetitions)))
        yield Figures(case="exec, connection open", unit="ms", goals=(Goal("raw", 1.5),), values=values)
        whole = {"atoll": atoll.exec_true}
        if peers:
            guests.enter_context(libvirt.booted())
            yield measure(Case("memory of daemons", 1, {"virsh": libvirt.resident_memory}, unit="MiB"), tell)
            whole["virsh"] = libvirt.exec_true
        yield measure(Case("exec, whole process", repetitions, whole, (Goal(limit=150),)), tell)


def listings(atoll: Atoll, peer: libvirt.Domain | None, home: Path, count: int, repetitions: int) -> Iterator[Figures]:
    """The agent, with many stopped VMs among what it is asked for; and listing them."""
    bindings: dict[str, list[float]] = {}
    sides = {"atoll": atoll.ls}
    if peer is not None:
        folder = home / "domains"
        folder.mkdir()
        libvirt.fill(count, folder, peer)
        bindings = libvirt.binding_lists(count, 3 * repetitions)
        sides["virsh"] = libvirt.list_all
    tell("The agent")
    yield from agent.figures(atoll.env, count, bindings)
    tell(f"Creating {count} VMs")
    began = time.perf_counter()
    atoll.sdk("fill", str(count))
    tell(f"  took {time.perf_counter() - began:.0f} s")
    yield measure(Case(f"ls, {count} stopped VMs", repetitions, sides, (Goal(limit=100), Goal("virsh", 1))), tell)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip() if error.stderr else ""
        sys.exit(f"Error: {shlex.join(map(str, error.cmd))} failed (exit code {error.returncode}): {said}")
