"""download_model.sh against a server on this machine."""

from pathlib import Path

import pytest
from downloads import MODEL, RECORD, WEIGHTS, Server, error, md5, only, run, stub, succeed, visible, zenodo_record


def test_zenodo_says_what_is_right_and_a_second_call_asks_for_nothing(here: Path, server: Server) -> None:
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


def test_wget_does_as_well(here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    only(here / "bin", monkeypatch, "wget", "python3")
    server.cuts[WEIGHTS] = 1
    succeed(MODEL, "some where")
    assert (here / "some where" / "resnet34-ssd1200.pytorch").read_bytes() == server.files[WEIGHTS]


def test_a_wrong_file_is_refused_and_removed(here: Path, server: Server) -> None:
    server.files[WEIGHTS] = b"wrong" + server.files[WEIGHTS][5:]
    assert "expected the MD5" in error(MODEL)
    assert not visible(here / "pretrained")


@pytest.mark.parametrize("record", [b"", b"<html>", b'{"files": []}', b"{}", zenodo_record(b"", name="else"), None])
def test_a_record_that_does_not_say_it_is_an_error(here: Path, server: Server, record: bytes | None) -> None:
    if record is None:
        del server.files[RECORD]
    else:
        server.files[RECORD] = record
    message = error(MODEL)
    assert f"{server.url}/{RECORD}: " in message
    assert "Traceback" not in message
    assert WEIGHTS not in server.starts


def test_a_manifest_takes_the_place_of_the_record(here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["mine/resnet34-ssd1200.pytorch"] = b"mine"
    (here / "manifest").write_text(server.manifest("mine/resnet34-ssd1200.pytorch"))
    monkeypatch.setenv("SSD_FAST_MODEL_MANIFEST", "manifest")
    for _ in range(2):
        succeed(MODEL)
    assert list(server.starts) == ["mine/resnet34-ssd1200.pytorch"]
    assert (here / "pretrained" / "resnet34-ssd1200.pytorch").read_bytes() == b"mine"


def test_too_little_disk_is_said(here: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(here / "bin", monkeypatch, "df", "echo Avail; echo 299999")
    assert "pretrained: expected 1 MB of free disk space" in error(MODEL)
    assert WEIGHTS not in server.starts
