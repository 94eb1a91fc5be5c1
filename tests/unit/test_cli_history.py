"""The tree and the graph that `atoll history` draws."""

import shutil
import subprocess

from atoll.cli.graph import dot
from atoll.cli.history import tree
from atoll.model.snapshot import HistoryNode, Snapshot
from atoll.model.spec import VmSpec


def node(name: str, parent: str | None = None, *, message: str = "", heads: tuple[str, ...] = ()) -> HistoryNode:
    snapshot = Snapshot(
        id=name,
        name=name,
        vm_id="v",
        vm_name="v",
        image="",
        created_at=0,
        spec=VmSpec(),
        parent=parent,
        message=message,
    )
    return HistoryNode(snapshot=snapshot, own=2048, shared=0, heads=heads)


def drawn(*parents: tuple[str, str | None]) -> list[str]:
    nodes = [node(name, parent) for name, parent in parents]
    return [line + node.snapshot.name for line, node in tree(nodes)]


def test_one_after_another_stand_below_each_other() -> None:
    assert drawn(("a", None), ("b", "a"), ("c", "b")) == ["a", "b", "c"]


def test_branches_have_lines() -> None:
    assert drawn(("a", None), ("b", "a"), ("c", "a"), ("d", "b"), ("e", "b")) == [
        "a",
        "├─ b",
        "│  ├─ d",
        "│  └─ e",
        "└─ c",
    ]


def test_one_whose_parent_is_forgotten_is_a_root() -> None:
    assert drawn(("a", "gone"), ("b", "a"), ("c", "elsewhere")) == ["a", "b", "c"]


def test_an_empty_history_and_a_long_one_are_drawn() -> None:
    assert drawn() == []
    assert len(drawn(("0", None), *((str(n), str(n - 1)) for n in range(1, 3000)))) == 3000


def test_the_graph_has_snapshots_what_came_after_them_and_vms_as_boxes() -> None:
    lines = list(dot("web", [node("a", "gone"), node("b", "a", heads=("web", "copy"))]))
    assert (lines[0], lines[-1]) == ('digraph "web" {', "}")
    assert lines[1].startswith('  "a" [label="a\\n19') and lines[1].endswith('disks, own 2KiB, shared 0B"];')
    assert '  "a" -> "b";' in lines
    assert '  "vm copy" [label="copy", shape=box];' in lines
    assert '  "b" -> "vm web" [style=dashed];' in lines
    assert not any("gone" in line for line in lines)
    assert list(dot("web", [])) == ['digraph "web" {', "}"]


def test_what_is_said_of_a_snapshot_stays_in_its_quotes() -> None:
    said = 'a "quoted"\\\nword\\N \x1b[31m; } <b>'
    lines = list(dot("v", [node("a", message=said)]))
    assert len(lines) == 3
    assert lines[1].endswith('\\na \\"quoted\\"\\\\\\nword\\\\N \\\\x1b[31m; } <b>"];')
    if shutil.which("dot"):
        assert subprocess.run(["dot", "-Tplain"], input="\n".join(lines), text=True).returncode == 0
