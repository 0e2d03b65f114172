"""How the service is run: who may register, what they may use, what is checked. Kept in the store, changed by admins.

A field that was never changed has its default here, so that a new default reaches those who never chose.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from sqlalchemy import select

from moss.serve.refused import Refused
from moss.serve.store.database import Database
from moss.serve.store.tables import Setting

Registration = Literal["open", "invite", "closed"]


@dataclass(frozen=True)
class Policy:
    """The service's settings."""

    registration: Registration = "open"
    notice: str = ""  # shown to everybody
    models: list[str] = field(default_factory=list)  # on offer; none: all that are loaded
    admins_read: bool = False  # admins may open conversations; each time is logged, and its owner sees it

    requests_a_minute: int = 60  # of an account; 0: no limit, here and below
    requests_a_day: int = 2000
    tokens_a_day: int = 1_000_000
    runs_at_once: int = 2
    queue: int = 64  # requests that may wait for the engine

    login_days: int = 30  # that a browser stays logged in
    offences: int = 5  # refused inputs after which an account is banned
    ban_hours: int = 24
    checks: list[dict[str, Any]] = field(default_factory=list)  # of what goes in and out: `moderation.py`

    mail_server: str = ""  # host:port; with it addresses are verified; the password is MOSS_SMTP_PASSWORD
    mail_user: str = ""
    mail_from: str = ""
    address: str = ""  # of the service, for links in mails: https://moss.example.org


LIMITS = ("requests_a_minute", "requests_a_day", "tokens_a_day", "runs_at_once")  # an account may have its own


class Policies:
    """The policy in the store; a copy is kept, and read again after a change by this process or `refresh`."""

    def __init__(self, store: Database) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read it again: another worker may have changed it."""
        with self._store.read() as db:
            found = {setting.name: setting.value for setting in db.scalars(select(Setting))}
        self.now = Policy(**{name: value for name, value in found.items() if name in DEFAULTS})

    def change(self, changes: dict[str, Any]) -> Policy:
        """Set some fields; Refused (400) names the one that is wrong."""
        for name, value in changes.items():
            check(name, value)
        with self._lock:
            with self._store.write() as db:
                for name, value in changes.items():
                    db.merge(Setting(name=name, value=value))
            self.refresh()
        return self.now


DEFAULTS = asdict(Policy())
_TYPES = get_type_hints(Policy)


def check(name: str, value: Any) -> None:
    """Refused (400) where a field cannot have this value."""
    if name not in DEFAULTS:
        raise Refused(400, f"there is no setting {name!r}; there are {', '.join(DEFAULTS)}", param=name)
    choices, kind = get_args(_TYPES[name]), type(DEFAULTS[name])
    if isinstance(value, str) and choices and kind is str and value not in choices:
        raise Refused(400, f"{name} is {value!r}; it can be {', '.join(choices)}", param=name)
    if type(value) is not kind:
        raise Refused(400, f"{name} is {value!r}; it must be {_KINDS[kind]}", param=name)
    if isinstance(value, int) and not 0 <= value <= 10**12:
        raise Refused(400, f"{name} is {value}; it must be 0 to 10^12", param=name)
    if isinstance(value, list):
        inner = choices[0] if choices[0] is str else dict
        if any(type(item) is not inner for item in value):
            raise Refused(400, f"{name} must be a list of {'texts' if inner is str else 'objects'}", param=name)


_KINDS = {bool: "true or false", int: "a whole number", str: "a text", list: "a list"}
assert {type(value) for value in DEFAULTS.values()} <= set(_KINDS)
