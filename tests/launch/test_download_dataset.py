"""download_dataset.sh against a server on this machine."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from downloads import (
    ANNOTATIONS,
    DATASET,
    TRAIN,
    VAL,
    Server,
    archive,
    error,
    is_whole,
    md5,
    only,
    stub,
    succeed,
    visible,
)


def test_the_layout_is_that_of_coco_and_a_second_call_asks_for_nothing(here: Path, server: Server) -> None:
    succeed(DATASET)
    assert visible(here / "coco") == {"annotations", "val2017"}
    assert is_whole(here / "coco", server, VAL)
    assert is_whole(here / "coco", server, ANNOTATIONS)
    server.starts.clear()
    assert f"{here}/coco/val2017: 5 files" in succeed(DATASET)
    assert not server.starts
    succeed(DATASET, "--train", "coco")
    assert is_whole(here / "coco", server, TRAIN)
    assert list(server.starts) == [TRAIN]


@pytest.mark.parametrize("downloader", ["curl", "wget"])
def test_a_broken_connection_is_continued_where_it_broke(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
) -> None:
    only(here / "bin", monkeypatch, downloader, "unzip")
    server.cuts[VAL] = 2
    succeed(DATASET, "a b")
    size = len(server.files[VAL])
    assert server.starts[VAL] == [0, size // 2, (size // 2 + size) // 2]
    assert is_whole(here / "a b", server, VAL)


@pytest.mark.parametrize("downloader", ["curl", "wget"])
def test_a_server_that_cannot_continue_is_asked_afresh(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
) -> None:
    only(here / "bin", monkeypatch, downloader, "unzip")
    server.knows_ranges = False
    server.cuts[VAL] = 1
    succeed(DATASET)
    assert is_whole(here / "coco", server, VAL)


@pytest.mark.parametrize("downloader", ["curl", "wget"])
def test_a_wrong_file_is_refused_and_removed(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
) -> None:
    only(here / "bin", monkeypatch, downloader, "unzip")
    right = server.files[VAL]
    for wrong in (archive("val2017", 4), archive("val2017", 6), right[:-1] + b"!", b"<html>", right[:1000]):
        server.files[VAL] = wrong
        assert f"{server.url}/{VAL}: expected the MD5 {md5(right)}, got another file" in error(DATASET)
        assert visible(here / "coco") == {"annotations"}


def test_a_missing_file_is_named(here: Path, server: Server) -> None:
    del server.files[VAL]
    message = error(DATASET)
    assert f"{server.url}/{VAL}: the download failed" in message
    assert "404" in message
    assert visible(here / "coco") == {"annotations"}
    assert server.starts[VAL] == [0]


def test_no_server_is_an_error(here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.close()
    assert f"{server.url}/{ANNOTATIONS}: the download failed" in error(DATASET)
    assert not visible(here / "coco")


@pytest.mark.parametrize("left", [b"part of something else", bytes(200_198), bytes(9_000_000)])
def test_a_part_of_something_else_is_replaced(here: Path, server: Server, left: bytes) -> None:
    (here / "coco").mkdir()
    (here / "coco" / "val2017.zip.part").write_bytes(left[: 2 * len(server.files[VAL])])
    succeed(DATASET)
    assert visible(here / "coco") == {"annotations", "val2017"}
    assert is_whole(here / "coco", server, VAL)


def test_the_disk_must_hold_what_is_unpacked_and_the_largest_archive(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations, val = len(server.files[ANNOTATIONS]), len(server.files[VAL])
    needed = annotations * 350 // 100 + val * 103 // 100 + val
    stub(here / "bin", monkeypatch, "df", f"echo Avail; echo {needed - 1}")
    assert re.search(rf"{here}/coco: expected 1 MB of free disk space, found 1 MB", error(DATASET))
    assert not visible(here / "coco")
    assert not server.starts
    stub(here / "bin", monkeypatch, "df", f"echo Avail; echo {needed}")
    succeed(DATASET)
    stub(here / "bin", monkeypatch, "df", "echo Avail; echo 0")
    succeed(DATASET)


def test_a_disk_that_is_full_in_the_middle_leaves_a_part_to_go_on_with(here: Path, server: Server) -> None:
    assert "the download failed" in error("bash", "-c", f'ulimit -f 100; exec "{DATASET}"')
    assert (here / "coco" / "val2017.zip.part").stat().st_size == 100 * 1024
    succeed(DATASET)
    assert server.starts[VAL][-1] == 100 * 1024
    assert is_whole(here / "coco", server, VAL)


def test_nothing_half_unpacked_is_left(here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ["PATH"]
    stub(here / "bin", monkeypatch, "unzip", 'mkdir "$4/annotations"; echo half >"$4/annotations/1.jpg"; exit 50')
    assert "annotations_trainval2017.zip: cannot be unpacked" in error(DATASET)
    assert visible(here / "coco") == {"annotations_trainval2017.zip"}
    monkeypatch.setenv("PATH", path)
    succeed(DATASET)
    assert is_whole(here / "coco", server, ANNOTATIONS)
    assert server.starts[ANNOTATIONS] == [0]


def test_an_archive_of_something_else_is_refused(here: Path, server: Server) -> None:
    server.files[VAL] = archive("validation", 3)
    (here.parent / "manifest").write_text(server.manifest(ANNOTATIONS, VAL))
    assert "val2017.zip: expected the folder val2017 in it, found validation" in error(DATASET)
    assert visible(here / "coco") == {"annotations", "val2017.zip"}


@pytest.mark.parametrize("downloader", ["curl", "wget"])
def test_ctrl_c_leaves_a_part_that_the_next_call_continues(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
) -> None:
    only(here / "bin", monkeypatch, downloader, "unzip")
    server.pauses.add(VAL)
    process = subprocess.Popen(
        [DATASET],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert server.halfway.wait(30)
    part = here / "coco" / "val2017.zip.part"
    while not part.exists() or part.stat().st_size == 0:
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) in (-signal.SIGINT, 128 + signal.SIGINT)
    assert visible(here / "coco") == {"annotations", "val2017.zip.part"}
    there = part.stat().st_size
    server.pauses.clear()
    succeed(DATASET)
    assert server.starts[VAL] == [0, there]
    assert is_whole(here / "coco", server, VAL)


def test_the_leavings_of_a_killed_process_are_cleared_away(here: Path, server: Server) -> None:
    (here / "coco" / ".unpacking" / "val2017").mkdir(parents=True)
    (here / "coco" / ".unpacking" / "val2017" / "999.jpg").touch()
    succeed(DATASET)
    assert visible(here / "coco") == {"annotations", "val2017"}
    assert is_whole(here / "coco", server, VAL)


def test_folders_of_other_origin_or_content_are_left_alone(here: Path, server: Server) -> None:
    (here / "coco" / "val2017").mkdir(parents=True)
    (here / "coco" / "val2017" / "mine.jpg").touch()
    assert f"{here}/coco/val2017: was not unpacked from the archive with the MD5" in error(DATASET)
    assert not server.starts
    assert visible(here / "coco" / "val2017") == {"mine.jpg"}
    succeed(DATASET, "other")
    next((here / "other" / "val2017").glob("*.jpg")).unlink()
    assert "val2017: expected 5 files, found 4: move this folder away" in error(DATASET, "other")
    (here.parent / "manifest").write_text(server.manifest(ANNOTATIONS, TRAIN).replace("train2017", "val2017"))
    assert "val2017: was not unpacked from the archive with the MD5" in error(DATASET, "other")


def test_archives_that_lie_there_are_used_if_they_are_right(here: Path, server: Server) -> None:
    (here / "coco").mkdir()
    for path in (ANNOTATIONS, VAL):
        (here / "coco" / Path(path).name).write_bytes(server.files[path])
    succeed(DATASET)
    assert not server.starts
    assert is_whole(here / "coco", server, VAL)
    (here / "coco" / "train2017.zip").write_bytes(b"my own")
    assert "coco/train2017.zip: expected the MD5" in error(DATASET, "--train")
    assert (here / "coco" / "train2017.zip").read_bytes() == b"my own"


def test_without_unzip_python_unpacks(here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    only(here / "bin", monkeypatch, "curl", "python3")
    succeed(DATASET)
    assert is_whole(here / "coco", server, VAL)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (["unzip"], "neither curl nor wget is installed"),
        (["curl"], "neither unzip nor python3 is installed"),
    ],
)
def test_missing_programs_are_named(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, programs: list[str], message: str
) -> None:
    only(here / "bin", monkeypatch, *programs)
    assert message in error(DATASET)
    assert not server.starts


def test_two_at_once_are_refused(here: Path, server: Server) -> None:
    (here / "coco").mkdir()
    with contextlib.ExitStack() as stack:
        descriptor = os.open(here / "coco", os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another download into this folder is running" in error(DATASET)
    succeed(DATASET)


@pytest.mark.parametrize("text", ["", "val2017.zip\n", "abc 12 zips/val2017.zip\n", f"{'0' * 32} 12 myval2017.zip\n"])
def test_a_manifest_without_the_archive_is_named(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    manifest = here.parent / "manifest"
    manifest.write_text(server.manifest(ANNOTATIONS) + text)
    assert f"{manifest}: expected a line 'MD5 BYTES PATH' for val2017.zip, found" in error(DATASET)
    monkeypatch.setenv("SSD_FAST_COCO_MANIFEST", "nothing")
    assert "SSD_FAST_COCO_MANIFEST: expected a file that can be read, found 'nothing'" in error(DATASET)
    assert not server.starts


def test_without_a_manifest_the_official_archives_are_expected(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSD_FAST_COCO_MANIFEST")
    stub(here / "bin", monkeypatch, "df", "echo Avail; echo 41000000000")
    assert "expected the MD5 f4bbac642086de4f52a3fdda2de5fa2c" in error(DATASET, "--train")
    stub(here / "bin", monkeypatch, "df", "echo Avail; echo 40000000000")
    assert "expected 40980 MB of free disk space, found 40000 MB" in error(DATASET, "--train")
