"""Files that are written whole or not at all, and what tells a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moss.files import replacing, sha256


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """A program that dies while it writes must leave what was there, and no half of the new."""
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as file:
        file.write_text("ne")
        assert target.read_text() == "old"
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "old"
    with replacing(target) as file:
        file.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "new"


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    """The example of FIPS 180-2, so that another program can check our files."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_errors_name_the_file_that_was_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user never asked for `.a.txt.123.tmp`; and a disk that turned read-only must not hide the first error."""
    with pytest.raises(OSError) as caught, replacing(tmp_path / "none" / "a.txt"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "a.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught, replacing(tmp_path / "folder"):
        pass
    assert caught.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def read_only(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt"):
        raise ZeroDivisionError
