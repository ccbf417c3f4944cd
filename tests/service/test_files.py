from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from lm.errors import NotFoundError, UserError
from service.database import Database
from service.files import FileStore, Purpose, StoredFile
from service.jobs.checking import SMALL_BYTES

GOOD = b'{"input": "a", "output": "b"}\n'


@pytest.fixture
def files(database: Database, home: Path) -> FileStore:
    return FileStore(database, home / "files")


def add(
    files: FileStore, data: bytes = GOOD, *, filename: str = "a.jsonl", purpose: Purpose = "fine-tune"
) -> StoredFile:
    return asyncio.run(files.take(io.BytesIO(data), filename=filename, purpose=purpose))


def test_a_file_comes_back_byte_for_byte(files: FileStore) -> None:
    stored = add(files, GOOD * 3)
    assert files.get(stored.id) == stored
    assert (stored.bytes, stored.filename, stored.purpose) == (len(GOOD) * 3, "a.jsonl", "fine-tune")
    assert files.path(stored.id).read_bytes() == GOOD * 3


def test_a_bad_line_is_named_and_nothing_is_kept(files: FileStore) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, record 2 \(line 2.*broken JSON"):
        add(files, GOOD + b'{"input": \n')
    with pytest.raises(UserError, match="holds no records"):
        add(files, b"")
    assert list(files.folder.iterdir()) == []
    assert files.page(limit=10) == ([], False)


def test_a_bad_line_far_down_a_large_file_is_found_by_another_process(files: FileStore) -> None:
    large = GOOD * (SMALL_BYTES // len(GOOD) + 1)
    with pytest.raises(UserError, match=r"a\.jsonl, record (\d+) \(line \1, column 1\): broken JSON") as error:
        add(files, large + b"nonsense\n")
    assert error.value.param == "file"
    assert list(files.folder.iterdir()) == []
    assert add(files, large).bytes == len(large)


def test_only_training_data_is_checked(files: FileStore) -> None:
    assert add(files, b"\x00 anything", purpose="user_data").bytes == 10


def test_a_filename_is_never_a_path(files: FileStore) -> None:
    stored = add(files, filename="../../etc/passwd")
    assert files.path(stored.id).parent == files.folder
    assert stored.filename == "../../etc/passwd"


def test_pages_have_an_order_a_purpose_and_an_end(files: FileStore) -> None:
    ids = [add(files).id, add(files, purpose="evals").id, add(files).id]
    newest, more = files.page(limit=2)
    assert ([file.id for file in newest], more) == ([ids[2], ids[1]], True)
    assert [file.id for file in files.page(limit=2, after=ids[1])[0]] == [ids[0]]
    assert [file.id for file in files.page(limit=9, purpose="fine-tune", ascending=True)[0]] == [ids[0], ids[2]]
    assert [file.id for file in files.page(limit=9, after=ids[0], ascending=True)[0]] == [ids[1], ids[2]]


def test_what_an_interrupted_upload_left_is_removed_at_the_next_start(files: FileStore, database: Database) -> None:
    stored = add(files)
    (files.folder / ".upload.x").write_bytes(GOOD)
    again = FileStore(database, files.folder)
    assert [path.name for path in again.folder.iterdir()] == [stored.id]


def test_a_deleted_file_is_gone(files: FileStore) -> None:
    stored = add(files)
    files.delete(stored.id)
    assert list(files.folder.iterdir()) == []
    with pytest.raises(NotFoundError, match=stored.id):
        files.get(stored.id)
