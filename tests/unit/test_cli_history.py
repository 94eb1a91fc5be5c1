"""The tree that `atoll history` draws."""

from atoll.cli.history import tree
from atoll.model.snapshot import HistoryNode, Snapshot
from atoll.model.spec import VmSpec


def drawn(*parents: tuple[str, str | None]) -> list[str]:
    nodes = [
        HistoryNode(
            snapshot=Snapshot(
                id=name, name=name, vm_id="v", vm_name="v", image="", created_at=0, spec=VmSpec(), parent=parent
            ),
            own=0,
            shared=0,
            heads=(),
        )
        for name, parent in parents
    ]
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
