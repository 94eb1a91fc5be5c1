"""The figures as JSON and as a Markdown table."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.host import facts
from atoll.model.units import format_size
from bench.harness import Figures, Goal

SIDES = ("atoll", "raw", "virsh")
TITLES = {"atoll": "Atoll", "raw": "raw QEMU", "virsh": "libvirt"}


def machine(*, accelerator: str, peers: bool) -> dict[str, str]:
    """What the figures were taken on."""
    cpu = facts.cpu()
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processors": f"{cpu.count} x {cpu.model}",
        "memory": format_size(facts.memory().total),
        "system": f"{platform.freedesktop_os_release().get('PRETTY_NAME', 'Linux')}, kernel {platform.release()}",
        "python": platform.python_version(),
        "qemu": _first_line("qemu-system-x86_64", "--version"),
        "accelerator": accelerator,
        "commit": _first_line("git", "rev-parse", "--short", "HEAD"),
        "load before": " ".join(f"{value:.1f}" for value in os.getloadavg()),
    }
    return found | ({"libvirt": _first_line("virsh", "--version")} if peers else {})


def _first_line(*argv: str) -> str:
    finished = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    return (finished.stdout.splitlines() or ["unknown"])[0]


def as_json(about: dict[str, str], rows: Sequence[Figures]) -> str:
    """Everything that was measured, each repetition."""
    cases: list[dict[str, Any]] = [
        {
            "case": row.case,
            "unit": row.unit,
            "medians": {side: row.median(side) for side in row.values},
            "values": row.values,
            "errors": row.errors,
            "goals": [{"goal": goal.text(row.unit), "met": row.met(goal)} for goal in row.goals],
        }
        for row in rows
    ]
    return json.dumps({"machine": about, "cases": cases}, indent=2, ensure_ascii=False) + "\n"


def as_table(rows: Sequence[Figures]) -> str:
    """The medians side by side, with Atoll's ratio to each other side and what was aimed at."""
    lines = [
        "| case | " + " | ".join(TITLES[side] for side in SIDES) + " | Atoll / raw | Atoll / libvirt | goal | met |",
        "|---|" + "---:|" * (len(SIDES) + 2) + "---|---|",
    ]
    for row in rows:
        figures = [_figure(row, side) for side in SIDES]
        ratios = [_ratio(row, side) for side in SIDES[1:]]
        goals = [_told(goal, row) for goal in row.goals]
        met = [{True: "yes", False: "**no**", None: "-"}[row.met(goal)] for goal in row.goals]
        lines.append("| " + " | ".join([row.case, *figures, *ratios, "; ".join(goals), "; ".join(met)]) + " |")
    return "\n".join(lines) + "\n"


def _told(goal: Goal, row: Figures) -> str:
    """With the figure of a side that has no column."""
    text = goal.text(row.unit).replace("virsh", "libvirt")
    return text if not goal.side or goal.side in SIDES else f"{text} ({goal.side}: {_figure(row, goal.side)})"


def _figure(row: Figures, side: str) -> str:
    if side in row.errors:
        return "failed"
    median = row.median(side)
    if median is None:
        return ""
    return f"{median:.0f} {row.unit}".rstrip() if median >= 10 or median == int(median) else f"{median:.1f} {row.unit}"


def _ratio(row: Figures, side: str) -> str:
    ours, other = row.median("atoll"), row.median(side)
    return f"{ours / other:.2f}" if ours is not None and other else ""


def write(folder: Path, page: Path, about: dict[str, str], rows: Sequence[Figures]) -> Path:
    """The JSON file in `folder`, named by the time, and the page with the last run's table."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{about['date'].replace(' UTC', '').replace(' ', 'T').replace(':', '')}.json"
    file.write_text(as_json(about, rows))
    facts_of_it = "\n".join(f"- {name}: {value}" for name, value in about.items())
    page.write_text(f"{INTRODUCTION}\n{as_table(rows)}\n## Taken on\n\n{facts_of_it}\n\n{NOTES}")
    return file


INTRODUCTION = """# Performance

Written by `./dev bench --peers`; the last run. Medians; the sides take turns, so that each meets the same load.
"""
NOTES = """## What is measured

- **start returns**: the whole `atoll start`, and the whole `virsh start`; raw QEMU is the very command line and
  descriptors of that VM, started by hand, until QMP says that the guest runs.
- **spawn**: a small program (`true`) until it runs, with the preparation of the jail that a VM has, behind all
  barriers and with one left out; raw is the same without any.
- **MiB and ping through networks**: by the guest's clock (published port: by the host's). Between two guests on a
  shared network (raw: taps on a bare bridge in a namespace, without guards), from a guest to an address of its host
  through slirp4netns (raw: QEMU's own slirp), and from the host through a port that is published on 127.0.0.1.
  libvirt's guests are on a network as its `default` is, in a namespace of its own, and its host is that one's bridge.
- **guest answers**: the same until the tiny guest's agent has answered. libvirt's domain has the same kernel, command
  line, memory and kinds of devices.
- **exec, whole process**: `atoll exec VM -- true`; for libvirt the `virsh qemu-agent-command` calls that start `true`
  and ask for its end.
- **exec, connection open**: the SDK's `exec` beside the agent's own exchange on its socket.
- **longest silence in a live snapshot**: a guest that writes to its serial line without end, and the longest time
  between two of its lines while the snapshot is taken: by Atoll, by the same QMP commands by hand on the same VM, and
  by `virsh snapshot-create-as --live` with memory. The guest has 512 MiB, of which about 185 MB were touched.
- **restore to running**: Atoll's includes halting the present machine first; by hand it is QEMU's start, the load of
  the same memory, and `cont`; for libvirt a whole `virsh restore`.
- **fork**: until the copy runs. By hand: QEMU's start on the same mapped memory, the load of the devices, and `cont`.
- **the agent**: over its Unix socket. `list` from one client again and again, which isn't sent again what hasn't
  changed; `a client's first time` is all of it. libvirt's Python binding, with its connection open, asks for all states
  at once, and then for each domain's. Small requests: one client, 16 connections, two processors for both; the goal is
  1,000 a second. An event of a command's, from the call that records it, on the disk, to a client that follows; one of
  QEMU's, from the time that QEMU gives it, also while a program for each processor never waits. HTTPS: on a connection
  that is open, with a token; with a connection of its own the client also asks which VM that is.
- **idle tiny VMs**: booted one by one, 128 MiB each, with their network helpers. Their memory is the sum of all
  processes' proportional sets (what several have is counted once), and beside it by how much the host's available
  memory fell since there were none, which whatever else runs there blurs. With pages merged: after scans find nothing
  more, with the time and the kernel's processor time that took. Under emulation a third and more of an idle VM is
  QEMU's translated code, which can't be merged; under KVM there is none. Suspended when idle: each after 20 s in
  which nobody used it (`--suspend-when-idle`); what is left is helpers of cards with published ports, and these have
  none. The agent's memory is that after a minute of lists, figures and events.
- **ls**: with that many stopped VMs; whole processes.
- **processes beside a running VM**: those of ours that stay, beside QEMU and the helper of its network
  (slirp4netns, with under 1 MiB of its own). libvirt's memory is that of its daemons.
"""
