"""A directory in a bucket: s3fs over HTTP against an S3 server (moto), moxing against a stand-in of its interface."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.auto.fake_moxing import File, MoxFileRespException
from transform_ckpt.auto import remote_fsspec, remote_results
from transform_ckpt.auto.remote import Remote, check_remote_url
from transform_ckpt.auto.remote_backends import ENDPOINT_VARIABLES, open_backend
from transform_ckpt.auto.remote_fsspec import etag, part_nbytes
from transform_ckpt.auto.remote_moxing import Moxing
from transform_ckpt.errors import InputError, StorageError, UsageError
from transform_ckpt.launcher import in_modelarts

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'transform_ckpt[remote]'")
server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'transform_ckpt[test]'")

BUCKET = "bucket"
NAMES = ["a b/ü 世界.ckpt", "rank_1/x.ckpt", "rank_10/x.ckpt", "odd [*]?#%41&+=.ckpt", "empty"]
QUICK = (0.0, 0.0, 0.0)


class Moto:
    """A server of its own port; what it stores belongs to the process, so that another server finds it again."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        self.server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def forgive(self, requests: bytes) -> None:
        """How many requests pass before keys are checked."""
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.url}/moto-api/reset-auth", requests, plain, method="POST")  # noqa: S310
        urllib.request.urlopen(request).close()  # noqa: S310

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> Any:
        from moto.backends import get_backend

        return get_backend("s3")["123456789012"]["aws"]


@pytest.fixture(scope="module")
def moto_server() -> Iterator[Moto]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    found = Moto()
    yield found
    found.server.stop()


@pytest.fixture
def moto(moto_server: Moto) -> Moto:
    moto_server.store.reset()
    moto_server.store.create_bucket(BUCKET, "us-east-1")
    return moto_server


@pytest.fixture
def strict_moto(moto: Moto) -> Iterator[Moto]:
    moto.forgive(b"0")
    yield moto
    moto.forgive(b"inf")


def s3(url: str, name: str = "dir 1/ü", bucket: str = BUCKET, **options: Any) -> Remote:
    """A remote that does not wait between attempts."""
    options = {"endpoint_url": url, "key": "key", "secret": "secret", **options}
    return replace(Remote.open(f"obs://{bucket}/{name}", storage_options=options), delays=QUICK)


def mox(root: Path, name: str = "dir 1/ü", bucket: str = BUCKET) -> Remote:
    return Remote(Moxing(File(root)), f"obs://{bucket}/{name}", QUICK)


@dataclass
class Store:
    """A remote, and its server's side: what lies there, and how somebody else puts an object."""

    remote: Remote
    held: Any
    plant: Any


@pytest.fixture(params=["fsspec", "moxing"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "fsspec":
        moto = request.getfixturevalue("moto")
        prefix = "dir 1/ü/"
        return Store(
            s3(moto.url),
            lambda: {k.removeprefix(prefix): v.value for k, v in moto.store.buckets[BUCKET].keys.items()},
            lambda name, data: moto.store.put_object(BUCKET, prefix + name, data),
        )
    root = tmp_path / "buckets" / BUCKET / "dir 1" / "ü"
    root.mkdir(parents=True)

    def plant(name: str, data: bytes) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return Store(
        mox(tmp_path / "buckets"),
        lambda: {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()},
        plant,
    )


def content(name: str) -> bytes:
    """A few KB that tell the name; nothing for the name that says so."""
    return b"" if name.endswith("empty") else hashlib.sha256(name.encode()).digest() * 97


def write_tree(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(name))
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@dataclass
class Spy:
    """A backend that counts calls, and fails each of `faults` once before it does what it should."""

    inner: Any
    faults: list[Exception] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name in {"errors", "refusal"}:
            return found

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if self.faults:
                raise self.faults.pop(0)
            return found(*args)

        return call


# ------------------------------------------------------------------------------------------------- where are we


@pytest.mark.parametrize("name", ["MA_LOG_DIR", "MA_JOB_DIR", "MA_LOCAL_LOG_PATH", "BATCH_GROUP_NAME"])
def test_each_variable_of_modelarts_counts(name: str) -> None:
    assert in_modelarts({name: ""})
    assert not in_modelarts({"PATH": "x", name + "_": "y"})


@pytest.mark.parametrize("url", ["obs://bucket", "obs://bucket/", "s3://bucket/a b/ü", "obs://bucket/dir/"])
def test_urls_of_buckets_pass(url: str) -> None:
    check_remote_url(url)


@pytest.mark.parametrize("url", ["", None, 3, "/local/x", "http://x/y", "obs://", "obs:///x", "s3://b/../c", "obs:/b"])
def test_other_urls_are_named(url: Any) -> None:
    with pytest.raises(InputError, match=r"expected|is no name"):
        check_remote_url(url)


def test_moxing_goes_first_but_options_are_for_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moxing", SimpleNamespace(file="the module"))
    assert Remote.open("obs://bucket/dir/").backend == Moxing("the module")
    assert Remote.open("s3://bucket/dir").backend == Moxing("the module")
    assert isinstance(open_backend("s3://bucket", {}, {}), remote_fsspec.Fsspec)


def test_obs_without_moxing_needs_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moxing", None)
    with pytest.raises(InputError, match="set OBS_ENDPOINT"):
        open_backend("obs://bucket", None, {})
    assert open_backend("s3://bucket", None, {}).fs.endpoint_url is None
    for name in ENDPOINT_VARIABLES:
        assert open_backend("obs://bucket", None, {name: "http://one:1"}).fs.endpoint_url == "http://one:1"
    bare = open_backend("obs://bucket", None, {"OBS_ENDPOINT": "obs.example.com"})
    assert bare.fs.endpoint_url == "https://obs.example.com"
    # OBS is not AWS: no CRC trailers on uploads
    assert bare.fs.config_kwargs["request_checksum_calculation"] == "when_required"


def test_without_any_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moxing", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"pip install 'transform_ckpt\[remote\]'"):
        Remote.open("s3://bucket/dir")


# ------------------------------------------------------------------------------------------------------ objects


def test_objects_come_back_by_their_names(store: Store) -> None:
    for name in NAMES:
        assert not store.remote.exists(name)
        store.remote.write(name, content(name))
    assert store.held() == {name: content(name) for name in NAMES}
    assert store.remote.list() == sorted(NAMES)
    assert store.remote.list("rank_1") == ["x.ckpt"]  # and not that of rank_10
    assert store.remote.list("nothing") == []
    for name in NAMES:
        assert store.remote.exists(name)
        assert store.remote.read(name) == content(name)
    assert not store.remote.exists("rank_1")  # a directory


def test_writing_again_replaces(store: Store) -> None:
    store.remote.write("x", b"first, and longer")
    store.remote.write("x", b"second")
    assert store.remote.read("x") == b"second"


def test_copy_is_an_object_of_its_own(store: Store) -> None:
    store.remote.write("a/x", b"1")
    store.remote.copy("a/x", "b c/ü")
    store.remote.write("a/x", b"2")
    assert store.held() == {"a/x": b"2", "b c/ü": b"1"}


def test_delete_removes_what_is_named_and_nothing_else(store: Store) -> None:
    for name in [*NAMES, "rank_1/deep/y", "rank_1/z"]:
        store.remote.write(name, b"1")
    store.remote.delete("odd [*]?#%41&+=.ckpt")
    store.remote.delete("not there")
    store.remote.delete_tree("rank_1")
    assert sorted(store.held()) == ["a b/ü 世界.ckpt", "empty", "rank_10/x.ckpt"]


def test_directory_markers_are_no_objects(moto: Moto, tmp_path: Path) -> None:
    remote = s3(moto.url)
    moto.store.put_object(BUCKET, "dir 1/ü/", b"")
    moto.store.put_object(BUCKET, "dir 1/ü/a/", b"")
    remote.write("a/x", b"1")
    assert remote.list() == ["a/x"]
    remote.download("a", str(tmp_path / "a"))
    assert tree(tmp_path / "a") == {"x": b"1"}


@pytest.mark.parametrize("name", ["", "/x", "x/", "a//b", ".", "..", "a/../b", "a\0b"])
def test_names_stay_inside(store: Store, name: str) -> None:
    for act in (store.remote.join, store.remote.exists, store.remote.read, store.remote.delete_tree):
        with pytest.raises(InputError, match="is no name inside a directory"):
            act(name)
    with pytest.raises(InputError):
        store.remote.write(name, b"")
    assert store.held() == {}


# ------------------------------------------------------------------------------------------------------ transfer


def test_a_tree_comes_back(store: Store, tmp_path: Path) -> None:
    write_tree(tmp_path / "up", NAMES)
    store.remote.upload(str(tmp_path / "up"), "some/tree")
    assert store.held() == {f"some/tree/{name}": content(name) for name in NAMES}
    store.remote.download("some/tree", str(tmp_path / "new" / "down"))
    assert tree(tmp_path / "new") == {f"down/{name}": content(name) for name in NAMES}


def test_a_file_comes_back_and_replaces(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "ü up").write_bytes(data)
    store.remote.upload(str(tmp_path / "ü up"), "x/y")
    (tmp_path / "down").write_bytes(b"older, of another run")
    store.remote.download("x/y", str(tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() == data
    assert not list(tmp_path.glob("*.partial"))


def test_a_directory_with_content_is_not_replaced(store: Store, tmp_path: Path) -> None:
    store.remote.write("t/x", b"1")
    (tmp_path / "down").mkdir()
    store.remote.download("t", str(tmp_path / "down"))  # an empty one may
    with pytest.raises(UsageError, match="is there already"):
        store.remote.download("t", str(tmp_path / "down"))
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there already"):
        store.remote.download("t", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_what_is_not_there_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="dir 1/ü/nothing: there is no such object or directory"):
        store.remote.download("nothing", str(tmp_path / "down"))
    with pytest.raises(InputError, match=r"absent: not found while uploading"):
        store.remote.upload(str(tmp_path / "absent"), "x")
    assert not (tmp_path / "down").exists()


def test_nothing_is_written_outside(store: Store, tmp_path: Path) -> None:
    class Hostile:
        """Lists what a store without directories may hold."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store.remote.backend, name)

        def names(self, url: str) -> list[str]:
            return ["x", "../../evil", "a/../../evil", "/evil", "a//evil"]

    store.plant("t/x", b"1")
    with pytest.raises(InputError, match=r"'\.\./\.\./evil': is no name") as caught:
        replace(store.remote, backend=Hostile()).download("t", str(tmp_path / "in" / "down"))
    assert str(caught.value).count("evil") == 4  # all are named at once
    assert not (tmp_path / "in").exists()


def test_nothing_is_written_outside_of_a_real_bucket(moto: Moto, tmp_path: Path) -> None:
    moto.store.put_object(BUCKET, "dir 1/ü/t/../../evil", b"x")
    remote = s3(moto.url)
    assert remote.list("t") == ["../../evil"]
    with pytest.raises(InputError, match="evil"):
        remote.download("t", str(tmp_path / "in" / "down"))
    assert list(tmp_path.iterdir()) == []
    remote.delete_tree("t")  # but they can be removed
    assert remote.list() == []


def test_links_to_directories_are_refused(store: Store, tmp_path: Path) -> None:
    write_tree(tmp_path / "up", ["a/x"])
    (tmp_path / "up" / "file link").symlink_to("a/x")
    store.remote.upload(str(tmp_path / "up"), "t")
    assert store.held()["t/file link"] == content("a/x")
    (tmp_path / "up" / "b").symlink_to("a")
    with pytest.raises(InputError, match="up/b: is a link to a directory"):
        store.remote.upload(str(tmp_path / "up"), "t")


def test_only_what_differs_is_sent(moto: Moto, tmp_path: Path) -> None:
    spy = Spy(s3(moto.url).backend)
    remote = replace(s3(moto.url), backend=spy)
    write_tree(tmp_path / "up", NAMES)
    remote.upload(str(tmp_path / "up"), "t")
    assert spy.calls.count("put") == len(NAMES)
    changed = bytearray(content(NAMES[0]))
    changed[7] ^= 1  # same size
    (tmp_path / "up" / NAMES[0]).write_bytes(changed)
    spy.calls.clear()
    remote.upload(str(tmp_path / "up"), "t")
    assert spy.calls.count("put") == 1
    assert remote.read(f"t/{NAMES[0]}") == changed


def test_moxing_knows_no_digests_so_all_is_sent(tmp_path: Path) -> None:
    (tmp_path / BUCKET).mkdir()
    (tmp_path / "up").write_bytes(b"same size 1")
    remote = mox(tmp_path)
    remote.upload(str(tmp_path / "up"), "x")
    (tmp_path / "up").write_bytes(b"same size 2")
    remote.upload(str(tmp_path / "up"), "x")
    assert remote.read("x") == b"same size 2"


def test_large_files_go_in_parts(moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_fsspec, "PART_NBYTES", 5 << 20)  # the protocol's least
    data = os.urandom((12 << 20) + 5)
    (tmp_path / "up").write_bytes(data)
    remote = s3(moto.url)
    remote.upload(str(tmp_path / "up"), "x")
    stored = moto.store.buckets[BUCKET].keys["dir 1/ü/x"]
    assert stored.value == data
    assert stored.etag.strip('"') == etag(str(tmp_path / "up"))
    assert etag(str(tmp_path / "up")).endswith("-3")
    assert remote.backend.same(str(tmp_path / "up"), remote.join("x"))


@pytest.mark.parametrize(("nbytes", "parts"), [(1, 1), (32 << 20, 2), (20 << 30, 1280), (5 << 40, 10_000)])
def test_parts_are_small_and_not_too_many(nbytes: int, parts: int) -> None:
    size = part_nbytes(nbytes)
    assert -(-nbytes // size) <= parts
    assert size == 16 << 20 or parts == 10_000


def test_memory_is_bounded_by_parts(moto: Moto, tmp_path: Path) -> None:
    sent: dict[str, Any] = {}
    backend = s3(moto.url).backend
    fake = SimpleNamespace(put_file=lambda *args, **options: sent.update(options))
    (tmp_path / "up").write_bytes(b"1")
    replace(backend, fs=fake).put(str(tmp_path / "up"), "obs://b/x")
    assert sent == {"chunksize": 16 << 20, "max_concurrency": 4}


# -------------------------------------------------------------------------------------------------------- faults


def test_a_fault_is_tried_again(store: Store, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(b"data")
    spy = Spy(
        store.remote.backend, [OSError("cut"), OSError("cut"), RuntimeError("x") if _is_mox(store) else OSError()]
    )
    replace(store.remote, backend=spy).upload(str(tmp_path / "up"), "x")
    assert store.held() == {"x": b"data"}


def _is_mox(store: Store) -> bool:
    return isinstance(store.remote.backend, Moxing)


def test_a_lasting_fault_ends_with_object_and_reason(store: Store) -> None:
    spy = Spy(store.remote.backend, [OSError("line cut")] * 9)
    with pytest.raises(StorageError, match=r"obs://bucket/dir 1/ü/x: reading failed 4 times, .*OSError: line cut"):
        replace(store.remote, backend=spy).read("x")
    assert spy.calls == ["read"] * 4


def test_attempts_wait_longer_and_longer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("transform_ckpt.auto.remote.time.sleep", slept.append)
    spy = Spy(store.remote.backend, [OSError("cut")] * 4)
    with pytest.raises(StorageError):
        Remote(spy, "obs://bucket/dir").read("x")
    assert slept == [1.0, 4.0, 16.0]


def test_a_program_error_is_not_hidden(store: Store) -> None:
    spy = Spy(store.remote.backend, [TypeError("bug")])
    with pytest.raises(TypeError, match="bug"):
        replace(store.remote, backend=spy).read("x")


def test_a_full_local_disk_is_said_of_the_local_path(store: Store, tmp_path: Path) -> None:
    store.remote.write("x", b"1")
    full = OSError(28, "No space left on device", str(tmp_path / "down"))
    spy = Spy(store.remote.backend)
    spy.get = lambda url, path: (spy.calls.append("get"), (_ for _ in ()).throw(full))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"down: No space left on device while downloading: free some space"):
        replace(store.remote, backend=spy).download("x", str(tmp_path / "down"))
    assert spy.calls.count("get") == 1


def test_a_short_download_is_tried_again_then_refused(store: Store, tmp_path: Path) -> None:
    store.remote.write("x", b"12345678")
    (tmp_path / "down").write_bytes(b"older")
    spy = Spy(store.remote.backend)
    cuts = [5, 5, 5, 5, 5]

    def get(url: str, path: str) -> None:
        Path(path).write_bytes(b"12345678"[: cuts.pop() if cuts else 8])

    spy.get = get  # type: ignore[attr-defined]
    remote = replace(store.remote, backend=spy)
    with pytest.raises(StorageError, match="received 5 of 8 bytes"):
        remote.download("x", str(tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() == b"older"
    assert not list(tmp_path.glob("*.partial"))
    remote.download("x", str(tmp_path / "down"))  # one cut is left
    assert (tmp_path / "down").read_bytes() == b"12345678"


def test_a_short_upload_is_tried_again_then_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(b"12345678")
    spy = Spy(store.remote.backend)
    spy.put = lambda path, url: store.plant("x", b"1234")  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"the store holds 4 bytes, .*up has 8"):
        replace(store.remote, backend=spy).upload(str(tmp_path / "up"), "x")


def test_a_stopped_server_is_an_error_and_what_was_sent_stays(moto: Moto, tmp_path: Path) -> None:
    write_tree(tmp_path / "up", ["a", "b", "c"])
    spy = Spy(s3(moto.url).backend)
    remote = replace(s3(moto.url), backend=spy)
    inner, done = spy.inner.put, []

    def put(path: str, url: str) -> None:
        if done:
            moto.server.stop()
        done.append(url)
        inner(path, url)

    spy.put = put  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"ü/t/b: uploading .* failed 4 times, .*"):
        remote.upload(str(tmp_path / "up"), "t")
    with pytest.raises(StorageError, match=r"ü/t: .* failed 4 times"):
        remote.download("t", str(tmp_path / "down"))
    moto.start()
    again = s3(moto.url)
    assert again.list("t") == ["a"]
    again.upload(str(tmp_path / "up"), "t")
    assert again.list("t") == ["a", "b", "c"]
    assert not (tmp_path / "down").exists()


class Cutting(ThreadingHTTPServer):
    """Between client and moto: passes requests on, but cuts the next `cuts` bodies of `method` in the middle."""

    daemon_threads = True

    def __init__(self, port: int, method: str, cuts: int) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.target, self.method, self.cuts, self.seen = port, method, cuts, 0


class _Pass(BaseHTTPRequestHandler):
    server: Cutting
    protocol_version = "HTTP/1.1"  # else nobody answers the client's "Expect: 100-continue"

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        cut = self.command == self.server.method and "list-type" not in self.path and self.server.cuts > 0
        self.server.seen += cut
        self.server.cuts -= cut
        self.close_connection = True
        nbytes = int(self.headers.get("Content-Length", 0))
        if cut and nbytes:
            self.rfile.read(nbytes // 2)
            return
        body = self.rfile.read(nbytes)
        link = http.client.HTTPConnection("127.0.0.1", self.server.target)
        link.request(
            self.command, self.path, body, {name: value for name, value in self.headers.items() if name != "Expect"}
        )
        answer = link.getresponse()
        data = answer.read()
        link.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"connection", "transfer-encoding"}:
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def cutting(moto: Moto) -> Iterator[Any]:
    servers: list[Cutting] = []

    def make(method: str, cuts: int) -> tuple[Remote, Cutting]:
        found = Cutting(moto.port, method, cuts)
        servers.append(found)
        threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
        return s3(f"http://127.0.0.1:{found.server_port}"), found

    yield make
    for found in servers:
        found.shutdown()
        found.server_close()


@pytest.mark.parametrize(("cuts", "whole"), [(2, True), (99, False)])
def test_an_interrupted_download_leaves_all_or_nothing(cutting: Any, tmp_path: Path, cuts: int, whole: Any) -> None:
    remote, proxy = cutting("GET", cuts)
    remote.backend.fs.retries = 2  # s3fs's own attempts, which wait seconds
    data = os.urandom(1 << 20)
    remote.write("x", data)
    if whole:
        remote.download("x", str(tmp_path / "down"))
        assert (tmp_path / "down").read_bytes() == data
    else:
        with pytest.raises(StorageError, match="ü/x: downloading failed 4 times"):
            remote.download("x", str(tmp_path / "down"))
        assert list(tmp_path.iterdir()) == []
    assert proxy.seen >= 2


@pytest.mark.parametrize(("cuts", "whole"), [(2, True), (99, False)])
def test_an_interrupted_upload_leaves_the_new_object_or_the_old(
    cutting: Any, tmp_path: Path, cuts: int, whole: Any
) -> None:
    remote, proxy = cutting("PUT", 0)
    remote.backend.fs.retries = 2
    remote.write("x", b"old")
    (tmp_path / "up").write_bytes(os.urandom(1 << 20))
    proxy.cuts = cuts
    if whole:
        remote.upload(str(tmp_path / "up"), "x")
        assert remote.read("x") == (tmp_path / "up").read_bytes()
    else:
        with pytest.raises(StorageError, match=r"ü/x: uploading .*up failed 4 times"):
            remote.upload(str(tmp_path / "up"), "x")
        assert remote.read("x") == b"old"
    assert proxy.seen >= 2


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_wrong_key_is_said_at_once(strict_moto: Moto) -> None:
    remote = s3(strict_moto.url)
    spy = Spy(remote.backend)
    for act in (lambda r: r.read("x"), lambda r: r.list(), lambda r: r.write("x", b""), lambda r: r.exists("x")):
        spy.calls.clear()
        with pytest.raises(StorageError, match=r"dir 1/ü.*access is refused.*AWS_ACCESS_KEY_ID"):
            act(replace(remote, backend=spy))
        assert len(spy.calls) == 1


def test_no_key_at_all_is_said(moto: Moto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no credentials were found: set AWS_ACCESS_KEY_ID"):
        s3(moto.url, key=None, secret=None).write("x", b"")


def test_a_missing_bucket_is_said_at_once(moto: Moto, tmp_path: Path) -> None:
    spy = Spy(s3(moto.url).backend)
    remote = replace(s3(moto.url, bucket="other"), backend=spy)
    (tmp_path / "up").write_bytes(b"1")
    for act in (remote.list, lambda: remote.write("x", b""), lambda: remote.wait_for(["a/x"], 60)):
        spy.calls.clear()
        with pytest.raises(StorageError, match=r"obs://other/dir 1/ü.*the bucket does not exist"):
            act()
        assert len(spy.calls) == 1
    with pytest.raises(StorageError, match="the bucket does not exist"):
        remote.upload(str(tmp_path / "up"), "x")


def test_a_missing_object_is_said_at_once(moto: Moto) -> None:
    spy = Spy(s3(moto.url).backend)
    with pytest.raises(StorageError, match="ü/x: there is no such object"):
        replace(s3(moto.url), backend=spy).read("x")
    assert spy.calls == ["read"]


def test_refusals_of_moxing_are_said_at_once(tmp_path: Path) -> None:
    (tmp_path / BUCKET).mkdir()
    denied = MoxFileRespException(403, "AccessDenied", "Access Denied")
    spy = Spy(Moxing(File(tmp_path)), [denied] * 9)
    with pytest.raises(StorageError, match=r"ü/x: access is refused \(stat:403.*agency"):
        replace(mox(tmp_path), backend=spy).write("x", b"")
    assert spy.calls == ["write"]
    with pytest.raises(StorageError, match="the bucket does not exist"):
        mox(tmp_path, bucket="other").write("x", b"")
    busy = MoxFileRespException(503, "SlowDown", "Please reduce your request rate")
    replace(mox(tmp_path), backend=Spy(Moxing(File(tmp_path)), [busy] * 3)).write("x", b"1")
    assert mox(tmp_path).read("x") == b"1"


# ------------------------------------------------------------------------------------------------------- waiting


def test_waiting_ends_when_all_are_there(store: Store) -> None:
    store.plant("m/a", b"")
    later = ["m/c ü", "m/deep/b"]
    spy = Spy(store.remote.backend)
    remote = replace(store.remote, backend=spy)
    remote.wait_for(["m/a", "m/deep/b", "m/c ü"], 60, lambda: store.plant(later.pop(), b""), poll=0.01)
    assert spy.calls == ["names"] * 3  # one request a poll, however many names
    remote.wait_for([], 0)
    remote.wait_for(["m/a"], 0)


def test_waiting_ends_in_time_and_names_what_is_missing(store: Store) -> None:
    store.plant("m/a", b"")
    with pytest.raises(StorageError, match=r"2 of 3 objects are still missing after 0.2 s: m/b, m/c"):
        store.remote.wait_for(["m/a", "m/b", "m/c"], 0.2, poll=0.05)
    with pytest.raises(StorageError, match=r"1 of 1 .*: x: look at the logs"):
        store.remote.wait_for(["x"], 0)


def test_another_rank_that_failed_ends_the_waiting(store: Store) -> None:
    def check() -> None:
        raise InputError("rank 3 failed")

    with pytest.raises(InputError, match="rank 3 failed"):
        store.remote.wait_for(["m/a"], 60, check)


# ----------------------------------------------------------------------------------------- results of a run

RUN = "20260101_120000_ab12cd"


def write_strategies(root: Path, world: int, word: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        (root / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(f"strategy {rank} {word}".encode() * 50)
    return root


def publish_strategies(remote: Remote, root: Path, world: int, run_id: str = RUN) -> None:
    for rank in range(world):
        remote_results.publish_strategy(remote, str(root), rank, run_id=run_id, world=world)


def test_strategies_of_all_ranks_arrive(store: Store, tmp_path: Path) -> None:
    mine = write_strategies(tmp_path / "up", 4)
    publish_strategies(store.remote, mine, 4)
    remote_results.fetch_strategies(store.remote, str(tmp_path / "down"), range(4), 5, run_id=RUN, poll=0.05)
    assert tree(tmp_path / "down") == tree(mine)
    assert {k.split("/", 1)[1]: v for k, v in store.held().items() if k.startswith("strategy/")} == tree(mine)


def test_only_strategies_that_are_missing_or_of_another_run_are_downloaded(store: Store, tmp_path: Path) -> None:
    publish_strategies(store.remote, write_strategies(tmp_path / "up", 4), 4)
    local = write_strategies(tmp_path / "down", 3)
    (local / "ckpt_strategy_rank_1.ckpt").write_bytes(b"strategy 9 " * 50)  # of another run, same size
    spy = Spy(store.remote.backend)
    remote_results.fetch_strategies(replace(store.remote, backend=spy), str(local), range(4), 5, run_id=RUN)
    assert spy.calls.count("get") == 2
    assert tree(local) == tree(tmp_path / "up")


def test_strategies_of_an_earlier_run_do_not_pass(store: Store, tmp_path: Path) -> None:
    publish_strategies(store.remote, write_strategies(tmp_path / "up", 2), 2, "earlier")
    remote_results.publish_strategy(store.remote, str(tmp_path / "up"), 0, run_id=RUN)
    with pytest.raises(StorageError, match=rf"1 of 2 .*runs/{RUN}/complete/strategy/rank_1.json"):
        remote_results.fetch_strategies(store.remote, str(tmp_path / "down"), range(2), 0.1, run_id=RUN, poll=0.05)
    assert not (tmp_path / "down").exists()


def test_well_known_strategies_of_a_larger_world_go(store: Store, tmp_path: Path) -> None:
    mine = write_strategies(tmp_path / "up", 4)
    publish_strategies(store.remote, mine, 4, "earlier")
    store.plant("strategy/merged_ckpt_strategy.ckpt", b"merged")
    store.plant("strategy/notes.txt", b"the user's")
    publish_strategies(store.remote, mine, 2)
    assert store.remote.list("strategy") == ["ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt", "notes.txt"]
    assert len(store.remote.list("runs/earlier/strategy")) == 4


def test_a_strategy_that_was_not_written_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ckpt_strategy_rank_5\.ckpt: not found"):
        remote_results.publish_strategy(store.remote, str(tmp_path), 5, run_id=RUN)
    assert store.held() == {}


def test_a_rank_directory_arrives_whole_and_alone(store: Store, tmp_path: Path) -> None:
    for rank in (1, 10):
        up = write_tree(tmp_path / f"up/rank_{rank}", [f"ü {rank}.ckpt", "deep/more.json"])
        remote_results.publish_rank(store.remote, "llama 7b", str(up), rank, run_id=RUN)
    found = remote_results.fetch_rank(store.remote, "llama 7b", 1, str(tmp_path / "down"), 5, run_id=RUN)
    assert found == str(tmp_path / "down" / "rank_1")
    assert tree(tmp_path / "down") == {f"rank_1/{k}": v for k, v in tree(tmp_path / "up" / "rank_1").items()}
    known = {k: v for k, v in store.held().items() if k.startswith("transformed_checkpoint/")}
    assert known == {f"transformed_checkpoint/llama 7b/{k}": v for k, v in tree(tmp_path / "up").items()}
    assert sum(k.startswith("runs/") for k in store.held()) == 6  # four files and two marks


def test_a_rank_directory_that_is_there_is_not_downloaded(store: Store, tmp_path: Path) -> None:
    up = write_tree(tmp_path / "rank_0", ["a.ckpt"])
    remote_results.publish_rank(store.remote, "m", str(up), 0, run_id=RUN)
    spy = Spy(store.remote.backend)
    remote = replace(store.remote, backend=spy)
    assert remote_results.fetch_rank(remote, "m", 0, str(tmp_path), 5, run_id=RUN) == str(up)
    assert "get" not in spy.calls


def test_well_known_files_of_an_earlier_conversion_go(store: Store, tmp_path: Path) -> None:
    remote_results.publish_rank(
        store.remote, "m", str(write_tree(tmp_path / "one", ["old.ckpt", "x"])), 0, run_id="earlier"
    )
    remote_results.publish_rank(store.remote, "m", str(write_tree(tmp_path / "two", ["new.ckpt", "x"])), 0, run_id=RUN)
    assert store.remote.list("transformed_checkpoint/m/rank_0") == ["new.ckpt", "x"]
    assert store.remote.list("runs/earlier/transformed_checkpoint/m/rank_0") == ["old.ckpt", "x"]


def test_ranks_wait_until_a_directory_is_complete(store: Store, tmp_path: Path) -> None:
    up = write_tree(tmp_path / "rank_0", ["a.ckpt", "b.ckpt"])
    remote_results.publish_rank(store.remote, "m", str(up), 0, run_id=RUN)
    spy = Spy(store.remote.backend)
    puts = []

    def put(path: str, url: str) -> None:
        puts.append(url)
        if len(puts) > 1:
            raise OSError("line cut")
        store.remote.backend.put(path, url)

    spy.put = put  # type: ignore[attr-defined]
    write_tree(tmp_path / "rank_0", ["a.ckpt", "b.ckpt", "c.ckpt"])
    (up / "a.ckpt").write_bytes(b"again")
    (up / "b.ckpt").write_bytes(b"again")
    with pytest.raises(StorageError, match=r"rank_0/b\.ckpt: uploading .* line cut"):
        remote_results.publish_rank(replace(store.remote, backend=spy), "m", str(up), 0, run_id=RUN)
    with pytest.raises(StorageError, match="still missing"):
        remote_results.fetch_rank(store.remote, "m", 0, str(tmp_path / "down"), 0.1, run_id=RUN, poll=0.05)


@pytest.mark.parametrize("data", [b"12", b"21" * 50])
def test_an_object_that_was_cut_or_replaced_is_not_taken(store: Store, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rank_0").mkdir()
    (tmp_path / "rank_0" / "a.ckpt").write_bytes(b"12" * 50)
    remote_results.publish_rank(store.remote, "m", str(tmp_path / "rank_0"), 0, run_id=RUN)
    store.plant(f"runs/{RUN}/transformed_checkpoint/m/rank_0/a.ckpt", data)
    with pytest.raises(StorageError, match=rf"a\.ckpt: has {len(data)} bytes .* published 100 bytes"):
        remote_results.fetch_rank(store.remote, "m", 0, str(tmp_path / "down"), 5, run_id=RUN)
    assert tree(tmp_path / "down") == {}


def test_the_failure_of_another_rank_ends_fetching(store: Store, tmp_path: Path) -> None:
    def check() -> None:
        raise StorageError("rank 1 failed: disk full")

    with pytest.raises(StorageError, match="rank 1 failed"):
        remote_results.fetch_rank(store.remote, "m", 0, str(tmp_path), 60, check, run_id=RUN)
    with pytest.raises(StorageError, match="rank 1 failed"):
        remote_results.fetch_strategies(store.remote, str(tmp_path), range(2), 60, check, run_id=RUN)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"files": {"x": 3}}', b'{"files": 1}', b"\xff"])
def test_a_damaged_mark_is_named(store: Store, tmp_path: Path, data: bytes) -> None:
    store.plant(f"runs/{RUN}/complete/transformed_checkpoint/m/rank_0.json", data)
    with pytest.raises(StorageError, match=r"rank_0\.json: is not what a rank writes"):
        remote_results.fetch_rank(store.remote, "m", 0, str(tmp_path / "down"), 5, run_id=RUN)


def test_a_mark_cannot_lead_outside(store: Store, tmp_path: Path) -> None:
    mark = json.dumps({"files": {"../../evil": [1, "x"]}}).encode()
    store.plant(f"runs/{RUN}/complete/transformed_checkpoint/m/rank_0.json", mark)
    with pytest.raises(InputError, match="is no name inside a directory"):
        remote_results.fetch_rank(store.remote, "m", 0, str(tmp_path / "down"), 5, run_id=RUN)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "a b", ".x"])
def test_run_ids_are_plain(store: Store, tmp_path: Path, run_id: str) -> None:
    with pytest.raises(InputError, match="run id"):
        remote_results.fetch_rank(store.remote, "m", 0, str(tmp_path), 0, run_id=run_id)


def test_a_rank_directory_without_files_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no files"):
        remote_results.publish_rank(store.remote, "m", str(tmp_path / "empty"), 0, run_id=RUN)
