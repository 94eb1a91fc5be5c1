"""A history as a graph, in Graphviz' language (graphviz.org/doc/info/lang.html)."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from atoll.cli.failures import printable
from atoll.cli.output import moment
from atoll.model.units import format_size

if TYPE_CHECKING:
    from atoll.model.snapshot import HistoryNode


def dot(name: str, nodes: "Sequence[HistoryNode]") -> Iterator[str]:
    """The lines of a graph: snapshots, those that were taken after them, and as boxes the VMs that stand on them."""
    known = {node.snapshot.id for node in nodes}
    yield f"digraph {quoted(name)} {{"
    for node in nodes:
        yield f"  {quoted(node.snapshot.id)} [label={quoted(*_label(node))}];"
    for node in nodes:
        if node.snapshot.parent in known:
            yield f"  {quoted(node.snapshot.parent or '')} -> {quoted(node.snapshot.id)};"
        for head in node.heads:
            # No id has this form, so a VM's node is never taken for a snapshot's.
            yield f"  {quoted(f'vm {head}')} [label={quoted(head)}, shape=box];"
            yield f"  {quoted(node.snapshot.id)} -> {quoted(f'vm {head}')} [style=dashed];"
    yield "}"


def _label(node: "HistoryNode") -> list[str]:
    snapshot = node.snapshot
    has = "memory" if snapshot.memory is not None else "disks"
    lines = [snapshot.name, moment(snapshot.created_at)]
    lines.append(f"{has}, own {format_size(node.own)}, shared {format_size(node.shared)}")
    return [*lines, snapshot.message] if snapshot.message else lines


def quoted(*lines: str) -> str:
    """A string as Graphviz takes it. In labels a backslash begins an escape, so each is doubled."""
    texts = (printable(line).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for line in lines)
    return '"' + "\\n".join(texts) + '"'
