"""Downloads from a server on this machine: interrupted, resumed, wrong, cut off, hostile."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from gist.catalog import download
from gist.catalog.cards import load_card
from gist.catalog.download import fetch
from gist.catalog.places import known_sums, sums_known, verify
from gist.errors import DataError

BODY = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``, cuts off as often as told, and understands ranges if told to."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers["Range"])
        if server.status:
            return self.send_error(server.status.pop(0))
        body = server.files[self.path]
        start = 0
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        ranged = server.ranges and self.headers["Range"] and self.headers["If-Range"] == tag
        if ranged:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if server.cuts:
            self.wfile.write(body[start : start + server.cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.asked, running.cuts, running.status = {}, [], [], []
        running.ranges, running.kind = True, "application/octet-stream"
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def card(server, checksums, urls):
    urls = {path: f"{server.url}/{name}" for path, name in urls.items()}
    return dataclasses.replace(
        load_card("reddit"), folders=["ogb/mine"], checksums=checksums, urls=urls
    )


def single(server, digest=None):
    server.files["/a.bin"] = BODY
    return card(server, {"raw/a.bin": digest}, {"raw/a.bin": "a.bin"})


def packed(*names, body=BODY):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, body)
    return buffer.getvalue()


def archive(server, content):
    server.files["/mine.zip"] = content
    return card(server, {"raw/a.bin": None}, {"./": "mine.zip"})


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_arrives_whole_and_its_sum_is_written_down(server, tmp_path):
    mine = single(server)
    folder = fetch(mine, tmp_path)
    assert folder == tmp_path / "ogb" / "mine"
    assert (folder / "raw" / "a.bin").read_bytes() == BODY
    assert files(tmp_path) == ["ogb/mine/SHA256SUMS", "ogb/mine/raw/a.bin"]
    digest = hashlib.sha256(BODY).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  raw/a.bin\n"
    assert sums_known(mine, folder) == (
        f"checksums of 1 raw files: 1 in {folder / 'SHA256SUMS'}; its card has none, so only its "
        "sizes say that these are the official files"
    )
    verify(mine, folder)
    (folder / "raw" / "a.bin").write_bytes(BODY[1:])
    with pytest.raises(DataError, match=r"a\.bin is damaged or of another version.*SHA256SUMS too"):
        verify(mine, folder)


def test_sums_on_the_card_are_not_written_again(server, tmp_path):
    digest = hashlib.sha256(BODY).hexdigest()
    mine = single(server, digest)
    folder = fetch(mine, tmp_path)
    assert files(tmp_path) == ["ogb/mine/raw/a.bin"]
    assert known_sums(mine, folder) == {"raw/a.bin": digest}


def test_an_interrupted_transfer_goes_on_where_it_ended(server, tmp_path):
    server.cuts = [1000, 2000]
    folder = fetch(single(server), tmp_path)
    assert (folder / "raw" / "a.bin").read_bytes() == BODY
    assert server.asked == [None, "bytes=1000-", "bytes=3000-"]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges, server.cuts = False, [1000]
    folder = fetch(single(server), tmp_path)
    assert (folder / "raw" / "a.bin").read_bytes() == BODY


def test_a_file_that_changed_meanwhile_is_not_mixed(server, tmp_path):
    mine = single(server)
    server.cuts = [1000]
    served = server.files
    server.files = Changing(served)
    folder = fetch(mine, tmp_path)
    assert (folder / "raw" / "a.bin").read_bytes() == BODY[::-1]


class Changing(dict):
    """Another content from the second request on."""

    def __getitem__(self, key):
        body = super().__getitem__(key)
        self[key] = BODY[::-1]
        return body


def test_a_server_that_recovers_is_asked_again(server, tmp_path):
    server.status = [503, 429]
    fetch(single(server), tmp_path)
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "tries", "message"),
    [([404], 1, "HTTP Error 404"), ([500] * 9, 5, "HTTP Error 500")],
)
def test_what_does_not_come_is_told_and_nothing_stays(server, tmp_path, status, tries, message):
    server.status = status
    with pytest.raises(DataError, match=message) as raised:
        fetch(single(server), tmp_path)
    assert f"put it at {tmp_path}/ogb/mine/raw/a.bin" in str(raised.value)
    assert f"cannot download {server.url}/a.bin" in str(raised.value)
    assert len(server.asked) == tries
    assert not any(tmp_path.iterdir())


def test_a_transfer_that_never_ends_leaves_nothing(server, tmp_path):
    server.cuts = [10] * 5
    with pytest.raises(DataError, match="the connection ended after 50 of 10,240 bytes"):
        fetch(single(server), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(DataError, match=r"ogb/mine/raw/a\.bin is damaged or of another version"):
        fetch(single(server, "0" * 64), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_web_page_in_place_of_a_file_is_told(server, tmp_path):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DataError, match=r"gives a web page, not a file.*open it in a browser"):
        fetch(single(server), tmp_path)
    assert len(server.asked) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["mine/raw/a.bin", "mine/RELEASE.txt"], ["raw/a.bin", "READ"]])
def test_an_archive_is_unpacked_with_or_without_a_folder_around_it(server, tmp_path, names):
    folder = fetch(archive(server, packed(*names)), tmp_path)
    assert (folder / "raw" / "a.bin").read_bytes() == BODY
    assert files(folder) == ["SHA256SUMS", "raw/a.bin"], "nothing that the card does not name"
    assert [path.name for path in tmp_path.iterdir()] == ["ogb"]


@pytest.mark.parametrize("name", ["../outside", "mine/../../outside", "/outside", "."])
def test_files_outside_the_folder_are_refused(server, tmp_path, name):
    place = tmp_path / "data"
    with pytest.raises(DataError, match=r"mine\.zip is not to be trusted.*outside"):
        fetch(archive(server, packed("mine/raw/a.bin", name)), place)
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b"PK", lambda b: flipped(b)])
def test_a_damaged_archive_leaves_nothing(server, tmp_path, damage):
    content = damage(packed("raw/a.bin", body=BODY))
    with pytest.raises(DataError, match=r"mine\.zip is damaged or cut off"):
        fetch(archive(server, content), tmp_path)
    assert files(tmp_path) == []


def flipped(content):
    middle = len(content) // 3
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("names", [["raw", "raw/a.bin"], ["raw/a.bin", "raw/a.bin/b", "raw"]])
def test_a_file_and_a_folder_of_one_name_do_no_harm(server, tmp_path, names):
    folder = fetch(archive(server, packed(*names)), tmp_path)
    assert files(folder) == ["SHA256SUMS", "raw/a.bin"]


def test_a_folder_in_the_place_of_a_file_is_refused(server, tmp_path):
    with pytest.raises(DataError, match=r"downloaded for reddit lacks a\.bin"):
        fetch(archive(server, packed("raw/a.bin/b")), tmp_path)
    assert files(tmp_path) == []


def test_an_archive_that_lacks_files_is_refused(server, tmp_path):
    with pytest.raises(DataError, match=r"downloaded for reddit lacks a\.bin.*put the file at"):
        fetch(archive(server, packed("mine/other", "mine/raw/b.bin")), tmp_path)
    assert files(tmp_path) == []


def test_an_archive_put_there_by_hand_is_taken(server, tmp_path):
    mine = archive(server, packed("mine/raw/a.bin", "mine/x"))
    server.status = [404]
    with pytest.raises(DataError, match=rf"put it at {tmp_path}/ogb/mine\.zip"):
        fetch(mine, tmp_path)
    by_hand = tmp_path / "ogb" / "mine.zip"
    by_hand.parent.mkdir()
    by_hand.write_bytes(server.files.pop("/mine.zip"))
    folder = fetch(mine, tmp_path)
    assert (folder / "raw" / "a.bin").read_bytes() == BODY
    assert by_hand.is_file()
    assert len(server.asked) == 1


@pytest.mark.parametrize("file", ["ogb/mine.zip", "ogb/mine/mine.zip"])
def test_an_archive_in_another_data_folder_is_unpacked_into_the_cache(
    server, tmp_path, monkeypatch, file
):
    data, cache = tmp_path / "data", tmp_path / "cache"
    monkeypatch.setenv("GIST_DATA", str(data))
    monkeypatch.setenv("GIST_CACHE", str(cache))
    mine = archive(server, packed("mine/raw/a.bin"))
    content = server.files.pop("/mine.zip")
    told = rf"put it at {cache}/ogb/mine\.zip, or what it holds in {cache}/ogb/mine;.*GIST_DATA"
    with pytest.raises(DataError, match=told):
        fetch(mine, None)
    (data / file).parent.mkdir(parents=True)
    (data / file).write_bytes(content)
    assert fetch(mine, None) == cache / "ogb" / "mine"
    assert files(data) == [file]
    assert files(cache) == ["ogb/mine/SHA256SUMS", "ogb/mine/raw/a.bin"]


def test_an_interrupted_command_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(single(server), tmp_path)
    assert not any(tmp_path.iterdir())
