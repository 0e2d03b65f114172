"""`moss eval mmlu`: questions with four choices, five examples before each (MMLU, arXiv 2009.03300).

    moss eval mmlu --data mmlu --model runs/sft
    moss eval mmlu --data ceval --model runs/sft --against runs/base --shots 0

`--data` is a folder in the published layout: dev/SUBJECT_dev.csv with the examples and test/SUBJECT_test.csv with the
questions; CMMLU's files are called SUBJECT.csv. Columns go by their names, or stand as question, A, B, C, D, answer.
The answers to C-Eval's test are not published: there the questions are those of val/, and a line says so.

A chat model sees each example as a turn of a conversation, as the paper of MOSS did; a base model sees plain text, to
the letter that of lm-evaluation-harness, so that figures compare. Of the four letters the likeliest is the answer; what
else the model might have said does not count. A chat server tells no likelihoods: there the letter that the reply
names counts, and a line says so. Where question and examples are too long, the first examples go.
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss.chat import Dialog, Turn
from moss.data.messages import to_openai
from moss.engine import Sampling
from moss.errors import UsageError
from moss.evals.answering import answers
from moss.evals.base import Evaluation, Kept, Style, Subject, Values, chats, made_of, run, silent, unanswered
from moss.evals.likelihood import Continuation, after_dialog, after_text
from moss.log import bar
from moss.tools.run import Options

LETTERS = "ABCD"
PUBLISHED = (
    "MMLU: people.eecs.berkeley.edu/~hendrycks/data.tar; C-Eval: huggingface.co/datasets/ceval/ceval-exam; "
    "CMMLU: huggingface.co/datasets/haonan-li/cmmlu"
)
KNOWN = tomllib.loads((Path(__file__).parent / "subjects.toml").read_text(encoding="utf-8"))
HEADS = {  # of a set, or of all others in a language
    "en": "The following are multiple choice questions (with answers) about {subject}.",
    "ceval": "以下是中国关于{subject}的单项选择题，请选出其中的正确答案。",
    "zh": "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。",
}
ASKS = {"en": "Answer:", "zh": "答案："}
STATED = re.compile(  # "option B" is no answer yet, "the option is B" is
    r"(?:(?:[Aa]nswer|答案|选)\W*(?:is|是|为)?|(?:[Cc]hoice|[Oo]ption|选项)\W*?(?:is|是|为|[:：]))\W*([ABCD])(?![A-Za-z])"
)
BEGUN = re.compile(r"\W*([ABCD])(?=\s*$|\s*\n|[.):,;、。：，）])")
LISTED = re.compile(r"^\W*A[.):、：].*?^\W*B[.):、：]", re.MULTILINE | re.DOTALL)  # the choices, said again
ALONE = re.compile(r"(?<![A-Za-z])([BCD]|A(?! (?!nor |and |or )[a-z]))(?![A-Za-z'’])")  # "A dog" is no letter
MAX_TOKENS = 1024  # of a reply, thoughts included, where a chat server must be asked in words
AT_ONCE = 64  # questions that are scored, and whose rows are kept, at a time


@dataclass(frozen=True)
class MMLU(Evaluation):
    """Measure knowledge by questions with four choices: MMLU, C-Eval, CMMLU, and any set in their layout."""

    data: Path | None = None  # folder with dev/ and test/ (or val/) of CSV files, one a subject
    shots: int = 5  # examples before each question
    style: Style = "auto"  # auto: conversations for models that know the format
    subjects: str = ""  # names separated by commas; all if left out


@dataclass(frozen=True)
class Question:
    """A question with four choices; `answer` is the number of the right one."""

    subject: str
    number: int
    text: str
    choices: tuple[str, ...]
    answer: int

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.number}"


def main(config: MMLU) -> int:
    """Run the command."""
    return run(config, task(config))


def task(config: MMLU, name: str = "mmlu") -> Choice:
    """The task over the set that the settings name, its rows kept under `name`."""
    if config.data is None:
        raise UsageError(f"--data is missing: give the folder of a set. {PUBLISHED}")
    if config.shots < 0:
        raise UsageError(f"--shots is {config.shots}; give 0 or more")
    return Choice(config, read(config.data, config.shots, config.subjects, config.limit), name)


# ---------------------------------------------------------------- questions

Subjects = Mapping[str, tuple[Sequence[Question], Sequence[Question]]]  # examples and questions, by subject


@dataclass(frozen=True)
class Set:
    """What is asked, and of which set it is."""

    subjects: Subjects
    lang: str  # en or zh
    name: str = ""  # mmlu, ceval, cmmlu; "" of any other
    note: str = ""  # what a reader of the figures must know of the questions

    @property
    def groups(self) -> dict[str, list[str]]:
        """The subjects that are asked, by the groups of their authors; a subject may stand in two."""
        groups = KNOWN[self.name]["groups"] if self.name else {}
        found = {group: [name for name in self.subjects if name in names] for group, names in groups.items()}
        return {group: names for group, names in found.items() if names}

    @property
    def head(self) -> str:
        """The line before the examples, with a place for the subject."""
        return HEADS.get(self.name, HEADS[self.lang])

    def opening(self, subject: str) -> str:
        """The line before the examples of a subject."""
        names = KNOWN.get(self.name, {}).get("names", {})
        return self.head.format(subject=names.get(subject, subject.replace("_", " ")))


def read(folder: Path, shots: int, subjects: str = "", limit: int = 0) -> Set:
    """Examples and questions of each subject, in order of name; ValueError names what is missing or broken."""
    where, told = asked_part(folder)
    files = subject_files(where)
    wanted = [name.strip() for name in subjects.split(",")] if subjects else list(files)
    if unknown := [name for name in wanted if name not in files]:
        raise UsageError(f"--subjects: {where} has no {unknown[0]}; it has {', '.join(files) or 'no CSV file'}")
    if not wanted:
        raise ValueError(f"{where} holds no CSV file; {PUBLISHED}")
    examples, found = subject_files(folder / "dev"), dict[str, tuple[list[Question], list[Question]]]()
    for name in wanted:
        if shots and name not in examples:
            like = folder / "dev" / files[name].name.replace(f"_{where.name}.", "_dev.")
            raise ValueError(f"{like} with the examples is missing; copy it there, or give --shots 0")
        found[name] = (
            questions(examples[name], name)[:shots] if shots else [],
            questions(files[name], name)[: limit or None],
        )
    lang = language(found)
    name = set_of(list(files), lang, any(file.stem != subject for subject, file in files.items()))
    return Set(found, lang if name in ("", "mmlu") else "zh", name, told)


def asked_part(folder: Path) -> tuple[Path, str]:
    """The folder with the questions, and what is to be told of it: test, but val where test has no answers."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; {PUBLISHED}")
    found = [folder / part for part in ("test", "val") if (folder / part).is_dir()]
    if not found:
        raise ValueError(f"{folder} has no folder test or val with CSV files; {PUBLISHED}")
    files = list(subject_files(found[0]).values())
    if found[0].name == "val" or not files or answered(files[0]):
        return found[0], ""
    if len(found) == 1:
        raise ValueError(f"{found[0]} holds no answers, as that of C-Eval; copy its folder val to {folder} too")
    return found[1], f"{found[0]} holds no answers: the questions are those of {found[1]}"


def subject_files(folder: Path) -> dict[str, Path]:
    """The CSV files of a folder by subject: SUBJECT_dev.csv in dev, or SUBJECT.csv."""
    files = sorted(file for file in folder.glob("*.csv") if not file.name.startswith("."))  # ._x.csv is of a Mac
    return {file.stem.removesuffix(f"_{folder.name}"): file for file in files}


def set_of(subjects: Sequence[str], lang: str, suffixed: bool) -> str:
    """The set that has the most of these subjects, "" where none has half of them. What two sets have alike goes by
    the language, and by whether the names of the files tell the part, which CMMLU's do not."""

    def fits(name: str) -> tuple[int, bool, bool]:
        own = {subject for group in KNOWN[name]["groups"].values() for subject in group}
        return len(own & {*subjects}), (lang == "en") == (name == "mmlu"), suffixed == (name != "cmmlu")

    best = max(KNOWN, key=fits)
    return best if 2 * fits(best)[0] >= len(subjects) else ""


def language(asked: Subjects) -> str:
    """`zh` where the questions hold more Chinese than Latin letters."""
    text = "".join(question.text for _, found in asked.values() for question in found[:20])
    chinese = sum("一" <= each <= "鿿" for each in text)
    return "zh" if chinese > sum(each.isascii() and each.isalpha() for each in text) else "en"


def questions(file: Path, subject: str) -> list[Question]:
    """The questions of a CSV file; ValueError names the line that is none."""
    columns, lines = table(file)
    if not lines:
        raise ValueError(f"{file} is empty: it holds no question")
    if columns and len(columns) < 6:
        raise ValueError(f"{file} has no column with the answers")
    found: list[Question] = []
    for line, row in lines:
        places = columns or list(range(6))
        if len(row) <= max(places):
            raise ValueError(f"{file} line {line}: {len(row)} columns; a question has question, A, B, C, D, answer")
        text, *choices, answer = (row[place] for place in places)
        answer = answer.strip()
        number = LETTERS.find(answer.upper()) if len(answer) == 1 else -1
        number = int(answer) if columns and answer.isdigit() and int(answer) < 4 else number
        if number < 0:
            raise ValueError(f"{file} line {line}: the answer is {answer!r}; it must be one of A, B, C, D")
        found.append(Question(subject, len(found), text.strip(), tuple(choices), number))
    return found


def answered(file: Path) -> bool:
    """Whether a CSV file has answers; one that is broken counts as if it had, for then its lines are named."""
    columns, lines = table(file)
    if columns and len(columns) < 6:
        return False
    at = columns[5] if columns else 5
    return not lines or any(len(row) <= at or row[at].strip() for _, row in lines)


def table(file: Path) -> tuple[list[int] | None, list[tuple[int, list[str]]]]:
    """(where the columns of a question stand if the first line names them, the other lines with their numbers)."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    columns = named_columns(lines[0][1]) if lines else None
    return columns, lines[1:] if columns else lines


def named_columns(head: Sequence[str]) -> list[int] | None:
    """Where question, four choices and, if there is one, the answer stand, if the first line says so."""
    names = [name.strip().lower() for name in head]
    for choices in (["a", "b", "c", "d"], [f"choice{number}" for number in range(4)]):
        if all(name in names for name in ("question", *choices)):
            return [names.index(name) for name in ("question", *choices, "answer") if name in names]
    return None


# ---------------------------------------------------------------- prompts


def block(question: Question, ask: str) -> str:
    """Question, choices and what asks for the letter, as lm-evaluation-harness writes them."""
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True))
    return f"{question.text}\n{choices}\n{ask}"


def plain(examples: Sequence[Question], question: Question, asked: Set) -> str:
    """The prompt of a base model, which ends before the blank and the letter."""
    ask = ASKS[asked.lang]
    shown = [f"{block(each, ask)} {LETTERS[each.answer]}" for each in examples]
    return "\n\n".join([asked.opening(question.subject), *shown, block(question, ask)])


def conversation(examples: Sequence[Question], question: Question, asked: Set) -> Dialog:
    """The same as a conversation: each example a turn, the question the last; nothing is switched on."""
    ask = ASKS[asked.lang]
    turns = [Turn(block(each, ask), reply=LETTERS[each.answer]) for each in examples]
    turns.append(Turn(block(question, ask)))
    turns[0].human = f"{asked.opening(question.subject)}\n\n{turns[0].human}"
    return silent(turns)


def continuations(
    examples: Sequence[Question], question: Question, who: Subject, asked: Set, chat: bool
) -> tuple[int, list[Continuation]]:
    """(examples, the four letters after the prompt): as many of the last examples as fit; ValueError where the
    question alone does not."""
    for first in range(len(examples) + 1):
        shown = examples[first:]
        if chat:
            found = after_dialog(conversation(shown, question, asked), LETTERS, who.tokens, who.quality)
        else:
            found = after_text(plain(shown, question, asked), [f" {letter}" for letter in LETTERS], who.tokens)
        if all(len(each.prompt) + len(each.answer) <= who.longest for each in found):
            return len(shown), found
    raise ValueError(f"{question.id} alone takes more than the {who.longest} tokens of the model")


def letter_in(reply: str) -> str:
    """The letter that a reply names: the last that it calls its answer, else the one that it is or begins with, else
    the only one that stands in it; "" where none does, or a list of them begins it, for nothing is guessed."""
    if stated := STATED.findall(reply):
        return stated[-1]
    if (begun := BEGUN.match(reply)) and not LISTED.search(reply):
        return begun.group(1)
    alone = set(ALONE.findall(reply))
    return alone.pop() if len(alone) == 1 else ""


# ---------------------------------------------------------------- the task


@dataclass(frozen=True)
class Choice:
    """The task of `moss eval mmlu`."""

    config: MMLU
    asked: Set
    name: str = "mmlu"

    def template(self, who: Subject) -> dict[str, Any]:
        """Style, language, set and texts."""
        style = "chat" if chats(self.config.style, who) else "plain"
        texts = {"head": self.asked.head, "ask": ASKS[self.asked.lang]}
        return {"style": style, "shots": self.config.shots, "lang": self.asked.lang, "set": self.asked.name} | texts

    def measure(self, who: Subject, kept: Kept) -> list[dict[str, Any]]:
        """A row a question: its prompt, the log-probability of each letter, the choice and whether it is right; of a
        chat server, which tells no probabilities, what it replied."""
        todo = [(examples, each) for examples, found in self.asked.subjects.values() for each in found]
        if who.tok is None:
            self._by_reply([(each, conversation(examples, each, self.asked)) for examples, each in todo], who, kept)
        else:
            self._by_likelihood(todo, who, kept)
        return [kept.rows[question.id] for _, question in todo]

    def _by_likelihood(self, todo: Sequence[tuple[Sequence[Question], Question]], who: Subject, kept: Kept) -> None:
        chat, new = chats(self.config.style, who), list[tuple[dict[str, Any], list[Continuation]]]()
        for examples, question in todo:
            shots, asked = continuations(examples, question, who, self.asked, chat)
            ids = {"prompt": list(asked[0].prompt), "letters": [list(each.answer) for each in asked]}
            begun = {"id": question.id, "made_of": made_of(ids, question.answer), "shots": shots} | ids
            if not kept.have(question.id, begun["made_of"]):
                new.append((begun | {"answer": LETTERS[question.answer]}, asked))
        with bar("questions", len(todo) - len(new), len(todo)) as shown:
            for begin in range(0, len(new), AT_ONCE):
                part = new[begin : begin + AT_ONCE]
                found = who.likelihoods([each for _, asked in part for each in asked])
                for number, (begun, _) in enumerate(part):
                    scores = found[4 * number : 4 * number + 4]
                    choice = LETTERS[int(np.argmax(scores))]
                    kept.add(begun | {"scores": scores, "choice": choice, "right": choice == begun["answer"]})
                shown.show(len(todo) - len(new) + begin + len(part), part[-1][0]["id"])

    def _by_reply(self, todo: Sequence[tuple[Question, Dialog]], who: Subject, kept: Kept) -> None:
        texts = [to_openai(dialog)["messages"] for _, dialog in todo]
        prints = [made_of(text, each.answer, MAX_TOKENS) for text, (each, _) in zip(texts, todo, strict=True)]
        new = kept.missing([each.id for each, _ in todo], prints)
        options = Options(Sampling(temperature=0, max_tokens=MAX_TOKENS))
        with bar("questions", len(todo) - len(new), len(todo)) as shown:
            told = answers(who, [todo[at][1] for at in new], options)
            for done, (at, each) in enumerate(zip(new, told, strict=True), start=len(todo) - len(new) + 1):
                question = todo[at][0]
                reply, answer = each.turn.reply if each.turn else "", LETTERS[question.answer]
                begun = {"id": question.id, "made_of": prints[at], "shots": self.config.shots, "messages": texts[at]}
                said = {"reply": reply, "choice": letter_in(reply), "answer": answer, "failed": each.failed}
                right = said["choice"] == answer if each.turn else None
                kept.add(begun | said | {"right": right}, lasting=each.turn is not None)
                shown.show(done, question.id)

    def values(self, rows: Sequence[dict[str, Any]]) -> dict[str, Values]:
        """The accuracy of all questions, of each group and of each subject."""
        right = {row["id"]: None if row["right"] is None else float(row["right"]) for row in rows}
        found: dict[str, Values] = {"accuracy": (list(right.values()), None)}
        for group, names in self.asked.groups.items():
            mine = [each for name in names for each in self.asked.subjects[name][1]]
            found[group] = ([right[each.id] for each in mine], None)
        for name, (_, asked) in self.asked.subjects.items():
            found[f"  {name}"] = ([right[each.id] for each in asked], None)
        return found

    def notes(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Whose questions were asked, how many examples did not fit, and how many replies named no letter."""
        wanted = self.config.shots
        short = [row["shots"] for row in rows if row["shots"] < wanted]
        few = f"{len(short):,} questions have fewer than {wanted} examples, {np.mean(short or 0):.1f} on average"
        told = [self.asked.note] if self.asked.note else []
        told += [f"{few}: the model reads no more, or the set has none"] if short else []
        if any("reply" in row for row in rows):
            odd = sum(not row["choice"] for row in rows if not row["failed"])
            told.append(f"answers are the letters that replies name, not the likeliest; {odd:,} replies name none")
        return told + unanswered([row.get("failed", "") for row in rows])
