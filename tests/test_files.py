"""Files that are whole or not there."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ssd_fast.files import check_folder, check_writable, remove_leftovers, unfinished, write_atomically


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/file", "no folder .*missing: expected a file in a folder that exists"),
        ("folder", "is a folder: expected a file"),
        ("old/file", "no folder .*old: expected"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_and_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(ValueError, match=f"--output {tmp_path / name}: {message}"):
        check_writable(tmp_path / name, "--output", Path.is_file)


def test_a_folder_that_takes_no_files_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match="--output /proc/new: cannot be written: "):
        check_writable(Path("/proc/new"), "--output", Path.is_file)


def test_a_check_of_a_place_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        check_writable(tmp_path / name, "--output", Path.is_file)
    check_writable(Path("/dev/null"), "--output", Path.is_dir)
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("old", b"old")]


def test_results_go_to_a_new_folder_or_replace_earlier_ones_only(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "part_1.txt").write_bytes(b"mine")
    names = ("whole.txt", "sub/part_*.txt")
    check_folder(tmp_path / "new" / "newer", "--output", names, Path.is_file)
    check_folder(tmp_path, "--output", names[:1], Path.is_file)
    check_folder(tmp_path, "--output", names, Path.is_dir)
    with pytest.raises(ValueError, match=rf"--output {tmp_path}: sub/part_1\.txt exists .*expected another folder"):
        check_folder(tmp_path, "--output", names, Path.is_file)
    with pytest.raises(ValueError, match=r"part_1\.txt is a file: expected a folder"):
        check_folder(tmp_path / "sub" / "part_1.txt" / "new", "--output", names, Path.is_dir)
    with pytest.raises(ValueError, match="--output /proc/new: /proc cannot be written to"):
        check_folder(Path("/proc/new"), "--output", names, Path.is_dir)
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["part_1.txt", "sub"]


KILLED = """
import os, signal, sys
from pathlib import Path
from ssd_fast import files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), b"new")
"""


def test_what_a_killed_process_leaves_is_removed_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    unfinished(target).write_bytes(b"a link that was not renamed")
    (tmp_path / ".ssd_fast-notes.txt").write_bytes(b"of the user")
    (tmp_path / ".ssd_fast-folder.unfinished").mkdir()
    remove_leftovers(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"file", ".ssd_fast-notes.txt", ".ssd_fast-folder.unfinished"}
    assert target.read_bytes() == b"old"


def test_what_a_process_still_writes_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        remove_leftovers(tmp_path)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"new")]
