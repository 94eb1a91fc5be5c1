"""Tokens: made, shown once, exchanged once, revoked; seen at once by whoever has the file open."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atoll.errors import AlreadyExists, InvalidInput, NotFound, RecordsFailed, Unauthorized
from atoll.model.token import JoinRequest, includes
from atoll.store.tokens import Tokens


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "agent" / "tokens.json"


def test_a_token_opens_until_it_is_revoked(file: Path) -> None:
    agent, command = Tokens(file), Tokens(file)
    token, secret = command.create("ci", scope="operate")
    assert agent.of_bearer(secret) == token
    command.rm("ci")
    with pytest.raises(Unauthorized, match="revoked"):
        agent.of_bearer(secret)
    assert not agent.is_good(token.id)


def test_the_secret_is_kept_nowhere(file: Path) -> None:
    _, secret = Tokens(file).create("ci", scope="operate")
    assert secret.split(".")[2] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change", [lambda text: text + "x", lambda text: text[:-1], lambda text: text.upper(), str.title]
)
def test_what_is_almost_a_token_opens_nothing(file: Path, change: object) -> None:
    _, secret = Tokens(file).create("ci", scope="admin")
    assert callable(change)
    with pytest.raises(Unauthorized):
        Tokens(file).of_bearer(change(secret))


@pytest.mark.parametrize("shown", ["", ".", "..", "atoll", "atoll..", "atoll.ffffffffffff.", "é.é.é"])
def test_nonsense_opens_nothing(file: Path, shown: str) -> None:
    with pytest.raises(Unauthorized):
        Tokens(file).of_bearer(shown)


def test_an_expired_token_says_until_when_it_was_good(file: Path) -> None:
    tokens = Tokens(file)
    token, secret = tokens.create("ci", scope="operate", expires_in=0)
    with pytest.raises(Unauthorized, match=r"'ci' has expired.*UTC"):
        tokens.of_bearer(secret)
    assert not tokens.is_good(token.id)
    assert [(each.name, each.expired) for each in tokens.ls()] == [("ci", True)]


def test_a_join_token_is_exchanged_once(file: Path) -> None:
    tokens = Tokens(file)
    _, shown = tokens.create_join(scope="read", expires_in=60, fingerprint="ab" * 32)
    secret, _, fingerprint = shown.rpartition(".")
    assert fingerprint == "ab" * 32
    with pytest.raises(Unauthorized):
        tokens.of_bearer(secret)

    joined = tokens.join(JoinRequest(secret=secret, name="ann@laptop"))
    assert (joined.name, joined.scope) == ("ann@laptop", "read")
    assert tokens.of_bearer(joined.token).scope == "read"
    with pytest.raises(Unauthorized, match="used already"):
        tokens.join(JoinRequest(secret=secret, name="eve@laptop"))


def test_who_joins_under_a_name_that_is_taken_gets_another(file: Path) -> None:
    tokens = Tokens(file)
    tokens.create("ann", scope="admin")
    _, shown = tokens.create_join(scope="read", expires_in=60, fingerprint="")
    assert tokens.join(JoinRequest(secret=shown.removesuffix("."), name="ann")).name == "ann-2"


def test_a_certificate_of_a_token_that_was_made_anew_is_not_good(file: Path) -> None:
    tokens = Tokens(file)
    first, _ = tokens.create("ci", scope="admin")
    assert tokens.of_certificate("ci", first.id) == first
    tokens.rm("ci")
    tokens.create("ci", scope="admin")
    with pytest.raises(Unauthorized, match="revoked"):
        tokens.of_certificate("ci", first.id)


@pytest.mark.parametrize("name", ["", "local", "nobody", "a b", "ä", "x" * 64, "-x"])
def test_names_that_mislead_are_refused(file: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        Tokens(file).create(name, scope="read")
    assert not file.exists()


def test_errors_change_nothing(file: Path) -> None:
    tokens = Tokens(file)
    tokens.create("ci", scope="read")
    before = file.read_bytes()
    with pytest.raises(AlreadyExists):
        tokens.create("ci", scope="admin")
    with pytest.raises(NotFound, match="token ls"):
        tokens.rm("nix")
    assert file.read_bytes() == before
    file.write_bytes(b"{")
    with pytest.raises(RecordsFailed):
        tokens.create("other", scope="read")
    assert file.read_bytes() == b"{"


def test_many_change_it_at_once_and_nothing_is_lost(file: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: Tokens(file).create(f"t{number}", scope="read"), range(32)))
    assert len(Tokens(file).ls()) == 32


def test_uses_are_noted(file: Path) -> None:
    tokens = Tokens(file)
    token, _ = tokens.create("ci", scope="read")
    tokens.note_uses({token.id: 5.0})
    tokens.note_uses({token.id: 3.0, "gone": 9.0})
    assert tokens.ls()[0].last_used_at == 5.0


def test_each_scope_has_those_before_it() -> None:
    assert includes("admin", "read") and includes("operate", "operate")
    assert not includes("read", "operate") and not includes("operate", "admin")
