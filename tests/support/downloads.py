"""A server and helpers for tests of the download scripts."""

import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
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
    """Serves `files` by path, and records at which byte each request began."""

    def __init__(self) -> None:
        self.files = {
            ANNOTATIONS: archive("annotations", 2),
            VAL: archive("val2017", 5),
            TRAIN: archive("train2017", 9),
        }
        self.files[WEIGHTS] = random.Random(0).randbytes(300_000)
        self.files[RECORD] = zenodo_record(self.files[WEIGHTS])
        self.starts: dict[str, list[int]] = {}
        self.cuts: Counter[str] = Counter()  # by path: how many times the connection breaks halfway
        self.pauses: set[str] = set()  # paths whose second half never comes
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


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)


def error(*command: str | Path) -> str:
    """Run a command that must fail with status 1, and return its standard error."""
    done = run(*command)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def succeed(*command: str | Path) -> str:
    """Run a command that must succeed, and return its standard output."""
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def visible(directory: Path) -> set[str]:
    """Names of files and folders in a folder, with hidden ones such as a folder that is being unpacked."""
    return {path.name for path in directory.iterdir()}


def is_whole(directory: Path, server: Server, path: str) -> bool:
    """Return True when the folder holds exactly what the archive holds."""
    with zipfile.ZipFile(io.BytesIO(server.files[path])) as file:
        expected = {name: file.read(name) for name in file.namelist()}
    folder = next(iter(expected)).split("/")[0]
    found = [path for path in (directory / folder).iterdir() if path.name != ".archive"]
    return expected == {f"{folder}/{path.name}": path.read_bytes() for path in found}


def only(directory: Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> Path:
    """Make a folder of programs the PATH: those that every script needs, and the named ones."""
    directory.mkdir(exist_ok=True)
    for name in {*NEEDED, *programs}:
        program = sys.executable if name == "python3" else shutil.which(name)
        if program is None:
            pytest.skip(f"{name} is not installed")
        (directory / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(directory))
    return directory


def stub(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> None:
    """Put a script in the place of a program."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/bash\n{body}\n")
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
