"""The audit log: appended to, rotated, read and followed."""

import asyncio
from pathlib import Path

from atoll.model.audit import AuditEntry
from atoll.store.audit import KEPT, AuditLog, entries, past


def entry(number: int) -> AuditEntry:
    return AuditEntry(at=number, principal="ci", via="remote", address="::1", call="vm.start", status=200)


def test_what_is_added_is_read_oldest_first_across_files(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", largest=500)
    for number in range(12):
        log.add(entry(number))
    assert [each.at for each in past(tmp_path / "audit.jsonl")] == list(range(12))
    assert [each.at for each in past(tmp_path / "audit.jsonl", tail=2)] == [10, 11]
    assert past(tmp_path / "audit.jsonl", tail=0) == []
    assert len(list(tmp_path.iterdir())) > 2
    assert {each.stat().st_mode & 0o777 for each in tmp_path.iterdir()} == {0o600}


def test_it_doesnt_grow_for_ever(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", largest=200)
    for number in range(100):
        log.add(entry(number))
    assert len(list(tmp_path.iterdir())) == KEPT + 1
    assert past(tmp_path / "audit.jsonl")[-1].at == 99


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl").add(entry(1))
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"at":2,"princ')
    assert [each.at for each in past(tmp_path / "audit.jsonl")] == [1]
    assert past(tmp_path / "nothing") == []


async def test_a_follower_sees_all_of_it_once(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, largest=500)
    log.add(entry(0))
    seen: list[float] = []

    async def follow() -> None:
        async for each in entries(path, follow=True, tail=1):
            seen.append(each.at)  # noqa: PERF401  # it never ends

    following = asyncio.create_task(follow())
    for number in range(1, 6):
        await asyncio.sleep(0.6)
        log.add(entry(number))
        log.add(entry(number + 0.5))
    async with asyncio.timeout(10):
        while len(seen) < 11:
            await asyncio.sleep(0.1)
    following.cancel()
    assert seen == [0, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5]
