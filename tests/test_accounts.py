"""Accounts: who somebody is, what proves it, and that nobody learns who else is there."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import select, text

from moss.serve import accounts as accounts_module
from moss.serve.accounts import Accounts, address, digest
from moss.serve.policy import DEFAULTS, Policies, Policy
from moss.serve.refused import Refused
from moss.serve.store.database import Database
from moss.serve.store.tables import Base, Code, Invite, Key, Login, User
from moss.serve.store.types import now
from tests.stores import refused

GOOD = "correct horse"


class Changing:
    """A policy that a test changes as it goes."""

    def __init__(self) -> None:
        self.now = Policy()

    def __call__(self) -> Policy:
        return self.now

    def set(self, **values: Any) -> None:
        self.now = replace(self.now, **values)


@pytest.fixture
def policy() -> Changing:
    return Changing()


@pytest.fixture
def accounts(store: Database, policy: Changing) -> Accounts:
    return Accounts(store, policy)


# ----------------------------------------------------------------------------------------------------------- register


def test_the_first_account_is_the_admin(accounts: Accounts, policy: Changing) -> None:
    """Prevents a service without an admin, and a second person who becomes one by registering."""
    policy.set(registration="closed")
    assert accounts.register("A@Example.org ", GOOD, name=" 王  小明\n").role == "admin"
    with refused(403, "closed"):
        accounts.register("b@example.org", GOOD)
    policy.set(registration="open")
    second = accounts.register("b@example.org", GOOD)
    assert (second.role, second.email) == ("user", "b@example.org")
    assert accounts.everybody()[0].name == "王 小明"


def test_the_first_admin_is_one_even_in_a_race(accounts: Accounts) -> None:
    """Prevents two admins where two people press the button at once."""
    barrier, roles = threading.Barrier(4), list[str]()

    def work(number: int) -> None:
        barrier.wait()
        roles.append(accounts.register(f"{number}@example.org", GOOD).role)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(roles) == ["admin", "user", "user", "user"]


@pytest.mark.parametrize("same", ["a@example.org", "A@EXAMPLE.ORG", " a@Example.Org\n"])
def test_one_account_an_address(same: str, accounts: Accounts) -> None:
    """Prevents two accounts for one mailbox that differ in case (case 84)."""
    accounts.register("a@example.org", GOOD)
    with refused(400, "cannot be registered"):
        accounts.register(same, GOOD)


@pytest.mark.parametrize(
    "email",
    [
        *("", "a", "@", "a@b", "a@b.", "a@.b.c", "a b@c.de", "a@b\0.de", "<a@b.de>", "a@-b.de", "'; DROP--@x.de;"),
        *("а@example.org", "a@exаmple.org", "ａ@example.org"),  # letters of other alphabets
        *("a@" + "b" * 300 + ".de", "x" * 65 + "@example.org", "a@b.de\nBcc: c@d.de"),
    ],
)
def test_what_is_no_address(email: str, accounts: Accounts) -> None:
    """Prevents addresses that look like others', that no mail reaches, or that add lines to a mail (case 84)."""
    with refused(400, "no mail address"):
        accounts.register(email, GOOD)
    assert accounts.everybody() == []


@pytest.mark.parametrize("password", ["", "1234567", "x" * 129])
def test_passwords_are_neither_short_nor_endless(password: str, accounts: Accounts) -> None:
    """Prevents passwords that can be guessed, and a megabyte to hash (case 77)."""
    with refused(400, "8 to 128"):
        accounts.register("a@example.org", password)


@pytest.mark.parametrize(
    "password", ["密码密码密码密码", "a\0b cdefgh", "\ud800 lone surrogate", "  spaces at both ends  "]
)
def test_any_text_is_a_password(password: str, accounts: Accounts) -> None:
    """Prevents a password that can be set and not used."""
    accounts.register("a@example.org", password)
    assert accounts.log_in("a@example.org", password)[1]
    with refused(401):
        accounts.log_in("a@example.org", password[:-1] + "?")


def test_by_invitation(accounts: Accounts, policy: Changing, store: Database) -> None:
    """Prevents an invitation that works twice, after its time, or that can be read in the database."""
    admin = accounts.register("a@example.org", GOOD)
    policy.set(registration="invite")
    _, code = accounts.invite(admin.id, uses=1, note="for B")
    for wrong in ("", "x", code[:-1]):
        with refused(403, "by invitation"):
            accounts.register("b@example.org", GOOD, invite=wrong)
    with refused(400, "cannot be registered"):
        accounts.register("a@example.org", GOOD, invite=code)  # spends nothing
    assert [each.left for each in accounts.invites()] == [1]
    accounts.register("b@example.org", GOOD, invite=code)
    with refused(403, "by invitation"):
        accounts.register("c@example.org", GOOD, invite=code)
    assert accounts.invites() == []
    old, code = accounts.invite(admin.id, uses=5)
    with store.write() as db:
        db.get_one(Invite, old.id).expires = now() - timedelta(seconds=1)
    with refused(403):
        accounts.register("c@example.org", GOOD, invite=code)
    third, code = accounts.invite(admin.id)
    accounts.revoke_invite(admin.id, third.id)
    with refused(403):
        accounts.register("c@example.org", GOOD, invite=code)
    with refused(404):
        accounts.revoke_invite(admin.id, third.id)


# -------------------------------------------------------------------------------------------------------------- logins


def test_in_and_out(accounts: Accounts, store: Database, policy: Changing) -> None:
    """Prevents logins that outlive their end: log out, time, another person's hand."""
    one, two = accounts.register("a@example.org", GOOD), accounts.register("b@example.org", GOOD)
    _, first = accounts.log_in("A@example.org", GOOD, "Firefox")
    _, second = accounts.log_in("a@example.org", GOOD)
    found = accounts.by_login(first)
    assert found and found[0].id == one.id and found[1].agent == "Firefox"
    assert len({first, second}) == 2 and len(first) >= 43
    with refused(404):
        accounts.log_out(two.id, found[1].id)
    assert accounts.by_login(first)
    accounts.log_out(one.id, found[1].id)
    assert not accounts.by_login(first) and accounts.by_login(second)
    accounts.log_out(one.id)
    assert not accounts.by_login(second) and accounts.logins(one.id) == []
    policy.set(login_days=0)
    _, third = accounts.log_in("a@example.org", GOOD)
    assert not accounts.by_login(third) and accounts.logins(one.id) == []
    for wrong in ("", "x", first[:-1], "\ud800"):
        assert not accounts.by_login(wrong) and not accounts.by_key(wrong)


def test_nobody_learns_who_is_registered(accounts: Accounts) -> None:
    """Prevents a login that answers faster, or otherwise, where there is no such account (case 75)."""
    accounts.register("a@example.org", GOOD)
    took: dict[str, list[float]] = {"a@example.org": [], "nobody@example.org": []}
    answers = set()
    for _ in range(5):
        for email, times in took.items():
            began = time.thread_time()
            with refused(401) as told:
                accounts.log_in(email, "wrong horse")
            times.append(time.thread_time() - began)
            answers.add(str(told.value.to_json()))
    assert len(answers) == 1
    known, unknown = (statistics.median(times) for times in took.values())
    assert 0.5 < known / unknown < 2


def test_only_digests_are_stored(accounts: Accounts, store: Database) -> None:
    """Prevents a stolen database that lets its thief in (cases 77, 80)."""
    user = accounts.register("a@example.org", GOOD)
    secrets = [
        accounts.log_in("a@example.org", GOOD)[1],
        accounts.make_key(user.id, "k")[1],
        accounts.invite(user.id)[1],
    ]
    made = accounts.make_code("a@example.org", "reset")
    assert made
    secrets += [made[1], GOOD]
    with store.read() as db:
        everything = str([db.execute(select(table)).all() for table in Base.metadata.sorted_tables])
        kept = db.scalars(select(User.password)).one()
    assert digest(secrets[0]) in everything
    assert not [secret for secret in secrets if secret in everything]
    assert kept.startswith("$argon2id$") and "m=19456,t=2,p=1" in kept


def test_old_hashes_become_new_ones(accounts: Accounts, store: Database) -> None:
    """Prevents passwords that stay as weakly hashed as in the year they were set (case 77)."""
    user = accounts.register("a@example.org", GOOD)
    weak = PasswordHash((Argon2Hasher(memory_cost=8, time_cost=1, parallelism=1),)).hash(GOOD)
    with store.write() as db:
        db.get_one(User, user.id).password = weak
    accounts.log_in("a@example.org", GOOD)
    assert "m=19456" in accounts.user(user.id).password
    with store.write() as db:
        db.get_one(User, user.id).password = "not a hash"
    with refused(401):
        accounts.log_in("a@example.org", GOOD)


def test_four_are_hashed_at_once(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents fifty logins from taking a gigabyte (case 78)."""
    at_once, most, lock = 0, 0, threading.Lock()

    class Counting:
        def verify_and_update(self, password: bytes, kept: str) -> tuple[bool, None]:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.01)
            with lock:
                at_once -= 1
            return False, None

    monkeypatch.setattr(accounts_module, "HASHER", Counting())

    def work() -> None:
        with refused(401):
            accounts.log_in("nobody@example.org", GOOD)

    threads = [threading.Thread(target=work) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 2 <= most <= 4


# ----------------------------------------------------------------------------------------------- passwords, codes, keys


def test_a_new_password_ends_all_logins(accounts: Accounts) -> None:
    """Prevents a thief's browser from staying logged in after the password was changed (case 79)."""
    user = accounts.register("a@example.org", GOOD)
    _, token = accounts.log_in("a@example.org", GOOD)
    with refused(403, "old password"):
        accounts.change_password(user.id, "wrong horse", "another horse")
    with refused(400, "8 to 128"):
        accounts.change_password(user.id, GOOD, "short")
    assert accounts.by_login(token)
    accounts.change_password(user.id, GOOD, "another horse")
    assert not accounts.by_login(token)
    with refused(401):
        accounts.log_in("a@example.org", GOOD)
    assert accounts.log_in("a@example.org", "another horse")


def test_codes_hold_once_and_for_one_thing(accounts: Accounts, store: Database) -> None:
    """Prevents a mailed code that works twice, for another purpose, or the day after."""
    user = accounts.register("a@example.org", GOOD)
    assert accounts.make_code("nobody@example.org", "reset") is None
    made = accounts.make_code("A@example.org", "verify")
    assert made and made[0].id == user.id
    with refused(400, "does not hold"):
        accounts.reset_password(made[1], "another horse")
    accounts.verify(made[1])
    assert accounts.user(user.id).verified
    with refused(400, "does not hold"):
        accounts.verify(made[1])
    assert accounts.make_code("a@example.org", "verify") is None
    first, second = accounts.make_code("a@example.org", "reset"), accounts.make_code("a@example.org", "reset")
    assert first and second
    _, token = accounts.log_in("a@example.org", GOOD)
    with refused(400, "does not hold"):
        accounts.reset_password(first[1], "another horse")  # a newer one was asked for
    accounts.reset_password(second[1], "another horse")
    assert accounts.log_in("a@example.org", "another horse") and not accounts.by_login(token)
    late = accounts.make_code("a@example.org", "reset")
    with store.write() as db:
        db.scalars(select(Code)).one().expires = now() - timedelta(seconds=1)
    with refused(400, "does not hold"):
        accounts.reset_password(late[1] if late else "", "third horse")


def test_keys(accounts: Accounts) -> None:
    """Prevents keys that others can end, that can be read again, or that hold after they were revoked."""
    one, two = accounts.register("a@example.org", GOOD), accounts.register("b@example.org", GOOD)
    key, token = accounts.make_key(one.id, "laptop")
    assert token.startswith(key.start) and token.startswith("moss-") and len(key.start) == 10
    found = accounts.by_key(token)
    assert found and (found[0].id, found[1].id) == (one.id, key.id)
    assert accounts.keys(one.id)[0].used and accounts.keys(two.id) == []
    with refused(404):
        accounts.revoke_key(two.id, key.id)
    accounts.revoke_key(one.id, key.id)
    assert not accounts.by_key(token)
    with pytest.raises(Refused, match="at most 100 keys"):
        for number in range(101):
            accounts.make_key(one.id, str(number))


def test_an_account_goes_with_everything(accounts: Accounts, store: Database) -> None:
    """Prevents an account whose keys outlive it (cases 79, 117), and a service left without an admin."""
    admin, user = accounts.register("a@example.org", GOOD), accounts.register("b@example.org", GOOD)
    _, login = accounts.log_in("b@example.org", GOOD)
    _, key = accounts.make_key(user.id, "k")
    with refused(403, "password is wrong"):
        accounts.delete(user.id, "wrong horse")
    with refused(400, "only admin"):
        accounts.delete(admin.id, GOOD)
    accounts.delete(user.id, GOOD)
    assert not accounts.by_login(login) and not accounts.by_key(key)
    with refused(404):
        accounts.user(user.id)
    with store.read() as db:
        assert not db.scalars(select(Login)).all() and not db.scalars(select(Key)).all()
    accounts.delete(admin.id, GOOD)  # nobody is left who could miss one
    assert accounts.register("c@example.org", GOOD).role == "admin"


# --------------------------------------------------------------------------------------------------------------- admins


def test_roles_limits_bans(accounts: Accounts, policy: Changing) -> None:
    """Prevents a service without an admin, limits that are none, and offences that never end."""
    admin, user = accounts.register("a@example.org", GOOD), accounts.register("b@example.org", GOOD)
    with refused(400, "only admin"):
        accounts.set_role(admin.id, admin.id, "user")
    with refused(400, "role is 'god'"):
        accounts.set_role(admin.id, user.id, "god")
    assert accounts.set_role(admin.id, user.id, "admin").role == "admin"
    assert accounts.set_role(user.id, admin.id, "user").role == "user"
    assert accounts.set_limits(user.id, admin.id, {"tokens_a_day": 5}).limits == {"tokens_a_day": 5}
    for wrong in ({"x": 1}, {"tokens_a_day": -1}, {"tokens_a_day": "1"}, {"queue": 3}):
        with refused(400):
            accounts.set_limits(user.id, admin.id, wrong)  # type: ignore[arg-type]
    policy.set(offences=2, ban_hours=3)
    accounts.offend(admin.id)
    assert not accounts.user(admin.id).banned
    accounts.offend(admin.id)
    until = accounts.user(admin.id).banned
    assert until and timedelta(hours=2.9) < until - now() <= timedelta(hours=3)
    assert accounts.user(admin.id).offences == 0
    assert accounts.ban(user.id, admin.id, 0).banned is None
    with refused(400):
        accounts.ban(user.id, admin.id, float("nan"))
    with refused(404):
        accounts.ban(user.id, "nobody", 1)
    actions = [entry.action for entry in accounts.audited(admin.id)]
    assert actions == ["ban", "ban", "limits", "role", "register"]
    assert {entry.actor for entry in accounts.audited(admin.id)[:1]} == {user.id}


@pytest.mark.parametrize("search", ["%", "_", "'; DROP TABLE users; --", "\\", "B@ex"])
def test_searching_people_is_literal(search: str, accounts: Accounts) -> None:
    """Prevents signs that mean something to a database from meaning it (case 120)."""
    accounts.register("a@example.org", GOOD)
    accounts.register("b@example.org", GOOD)
    assert [user.email for user in accounts.everybody(search)] == (["b@example.org"] if search == "B@ex" else [])
    assert len(accounts.everybody()) == 2
    assert [user.email for user in accounts.everybody(after="a@example.org")] == ["b@example.org"]


# -------------------------------------------------------------------------------------------------------------- policy


def test_policy_is_kept(store: Database) -> None:
    """Prevents settings that are lost at the next start, or that hide new defaults."""
    policies = Policies(store)
    assert policies.now == Policy()
    changed = policies.change({"registration": "invite", "requests_a_day": 7, "models": ["nano"]})
    assert (changed.registration, changed.requests_a_day, changed.models) == ("invite", 7, ["nano"])
    assert Policies(store).now == changed
    with store.read() as db:
        assert len(db.execute(text("SELECT * FROM settings")).all()) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("registration", "sometimes"),
        ("registration", 1),
        ("requests_a_day", -1),
        ("requests_a_day", True),
        ("requests_a_day", 1.5),
        ("requests_a_day", 10**13),
        ("models", "nano"),
        ("models", [1]),
        ("checks", ["x"]),
        ("admins_read", 1),
        ("unknown", 1),
    ],
)
def test_a_wrong_setting_is_named_and_changes_nothing(name: str, value: Any, store: Database) -> None:
    """Prevents a typing error that locks everybody out."""
    policies = Policies(store)
    with refused(400) as told:
        policies.change({"notice": "hello", name: value})
    assert told.value.param == name and policies.now == Policy() == Policies(store).now
    assert set(DEFAULTS) >= {"registration", "notice"}


def test_addresses() -> None:
    """Prevents good addresses from being refused."""
    for email in ("a@b.de", "first.last+tag@mail.example.co.uk", "x_y-z@1a.b-c.museum", "a@xn--fsq.com"):
        assert address(email.upper()) == email
