"""One person's conversations: a tree of questions and answers each, with everything the model did on the way.

To ask again differently is another child of the same answer, to have it answered again another child of the same
question; `leaf` of a conversation remembers which branch its owner saw last. Every query here names the owner: what is
somebody else's does not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, delete, or_, select, update
from sqlalchemy.orm import Session

from moss.chat import META_INSTRUCTION, Dialog, Turn
from moss.chat import Round as ChatRound
from moss.serve.refused import Refused, missing
from moss.serve.store.database import Database
from moss.serve.store.tables import Artefact, Conversation, Feedback, Message, Round
from moss.serve.store.types import mended

TITLE = 80  # characters of a title that is made from the first question
MOST_TEXT = 100_000  # characters of a message
PAGE = 50  # conversations in a list
RATINGS = (1, -1)


@dataclass(frozen=True)
class Answer:
    """A message with what hangs on it."""

    message: Message
    rounds: Sequence[Round]
    artefacts: Sequence[Artefact]
    feedback: Feedback | None


class Talks:
    """The conversations of one person."""

    def __init__(self, store: Database, owner: str) -> None:
        self._store, self.owner = store, owner

    # -------------------------------------------------------------------------------------------------- conversations

    def find(self, search: str = "", before: str = "", limit: int = PAGE) -> list[Conversation]:
        """The conversations, the last changed first, of which a title or message holds `search`; those after the one
        with the id `before`."""
        with self._store.read() as db:
            found = self._mine(Conversation)
            if before:
                last = self._get(db, Conversation, before)
                older = Conversation.changed < last.changed
                tied = (Conversation.changed == last.changed) & (Conversation.id > last.id)
                found = found.where(or_(older, tied))
            if search := mended(search.strip()):
                said = select(Message.conversation).where(
                    Message.owner == self.owner, Message.text.icontains(search, autoescape=True)
                )
                titled = Conversation.title.icontains(search, autoescape=True)
                found = found.where(or_(titled, Conversation.id.in_(said)))
            return list(db.scalars(found.order_by(Conversation.changed.desc(), Conversation.id).limit(limit)))

    def get(self, conversation: str) -> Conversation:
        """A conversation; Refused (404)."""
        with self._store.read() as db:
            return self._get(db, Conversation, conversation)

    def create(
        self, *, title: str = "", meta: str = "", switches: dict[str, bool] | None = None, model: str = ""
    ) -> Conversation:
        """A new conversation without messages."""
        made = Conversation(
            owner=self.owner, title=_title(title), meta=_text(meta), switches=switches or {}, model=model
        )
        with self._store.write() as db:
            db.add(made)
        return made

    def change(self, conversation: str, **values: Any) -> Conversation:
        """Set some of title, meta, switches, model, leaf."""
        assert set(values) <= {"title", "meta", "switches", "model", "leaf"}, values
        if "title" in values:
            values["title"] = _title(values["title"])
        with self._store.write() as db:
            if "leaf" in values:
                self._in(db, conversation, values["leaf"])
            self._set(db, conversation, **values)
            return self._get(db, Conversation, conversation)

    def delete(self, conversation: str) -> None:
        """Delete a conversation with all its messages."""
        with self._store.write() as db:
            mine = delete(Conversation).where(Conversation.owner == self.owner, Conversation.id == conversation)
            if not db.execute(mine).rowcount:  # type: ignore[attr-defined]
                raise missing("conversation")

    # ------------------------------------------------------------------------------------------------------- messages

    def messages(self, conversation: str) -> list[Answer]:
        """All messages of a conversation, parents before children."""
        with self._store.read() as db:
            self._get(db, Conversation, conversation)
            found = self._mine(Message).where(Message.conversation == conversation)
            messages = list(db.scalars(found.order_by(Message.created, Message.id)))
            of = {message.id: message for message in messages}
            rounds = _grouped(db.scalars(self._hanging(Round, conversation).order_by(Round.number)))
            artefacts = _grouped(db.scalars(self._hanging(Artefact, conversation).order_by(Artefact.call)))
            feedback = _grouped(db.scalars(self._hanging(Feedback, conversation)))
        return [
            Answer(message, rounds.get(id, ()), artefacts.get(id, ()), next(iter(feedback.get(id, ())), None))
            for id, message in of.items()
        ]

    def ask(self, conversation: str, text: str, parent: str = "") -> Message:
        """Add a question behind an answer, or at the beginning; Refused (400) where it says nothing or too much."""
        if not (text := _text(text)).strip():
            raise Refused(400, "a message must say something", param="text")
        with self._store.write() as db:
            talk = self._get(db, Conversation, conversation)
            if parent and self._in(db, conversation, parent).role != "assistant":
                raise Refused(400, "a question follows an answer, not another question", param="parent")
            made = Message(owner=self.owner, conversation=conversation, parent=parent or None, role="user", text=text)
            db.add(made)
            title = talk.title or _title(text)
            self._set(db, conversation, title=title, leaf=made.id, changed=made.created)
        return made

    def rate(self, message: str, rating: int, text: str = "") -> Feedback | None:
        """What the owner thinks of an answer: 1, -1, or 0 to take it back."""
        if rating not in (*RATINGS, 0):
            raise Refused(400, f"rating is {rating}; it can be 1, -1 or 0", param="rating")
        with self._store.write() as db:
            if self._get(db, Message, message).role != "assistant":
                raise Refused(400, "only answers are rated", param="message")
            db.execute(delete(Feedback).where(Feedback.owner == self.owner, Feedback.message == message))
            if not rating:
                return None
            made = Feedback(message=message, owner=self.owner, rating=rating, text=_text(text))
            db.add(made)
        return made

    def dialog(self, message: str) -> Dialog:
        """The conversation up to and with a question, as the model reads it; answers that failed are left out."""
        with self._store.read() as db:
            asked = self._get(db, Message, message)
            talk = self._get(db, Conversation, asked.conversation)
        answers = {each.message.id: each for each in self.messages(talk.id)}
        turns, at = [Turn(asked.text)], asked.parent
        while at:
            answer = answers[at]
            question = answers[answer.message.parent or ""].message
            if answer.message.state in ("whole", "stopped") and answer.message.text:
                rounds = [ChatRound(each.thoughts, each.commands, each.results) for each in answer.rounds]
                turns.append(Turn(question.text, rounds, answer.message.text, answer.message.quality))
            at = question.parent
        return Dialog(talk.meta or META_INSTRUCTION, dict(talk.switches), turns[::-1])

    # -------------------------------------------------------------------------------------------------------- details

    def _mine(self, table: Any) -> Select[Any]:
        return select(table).where(table.owner == self.owner)

    def _get(self, db: Session, table: Any, id: str) -> Any:
        if (found := db.scalar(self._mine(table).where(table.id == id))) is None:
            raise missing(table.__name__.lower())
        return found

    def _in(self, db: Session, conversation: str, message: str) -> Message:
        """A message of this conversation and no other."""
        found: Message = self._get(db, Message, message)
        if found.conversation != conversation:
            raise missing("message")
        return found

    def _set(self, db: Session, conversation: str, **values: Any) -> None:
        db.execute(
            update(Conversation)
            .where(Conversation.owner == self.owner, Conversation.id == conversation)
            .values(**values)
            .execution_options(synchronize_session=False)
        )

    def _hanging(self, table: Any, conversation: str) -> Select[Any]:
        on = table.message == Message.id
        return (
            self._mine(table).join(Message, on).where(Message.owner == self.owner, Message.conversation == conversation)
        )


def _grouped(rows: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.message, []).append(row)
    return found


def _title(text: str) -> str:
    line = " ".join(mended(text).split())
    return line if len(line) <= TITLE else line[: TITLE - 1] + "…"


def _text(text: str) -> str:
    if len(text) > MOST_TEXT:
        raise Refused(400, f"a message has at most {MOST_TEXT:,} characters", param="text")
    return mended(text)
