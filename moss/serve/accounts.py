"""Who somebody is: accounts, passwords, browsers that are logged in, keys of the API, invitations, codes by mail.

Secrets are 256 random bits (an invitation, which is typed by hand, 96); the store keeps their SHA-256 alone. Passwords
are hashed with argon2id at OWASP's cost of 19 MiB, four at a time. To log in tells nobody whether an address is
registered, neither by the answer nor by how long it takes; to register with it does.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

from pwdlib import PasswordHash
from pwdlib.exceptions import UnknownHashError
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from moss.serve.policy import LIMITS, Policy, check
from moss.serve.refused import Refused, missing
from moss.serve.store.database import Database
from moss.serve.store.tables import Audit, Code, Invite, Key, Login, User
from moss.serve.store.types import mended, now

HASHER = PasswordHash((Argon2Hasher(memory_cost=19_456, time_cost=2, parallelism=1),))
NOBODY = HASHER.hash(secrets.token_urlsafe())  # what a password is held against where there is no account
AT_ONCE = threading.BoundedSemaphore(4)  # hashes, each of 19 MiB
KEY = "moss-"  # how every key of the API begins
SHOWN = 10  # characters of a key that stay visible
USED_EVERY = timedelta(minutes=5)  # how exactly it is known when a login or key was last used
MOST_KEYS = 100  # of an account
ROLES = ("user", "admin")
LIFETIMES = {"verify": timedelta(days=2), "reset": timedelta(hours=1)}
INVITED = timedelta(days=14)
ADDRESS = re.compile(
    r"[a-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)+"
)

Proof = TypeVar("Proof", Login, Key)


class Accounts:
    """People and what proves who they are."""

    def __init__(self, store: Database, policy: Callable[[], Policy]) -> None:
        self._store, self._policy = store, policy

    # ------------------------------------------------------------------------------------------------------ accounts

    def register(self, email: str, password: str, *, name: str = "", invite: str = "") -> User:
        """A new account, the first one an admin's; Refused where the policy, the address or the password forbids it."""
        email, registration = address(email), self._policy().registration
        hashed = _hash(checked_password(password))
        with self._store.write() as db:
            _alone(db)
            first = db.scalar(select(User.id).limit(1)) is None
            if not first and registration == "closed":
                raise Refused(403, "registration is closed here", code="registration_closed")
            if not first and registration == "invite":
                _spend(db, invite)
            if db.scalar(select(User.id).where(User.email == email)):
                raise Refused(400, "this address cannot be registered; is it yours already?", param="email")
            user = User(email=email, name=_line(name, 100), password=hashed, role="admin" if first else "user")
            db.add(user)
            db.flush()
            audit(db, user.id, "register", user.id, {"role": user.role})
        return user

    def log_in(self, email: str, password: str, agent: str = "") -> tuple[User, str]:
        """The account and the secret for its cookie; Refused (401) is the same whatever was wrong."""
        with self._store.read() as db:
            user = db.scalar(select(User).where(User.email == email.strip().lower()[:300]))
        if len(password) > 128:
            raise Refused(400, "a password has at most 128 characters", param="password")
        right, better = _verify(password, user.password if user and user.password else NOBODY)
        if not (user and right):
            raise Refused(401, "the address or the password is wrong", code="wrong_login")
        token = secrets.token_urlsafe(32)
        with self._store.write() as db:
            if better:
                db.execute(
                    update(User).where(User.id == user.id, User.password == user.password).values(password=better)
                )
            db.execute(delete(Login).where(Login.owner == user.id, Login.expires < now()))
            expires = now() + timedelta(days=self._policy().login_days)
            db.add(Login(owner=user.id, digest=digest(token), expires=expires, agent=_line(agent, 200)))
        return user, token

    def change_password(self, owner: str, old: str, new: str) -> None:
        """Set a new password and log out everywhere; Refused (403) where the old one is wrong."""
        user, hashed = self.user(owner), _hash(checked_password(new))
        if not _verify(old, user.password or NOBODY)[0]:
            raise Refused(403, "the old password is wrong", param="old")
        with self._store.write() as db:
            db.execute(update(User).where(User.id == owner).values(password=hashed))
            _end_all(db, owner)
            audit(db, owner, "password", owner)

    def delete(self, owner: str, password: str | None = None) -> None:
        """Delete an account with everything it has; its own wish needs its password, an admin's (None) does not."""
        user = self.user(owner)
        if password is not None and not _verify(password, user.password or NOBODY)[0]:
            raise Refused(403, "the password is wrong", param="password")
        with self._store.write() as db:
            _alone(db)
            last = (db.scalar(select(func.count()).select_from(User)) or 0) == 1
            if user.role == "admin" and _admins(db) == 1 and not last:
                raise Refused(400, "the only admin cannot go while others stay; make somebody else an admin first")
            db.execute(delete(User).where(User.id == owner))

    def user(self, owner: str) -> User:
        """An account by id; Refused (404)."""
        with self._store.read() as db:
            if found := db.get(User, owner):
                return found
        raise missing("account")

    def rename(self, owner: str, name: str) -> User:
        """Set the name that is shown."""
        with self._store.write() as db:
            db.execute(update(User).where(User.id == owner).values(name=_line(name, 100)))
        return self.user(owner)

    # ------------------------------------------------------------------------------------------------- who is asking

    def by_login(self, token: str) -> tuple[User, Login] | None:
        """Whose browser this is."""
        found = self._by_digest(Login, token)
        return found if found and found[1].expires > now() else None

    def by_key(self, token: str) -> tuple[User, Key] | None:
        """Whose key of the API this is."""
        return self._by_digest(Key, token)

    def _by_digest(self, table: type[Proof], token: str) -> tuple[User, Proof] | None:
        """The account behind a secret, and the row that says so, which remembers now and then when it was used."""
        with self._store.read() as db:
            row = db.execute(
                select(User, table).join(table, table.owner == User.id).where(table.digest == digest(token))
            ).first()
        if not row:
            return None
        user, proof = row
        if proof.used is None or now() - proof.used > USED_EVERY:
            with self._store.write() as db:
                db.execute(update(table).where(table.owner == user.id, table.id == proof.id).values(used=now()))
        return user, proof

    # --------------------------------------------------------------------------------------------------------- logins

    def logins(self, owner: str) -> list[Login]:
        """The browsers that are logged in, the last used first."""
        with self._store.read() as db:
            mine = select(Login).where(Login.owner == owner, Login.expires > now())
            return list(db.scalars(mine.order_by(Login.used.desc(), Login.id)))

    def log_out(self, owner: str, login: str = "") -> None:
        """End one login, or all of them; Refused (404) where it is not theirs."""
        with self._store.write() as db:
            mine = delete(Login).where(Login.owner == owner)
            ended = db.execute(mine.where(Login.id == login) if login else mine)
            if login and not ended.rowcount:  # type: ignore[attr-defined]
                raise missing("login")

    # ----------------------------------------------------------------------------------------------------------- keys

    def keys(self, owner: str) -> list[Key]:
        """The keys of an account, the oldest first."""
        with self._store.read() as db:
            return list(db.scalars(select(Key).where(Key.owner == owner).order_by(Key.created, Key.id)))

    def make_key(self, owner: str, name: str) -> tuple[Key, str]:
        """A new key and its text, which nobody sees again."""
        text = KEY + secrets.token_urlsafe(32)
        key = Key(owner=owner, name=_line(name, 100), start=text[:SHOWN], digest=digest(text))
        with self._store.write() as db:
            if (db.scalar(select(func.count()).select_from(Key).where(Key.owner == owner)) or 0) >= MOST_KEYS:
                raise Refused(400, f"an account has at most {MOST_KEYS} keys; revoke one first")
            db.add(key)
            audit(db, owner, "make key", owner, {"key": key.start})
        return key, text

    def revoke_key(self, owner: str, key: str) -> None:
        """End a key; Refused (404) where it is not theirs."""
        with self._store.write() as db:
            if not db.execute(delete(Key).where(Key.owner == owner, Key.id == key)).rowcount:  # type: ignore[attr-defined]
                raise missing("key")
            audit(db, owner, "revoke key", owner)

    # ---------------------------------------------------------------------------------------------------------- codes

    def make_code(self, email: str, purpose: str) -> tuple[User, str] | None:
        """A code to be mailed, or None where there is no such account or nothing to prove, which nobody may be told."""
        with self._store.write() as db:
            user = db.scalar(select(User).where(User.email == email.strip().lower()[:300]))
            if not user or (purpose == "verify" and user.verified):
                return None
            db.execute(delete(Code).where(Code.owner == user.id, Code.purpose == purpose))
            text = secrets.token_urlsafe(32)
            db.add(Code(digest=digest(text), owner=user.id, purpose=purpose, expires=now() + LIFETIMES[purpose]))
        return user, text

    def verify(self, code: str) -> None:
        """The address is theirs; Refused (400) for a code that does not hold."""
        with self._store.write() as db:
            owner = _use_code(db, code, "verify")
            db.execute(update(User).where(User.id == owner).values(verified=now()))

    def reset_password(self, code: str, password: str) -> None:
        """Set a new password by a mailed code, which shows that the address is theirs, and log out everywhere."""
        hashed = _hash(checked_password(password))
        with self._store.write() as db:
            owner = _use_code(db, code, "reset")
            db.execute(update(User).where(User.id == owner).values(password=hashed, verified=now()))
            _end_all(db, owner)
            audit(db, owner, "password", owner)

    # ---------------------------------------------------------------------------------------------------- for admins

    def everybody(self, search: str = "", limit: int = 100, after: str = "") -> list[User]:
        """Accounts by address, from the one after `after`."""
        with self._store.read() as db:
            found = select(User).where(User.email > after).order_by(User.email).limit(limit)
            if search:
                found = found.where(User.email.contains(search.lower(), autoescape=True))
            return list(db.scalars(found))

    def set_role(self, actor: str, owner: str, role: str) -> User:
        """Make somebody an admin, or no longer one; the last one stays."""
        if role not in ROLES:
            raise Refused(400, f"role is {role!r}; it can be {', '.join(ROLES)}", param="role")
        with self._store.write() as db:
            _alone(db)
            user = db.get(User, owner) or _raise(missing("account"))
            if user.role == "admin" and role != "admin" and _admins(db) == 1:
                raise Refused(400, "the only admin cannot be made less; make somebody else an admin first")
            user.role = role
            audit(db, actor, "role", owner, {"role": role})
        return user

    def set_limits(self, actor: str, owner: str, limits: dict[str, int]) -> User:
        """What an account may use, where it differs from the policy."""
        for name, value in limits.items():
            if name not in LIMITS:
                raise Refused(400, f"there is no limit {name!r}; there are {', '.join(LIMITS)}", param=name)
            check(name, value)
        with self._store.write() as db:
            user = db.get(User, owner) or _raise(missing("account"))
            user.limits = limits
            audit(db, actor, "limits", owner, dict(limits))
        return user

    def ban(self, actor: str, owner: str, hours: float) -> User:
        """Keep an account from using the service for some hours; 0 lets it in again."""
        if not 0 <= hours <= 24 * 365 * 100:
            raise Refused(400, f"hours is {hours}; it must be 0 to 876000", param="hours")
        with self._store.write() as db:
            user = db.get(User, owner) or _raise(missing("account"))
            user.banned, user.offences = (now() + timedelta(hours=hours) if hours else None), 0
            audit(db, actor, "ban", owner, {"hours": hours})
        return user

    def offend(self, owner: str) -> None:
        """Count a refused input; too many of them ban, as the policy says."""
        policy = self._policy()
        with self._store.write() as db:
            user = db.get(User, owner, with_for_update=True) or _raise(missing("account"))
            user.offences += 1
            if policy.offences and user.offences >= policy.offences:
                user.banned, user.offences = now() + timedelta(hours=policy.ban_hours), 0
                audit(db, "", "ban", owner, {"hours": policy.ban_hours})

    def invite(self, actor: str, uses: int = 1, note: str = "") -> tuple[Invite, str]:
        """A new invitation and its text, which nobody sees again."""
        if not 1 <= uses <= 10_000:
            raise Refused(400, f"uses is {uses}; it must be 1 to 10000", param="uses")
        text = secrets.token_urlsafe(12)
        invite = Invite(digest=digest(text), left=uses, note=_line(note, 200), expires=now() + INVITED)
        with self._store.write() as db:
            db.add(invite)
            audit(db, actor, "invite", "", {"uses": uses})
        return invite, text

    def invites(self) -> list[Invite]:
        """The invitations that still hold."""
        with self._store.read() as db:
            holds = select(Invite).where(Invite.left > 0, Invite.expires > now())
            return list(db.scalars(holds.order_by(Invite.created, Invite.id)))

    def revoke_invite(self, actor: str, invite: str) -> None:
        """End an invitation."""
        with self._store.write() as db:
            if not db.execute(delete(Invite).where(Invite.id == invite)).rowcount:  # type: ignore[attr-defined]
                raise missing("invitation")
            audit(db, actor, "revoke invitation", "")

    def audited(self, subject: str = "", limit: int = 200) -> list[Audit]:
        """What was done, the latest first: to one account, or to anybody."""
        with self._store.read() as db:
            found = select(Audit).order_by(Audit.at.desc(), Audit.id).limit(limit)
            return list(db.scalars(found.where(Audit.subject == subject) if subject else found))


# ------------------------------------------------------------------------------------------------------------- details


def audit(db: Session, actor: str, action: str, subject: str, detail: dict[str, object] | None = None) -> None:
    """Write down who did what to whom, in the same transaction."""
    db.add(Audit(actor=actor, action=action, subject=subject, detail=detail or {}))


def digest(token: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def address(email: str) -> str:
    """A mail address in the one form that is kept; Refused (400). Letters that look like others' are not taken."""
    email = email.strip().lower()
    if len(email) > 254 or not ADDRESS.fullmatch(email):
        raise Refused(400, "this is no mail address such as name@example.org", param="email")
    return email


def checked_password(password: str) -> str:
    """Refused (400) for a password that is too short to hold or too long to hash."""
    if not 8 <= len(password) <= 128:
        raise Refused(400, "a password has 8 to 128 characters", param="password")
    return password


def _hash(password: str) -> str:
    with AT_ONCE:
        return HASHER.hash(password.encode("utf-8", "replace"))


def _verify(password: str, kept: str) -> tuple[bool, str | None]:
    """Whether it is right, and a better hash where the kept one is of weaker times."""
    with AT_ONCE:
        try:
            return HASHER.verify_and_update(password.encode("utf-8", "replace"), kept)
        except UnknownHashError:
            return False, None


def _alone(db: Session) -> None:
    """No other transaction changes accounts until this one ends; in SQLite that is so anyway."""
    if db.get_bind().dialect.name == "postgresql":
        db.execute(text("LOCK TABLE users IN SHARE ROW EXCLUSIVE MODE"))


def _admins(db: Session) -> int:
    return db.scalar(select(func.count()).select_from(User).where(User.role == "admin")) or 0


def _end_all(db: Session, owner: str) -> None:
    """Whoever is logged in, or holds a code, is no longer."""
    db.execute(delete(Login).where(Login.owner == owner))
    db.execute(delete(Code).where(Code.owner == owner))


def _use_code(db: Session, code: str, purpose: str) -> str:
    holds = (Code.digest == digest(code), Code.purpose == purpose, Code.expires > now())
    owner = db.scalar(select(Code.owner).where(*holds))
    if not owner or not db.execute(delete(Code).where(*holds)).rowcount:  # type: ignore[attr-defined]
        raise Refused(400, "this code does not hold (any more); ask for a new one", param="code")
    return owner


def _spend(db: Session, invite: str) -> None:
    holds = (Invite.digest == digest(invite), Invite.left > 0, Invite.expires > now())
    if not db.execute(update(Invite).where(*holds).values(left=Invite.left - 1)).rowcount:  # type: ignore[attr-defined]
        raise Refused(403, "registration is by invitation here, and this code does not hold", param="invite")


def _line(text: str, most: int) -> str:
    return " ".join(mended(text).split())[:most]


def _raise(error: Refused) -> NoReturn:
    raise error
