"""Files that are whole or not there."""

import os
import threading
from pathlib import Path

import pytest

from ssd_fast.files import write_atomically


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        write_atomically(path, content)
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("file", b"new")]


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=write_atomically, args=(pipe, b"content"), daemon=True)
    writer.start()
    assert pipe.read_bytes() == b"content"
    writer.join(10)
    assert pipe.is_fifo()


def test_a_folder_in_its_place_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not written") as error:
        write_atomically(tmp_path, b"")
    assert error.value.filename == str(tmp_path)
