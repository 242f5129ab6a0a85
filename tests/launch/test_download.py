"""download_dataset.sh and download_model.sh, against a server that is here."""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from repository import REPOSITORY

DATASET, MODEL = REPOSITORY / "download_dataset.sh", REPOSITORY / "download_model.sh"
NEEDED = ["awk", "bash", "cat", "cut", "df", "dirname", "find", "flock", "ls", "md5sum"]
NEEDED += ["mkdir", "mv", "realpath", "rm", "stat", "tail", "wc"]
ANNOTATIONS, VAL, TRAIN = "annotations/annotations_trainval2017.zip", "zips/val2017.zip", "zips/train2017.zip"
WEIGHTS = "records/3236545/files/resnet34-ssd1200.pytorch"
RECORD = "api/records/3236545"


def archive(folder: str, num_files: int) -> bytes:
    """A zip archive with a folder of files of 40,000 random bytes each."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for number in range(num_files):
            file.writestr(f"{folder}/{number:012}.jpg", random.Random(f"{folder}{number}").randbytes(40_000))
    return content.getvalue()


class Server:
    """Serves what is in `files`, by path; counts requests, and keeps where each began."""

    def __init__(self) -> None:
        self.files = {
            ANNOTATIONS: archive("annotations", 2),
            VAL: archive("val2017", 5),
            TRAIN: archive("train2017", 9),
        }
        self.files[WEIGHTS] = random.Random(0).randbytes(300_000)
        self.files[RECORD] = zenodo_record(self.files[WEIGHTS])
        self.starts: dict[str, list[int]] = {}
        self.cuts: Counter[str] = Counter()  # how many times the connection breaks halfway, by path
        self.pauses: set[str] = set()  # paths of which the second half never comes
        self.knows_ranges = True
        self.halfway, self.closing = threading.Event(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def manifest(self, *paths: str) -> str:
        return "".join(f"{md5(self.files[path])} {len(self.files[path])} {path}\n" for path in paths)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: object) -> None:
        self.of = server
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.path.removeprefix("/")
        content = self.of.files.get(path)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.of.knows_ranges else None
        start = int(asked[1]) if asked else 0
        self.of.starts.setdefault(path, []).append(start)
        if content is None:
            self.send_error(404)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        middle = (start + len(content)) // 2
        self.wfile.write(content[start:middle])
        if path in self.of.pauses:
            self.of.halfway.set()
            self.of.closing.wait()
        elif self.of.cuts[path]:
            self.of.cuts[path] -= 1
        else:
            self.wfile.write(content[middle:])

    def log_message(self, *_: object) -> None: ...


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def zenodo_record(content: bytes, name: str = "resnet34-ssd1200.pytorch") -> bytes:
    file = {"key": name, "size": len(content), "checksum": f"md5:{md5(content)}", "links": {"self": "…"}}
    return json.dumps({"id": 3236545, "files": [{**file, "key": "other"}, file], "title": "Größe"}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.closing(Server()) as server:
        yield server


@pytest.fixture
def here(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a blank in its name, and an environment in which the scripts ask the server."""
    (tmp_path / "manifest").write_text(server.manifest(ANNOTATIONS, VAL, TRAIN))
    for name, value in {
        "SSD_FAST_COCO_URL": server.url,
        "SSD_FAST_COCO_MANIFEST": str(tmp_path / "manifest"),
        "SSD_FAST_MODEL_URL": server.url,
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSD_FAST_MODEL_MANIFEST", raising=False)
    directory = tmp_path / "my data"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)


def error(*command: str | Path) -> str:
    """What a command that fails writes as its error."""
    done = run(*command)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def succeed(*command: str | Path) -> str:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def visible(directory: Path) -> set[str]:
    """Files and folders in a folder; a folder that is being unpacked would be among them."""
    return {path.name for path in directory.iterdir()}


def is_whole(directory: Path, server: Server, path: str) -> bool:
    """Whether the folder is what the archive holds."""
    with zipfile.ZipFile(io.BytesIO(server.files[path])) as file:
        expected = {name: file.read(name) for name in file.namelist()}
    folder = next(iter(expected)).split("/")[0]
    found = [path for path in (directory / folder).iterdir() if path.name != ".archive"]
    return expected == {f"{folder}/{path.name}": path.read_bytes() for path in found}


def only(directory: Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> Path:
    """Makes a folder of programs the PATH: what every script needs, and those named."""
    directory.mkdir(exist_ok=True)
    for name in {*NEEDED, *programs}:
        program = sys.executable if name == "python3" else shutil.which(name)
        if program is None:
            pytest.skip(f"{name} is not installed")
        (directory / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(directory))
    return directory


def stub(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> None:
    """A program in place of another."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/bash\n{body}\n")
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


class TestDataset:
    def test_the_layout_is_that_of_coco_and_a_second_call_asks_for_nothing(self, here: Path, server: Server) -> None:
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
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
    ) -> None:
        only(here / "bin", monkeypatch, downloader, "unzip")
        server.cuts[VAL] = 2
        succeed(DATASET, "a b")
        size = len(server.files[VAL])
        assert server.starts[VAL] == [0, size // 2, (size // 2 + size) // 2]
        assert is_whole(here / "a b", server, VAL)

    @pytest.mark.parametrize("downloader", ["curl", "wget"])
    def test_a_server_that_cannot_continue_is_asked_afresh(
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
    ) -> None:
        only(here / "bin", monkeypatch, downloader, "unzip")
        server.knows_ranges = False
        server.cuts[VAL] = 1
        succeed(DATASET)
        assert is_whole(here / "coco", server, VAL)

    @pytest.mark.parametrize("downloader", ["curl", "wget"])
    def test_a_wrong_file_is_refused_and_removed(
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
    ) -> None:
        only(here / "bin", monkeypatch, downloader, "unzip")
        right = server.files[VAL]
        for wrong in (archive("val2017", 4), archive("val2017", 6), right[:-1] + b"!", b"<html>", right[:1000]):
            server.files[VAL] = wrong
            assert f"{server.url}/{VAL}: expected the MD5 {md5(right)}, something else came" in error(DATASET)
            assert visible(here / "coco") == {"annotations"}

    def test_a_missing_file_is_named(self, here: Path, server: Server) -> None:
        del server.files[VAL]
        message = error(DATASET)
        assert f"{server.url}/{VAL}: the download failed" in message
        assert "404" in message
        assert visible(here / "coco") == {"annotations"}
        assert server.starts[VAL] == [0]

    def test_no_server_is_an_error(self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        server.close()
        assert f"{server.url}/{ANNOTATIONS}: the download failed" in error(DATASET)
        assert not visible(here / "coco")

    @pytest.mark.parametrize("left", [b"part of something else", bytes(200_198), bytes(9_000_000)])
    def test_a_part_of_something_else_is_replaced(self, here: Path, server: Server, left: bytes) -> None:
        (here / "coco").mkdir()
        (here / "coco" / "val2017.zip.part").write_bytes(left[: 2 * len(server.files[VAL])])
        succeed(DATASET)
        assert visible(here / "coco") == {"annotations", "val2017"}
        assert is_whole(here / "coco", server, VAL)

    def test_the_disk_must_hold_what_is_unpacked_and_the_largest_archive(
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        annotations, val = len(server.files[ANNOTATIONS]), len(server.files[VAL])
        needed = annotations * 350 // 100 + val * 103 // 100 + val
        stub(here / "bin", monkeypatch, "df", f"echo Avail; echo {needed - 1}")
        assert re.search(rf"{here}/coco: 1 MB are needed, 1 MB are free", error(DATASET))
        assert not visible(here / "coco")
        assert not server.starts
        stub(here / "bin", monkeypatch, "df", f"echo Avail; echo {needed}")
        succeed(DATASET)
        stub(here / "bin", monkeypatch, "df", "echo Avail; echo 0")
        succeed(DATASET)

    def test_a_disk_that_is_full_in_the_middle_leaves_a_part_to_go_on_with(self, here: Path, server: Server) -> None:
        assert "the download failed" in error("bash", "-c", f'ulimit -f 100; exec "{DATASET}"')
        assert (here / "coco" / "val2017.zip.part").stat().st_size == 100 * 1024
        succeed(DATASET)
        assert server.starts[VAL][-1] == 100 * 1024
        assert is_whole(here / "coco", server, VAL)

    def test_nothing_half_unpacked_is_left(self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        path = os.environ["PATH"]
        stub(here / "bin", monkeypatch, "unzip", 'mkdir "$4/annotations"; echo half >"$4/annotations/1.jpg"; exit 50')
        assert "annotations_trainval2017.zip: cannot be unpacked" in error(DATASET)
        assert visible(here / "coco") == {"annotations_trainval2017.zip"}
        monkeypatch.setenv("PATH", path)
        succeed(DATASET)
        assert is_whole(here / "coco", server, ANNOTATIONS)
        assert server.starts[ANNOTATIONS] == [0]

    def test_an_archive_of_something_else_is_refused(self, here: Path, server: Server) -> None:
        server.files[VAL] = archive("validation", 3)
        (here.parent / "manifest").write_text(server.manifest(ANNOTATIONS, VAL))
        assert "val2017.zip: expected the folder val2017 in it, found validation" in error(DATASET)
        assert visible(here / "coco") == {"annotations", "val2017.zip"}

    @pytest.mark.parametrize("downloader", ["curl", "wget"])
    def test_ctrl_c_leaves_a_part_that_the_next_call_continues(
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, downloader: str
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

    def test_the_leavings_of_a_killed_process_are_cleared_away(self, here: Path, server: Server) -> None:
        (here / "coco" / ".unpacking" / "val2017").mkdir(parents=True)
        (here / "coco" / ".unpacking" / "val2017" / "999.jpg").touch()
        succeed(DATASET)
        assert visible(here / "coco") == {"annotations", "val2017"}
        assert is_whole(here / "coco", server, VAL)

    def test_folders_of_other_origin_or_content_are_left_alone(self, here: Path, server: Server) -> None:
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

    def test_archives_that_lie_there_are_used_if_they_are_right(self, here: Path, server: Server) -> None:
        (here / "coco").mkdir()
        for path in (ANNOTATIONS, VAL):
            (here / "coco" / Path(path).name).write_bytes(server.files[path])
        succeed(DATASET)
        assert not server.starts
        assert is_whole(here / "coco", server, VAL)
        (here / "coco" / "train2017.zip").write_bytes(b"my own")
        assert "coco/train2017.zip: expected the MD5" in error(DATASET, "--train")
        assert (here / "coco" / "train2017.zip").read_bytes() == b"my own"

    def test_without_unzip_python_unpacks(self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
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
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, programs: list[str], message: str
    ) -> None:
        only(here / "bin", monkeypatch, *programs)
        assert message in error(DATASET)
        assert not server.starts

    def test_two_at_once_are_refused(self, here: Path, server: Server) -> None:
        (here / "coco").mkdir()
        with contextlib.ExitStack() as stack:
            descriptor = os.open(here / "coco", os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            assert "another download into this folder is running" in error(DATASET)
        succeed(DATASET)

    @pytest.mark.parametrize(
        "text", ["", "val2017.zip\n", "abc 12 zips/val2017.zip\n", f"{'0' * 32} 12 myval2017.zip\n"]
    )
    def test_a_manifest_without_the_archive_is_named(
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        manifest = here.parent / "manifest"
        manifest.write_text(server.manifest(ANNOTATIONS) + text)
        assert f"{manifest}: expected a line 'MD5 BYTES PATH' for val2017.zip, found" in error(DATASET)
        monkeypatch.setenv("SSD_FAST_COCO_MANIFEST", "nothing")
        assert "SSD_FAST_COCO_MANIFEST: expected a file that can be read, found 'nothing'" in error(DATASET)
        assert not server.starts

    def test_without_a_manifest_the_official_archives_are_expected(
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SSD_FAST_COCO_MANIFEST")
        stub(here / "bin", monkeypatch, "df", "echo Avail; echo 41000000000")
        assert "expected the MD5 f4bbac642086de4f52a3fdda2de5fa2c" in error(DATASET, "--train")
        stub(here / "bin", monkeypatch, "df", "echo Avail; echo 40000000000")
        assert "40980 MB are needed, 40000 MB are free" in error(DATASET, "--train")


class TestModel:
    def test_zenodo_says_what_is_right_and_a_second_call_asks_for_nothing(self, here: Path, server: Server) -> None:
        server.cuts[WEIGHTS] = 1
        assert md5(server.files[WEIGHTS]) in succeed(MODEL)
        assert server.starts[WEIGHTS] == [0, 150_000]
        file = here / "pretrained" / "resnet34-ssd1200.pytorch"
        assert file.read_bytes() == server.files[WEIGHTS]
        assert run("bash", "-c", "cd pretrained; md5sum -c *.md5").returncode == 0
        server.starts.clear()
        succeed(MODEL)
        assert not server.starts
        file.write_bytes(b"damaged")
        assert f"{file}: expected the MD5 {md5(server.files[WEIGHTS])}: move this file away" in error(MODEL)

    def test_wget_does_as_well(self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        only(here / "bin", monkeypatch, "wget", "python3")
        server.cuts[WEIGHTS] = 1
        succeed(MODEL, "some where")
        assert (here / "some where" / "resnet34-ssd1200.pytorch").read_bytes() == server.files[WEIGHTS]

    def test_a_wrong_file_is_refused_and_removed(self, here: Path, server: Server) -> None:
        server.files[WEIGHTS] = b"wrong" + server.files[WEIGHTS][5:]
        assert "expected the MD5" in error(MODEL)
        assert not visible(here / "pretrained")

    @pytest.mark.parametrize("record", [b"", b"<html>", b'{"files": []}', b"{}", zenodo_record(b"", name="else"), None])
    def test_a_record_that_does_not_say_it_is_an_error(self, here: Path, server: Server, record: bytes | None) -> None:
        if record is None:
            del server.files[RECORD]
        else:
            server.files[RECORD] = record
        message = error(MODEL)
        assert f"{server.url}/{RECORD}: " in message
        assert "Traceback" not in message
        assert WEIGHTS not in server.starts

    def test_a_manifest_takes_the_place_of_the_record(
        self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.files["mine/resnet34-ssd1200.pytorch"] = b"mine"
        (here / "manifest").write_text(server.manifest("mine/resnet34-ssd1200.pytorch"))
        monkeypatch.setenv("SSD_FAST_MODEL_MANIFEST", "manifest")
        for _ in range(2):
            succeed(MODEL)
        assert list(server.starts) == ["mine/resnet34-ssd1200.pytorch"]
        assert (here / "pretrained" / "resnet34-ssd1200.pytorch").read_bytes() == b"mine"

    def test_too_little_disk_is_said(self, here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        stub(here / "bin", monkeypatch, "df", "echo Avail; echo 299999")
        assert "pretrained: 1 MB are needed" in error(MODEL)
        assert WEIGHTS not in server.starts


CALLER = """
function mine { :; }
alias ll=ls
set -u -o noclobber
shopt -s nullglob
trap 'echo interrupted' INT
changing='_|BASH.*|FUNCNAME|LINENO|PIPESTATUS|RANDOM|SECONDS|EPOCH.*|SRANDOM|before|status'
state() {
    pwd; set +o; shopt -p; trap -p; alias; declare -F
    declare -p | grep -vE "^declare -[^ ]+ ($changing)(=|$)"
}
script=$1 folder=$2
set --
before=$(state)
source "$script" "$folder"
status=$?
[[ $(state) == "$before" ]] || diff <(echo "$before") <(state)
echo "status $status"
"""


@pytest.mark.parametrize("script", [DATASET, MODEL])
class TestSourced:
    def test_the_callers_shell_stays_as_it_is(self, here: Path, server: Server, script: Path) -> None:
        done = run("bash", "-c", CALLER, "bash", script, "a b")
        assert done.stdout.splitlines()[-1] == "status 0", done.stdout + done.stderr
        assert (here / "a b").is_dir()
        server.files.clear()
        done = run("bash", "-c", CALLER, "bash", script, "c d")
        assert done.stdout.splitlines()[-1] == "status 1", done.stdout + done.stderr
        assert "< " not in done.stdout

    def test_the_folder_is_below_the_callers_one(self, here: Path, script: Path) -> None:
        done = run("bash", "-eu", "-c", f'cd /; cd "{here}"; source "{script}" && source "{script}" && echo went on')
        assert done.stdout.endswith("went on\n"), done.stderr
        assert visible(here) == {"coco" if script == DATASET else "pretrained"}

    def test_zsh_can_source_it(self, here: Path, script: Path) -> None:
        if shutil.which("zsh") is None:
            pytest.skip("zsh is not installed")
        done = run("zsh", "-f", "-c", f'set -u; source "{script}" "a b"; echo "status $?"')
        assert done.stdout.endswith("status 0\n"), done.stderr
        assert (here / "a b").is_dir()

    def test_too_many_folders_are_refused_with_the_usage(self, here: Path, script: Path) -> None:
        done = run(script, "one", "two")
        assert done.returncode == 2
        assert done.stderr.startswith("usage: ")
        assert not visible(here)


def test_shellcheck_has_nothing_to_say_of_what_they_share() -> None:
    done = run(Path(sys.executable).with_name("shellcheck"), REPOSITORY / "downloading.sh")
    assert done.returncode == 0, done.stdout
