"""What goes to the Hub, what is refused, and what comes back."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import eyespot
from eyespot import cli
from eyespot.export import hub
from eyespot.export.card import read_record
from eyespot.export.hub import download, refusal, stage_model, without_paths
from eyespot.export.push import push
from shipped import write_run

# the Hub's client leaves sockets to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class FakeApi:
    """The Hub as an object: it remembers what it was told, and keeps what was uploaded."""

    def __init__(self, folder: Path, private: bool = True) -> None:
        self.folder, self.private = folder, private
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo: str, **how: Any) -> None:
        self.calls.append(("create_repo", {"repo": repo, **how}))

    def repo_info(self, repo: str, **how: Any) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, folder_path: Path, **how: Any) -> Any:
        shutil.copytree(folder_path, self.folder)
        self.calls.append(("upload_folder", how))
        return SimpleNamespace(commit_url="https://huggingface.co/me/shapes/commit/1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_sent_unless_it_is_told_to(run: Path, tmp_path: Path) -> None:
    api = FakeApi(tmp_path / "hub")
    lines = list(push(run, "me/shapes", api=api))  # type: ignore[arg-type]
    assert api.calls == []
    said = "\n".join(lines)
    assert "model.safetensors" in said and "## Limits" in said and "REFUSED" not in said
    assert lines[-1] == "nothing was sent; to send it to me/shapes, in place of all that is there, add --yes"


def test_what_was_shown_is_what_goes(run: Path, tmp_path: Path) -> None:
    api = FakeApi(tmp_path / "hub")
    lines = list(push(run, "me/shapes", yes=True, private=True, api=api))  # type: ignore[arg-type]
    assert api.calls == [
        (
            "create_repo",
            {"repo": "me/shapes", "repo_type": "model", "private": True, "exist_ok": True, "space_sdk": None},
        ),
        (
            "upload_folder",
            {"repo_id": "me/shapes", "repo_type": "model", "commit_message": "Push quickstart", "delete_patterns": "*"},
        ),
    ]
    assert lines[-1] == "pushed: https://huggingface.co/me/shapes/commit/1"
    shown = {match.group(1) for line in lines if (match := re.fullmatch(r" +[\d.,]+ [kM]B  (\S+)", line))}
    assert shown == files(tmp_path / "hub")
    assert {"README.md", "NOTICE", "report.json", "before_after.png", "training.json"} <= shown
    assert "Gemma Terms of Use" in (tmp_path / "hub" / "NOTICE").read_text()


def test_what_goes_is_the_same_model(run: Path, tmp_path: Path) -> None:
    stage_model(read_record(run), "me/shapes", tmp_path / "staged")
    picture = Image.new("RGB", (16, 16), "red")
    one, other = (eyespot.load(folder, "cpu") for folder in (run / "model", tmp_path / "staged"))
    assert one.ask(picture, "hm?", max_new_tokens=8) == other.ask(picture, "hm?", max_new_tokens=8)


def test_paths_of_this_machine_become_names(run: Path, tmp_path: Path) -> None:
    for name in ("training.json", "config.json"):
        values = json.loads((run / "model" / name).read_text())
        values["text_config" if name == "config.json" else "settings"]["_name_or_path"] = "/home/me/.cache/gguf/gemma-1"
        (run / "model" / name).write_text(json.dumps(values))
    items = stage_model(read_record(run), "me/shapes", tmp_path / "staged")
    assert [item for item in items if item.refused] == []
    assert json.loads((tmp_path / "staged" / "config.json").read_text())["text_config"]["_name_or_path"] == "gemma-1"
    assert "/home/me" in (run / "model" / "config.json").read_text()
    assert without_paths("/") == "/" and without_paths("a /b/c") == "a /b/c"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("optimizer.bin", pickle.dumps({}), "a pickle can run any code"),
        ("notes.log", b"hm", "it is no part of a model"),
        ("more.safetensors", pickle.dumps({}), "is no safetensors file"),
        ("key.json", b'{"token": "hf_' + b"a" * 34 + b'"}', "holds a token of the Hub: hf_aaaaa"),
        ("key.txt", b"-----BEGIN RSA PRIVATE KEY-----", "holds a private key"),
        ("url.json", b'["https://me:secret@example.com/x"]', "holds a password in an address"),
        ("redis.txt", b"redis://:secret@example.com", "holds a password in an address"),
        ("slack.txt", b"xoxb-12345-abcdefghij", "holds a token of Slack"),
        ("aws.txt", b"ASIA" + b"A" * 16, "holds a key of AWS"),
        ("signed.json", b'["https://x.org/a.png?v=1&X-Amz-Signature=' + b"0a" * 32 + b'"]', "holds a signed address"),
        ("where.json", b'["see /home/me/data/a.png"]', "names a folder of this machine: /home/me/data/a.png"),
    ],
)
def test_what_must_not_go_stops_the_rest(run: Path, tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (run / "model" / name).write_bytes(content)
    api = FakeApi(tmp_path / "hub")
    assert any("REFUSED" in line and reason in line for line in push(run, "me/x", api=api))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"1 files are refused, first '{name}': .*{reason}"):
        list(push(run, "me/x", yes=True, api=api))  # type: ignore[arg-type]
    assert api.calls == []


def test_a_secret_beside_the_tensors_is_found(run: Path) -> None:
    save_file({"x": torch.zeros(1)}, run / "model" / "model.safetensors", {"note": "hf_" + "a" * 34})
    assert "holds a token of the Hub" in refusal(run / "model" / "model.safetensors")


def test_what_was_public_is_not_taken_for_private(run: Path, tmp_path: Path) -> None:
    api = FakeApi(tmp_path / "hub", private=False)
    with pytest.raises(ValueError, match="'me/x' is public already, so nothing was sent"):
        list(push(run, "me/x", yes=True, private=True, api=api))  # type: ignore[arg-type]
    assert [name for name, _ in api.calls] == ["create_repo"]


def test_what_is_kept_can_be_changed_without_the_run(run: Path, tmp_path: Path) -> None:
    list(push(run, "me/x", out=tmp_path / "kept"))
    for file in (tmp_path / "kept").iterdir():
        same = (run / "model" / file.name).is_file() and file.samefile(run / "model" / file.name)
        assert same == (file.suffix == ".safetensors"), file.name


def test_a_pattern_is_no_path() -> None:
    pattern = r"\p{L}+\s\d"
    assert without_paths([pattern, r"C:\me\x.json", r"\\server\share\x.json"]) == [pattern, "x.json", "x.json"]


def test_a_file_beyond_the_limit_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_FILE_BYTES", 50_000)
    refused = [item for item in stage_model(read_record(run), "me/x", tmp_path / "staged") if item.refused]
    assert [item.path for item in refused] == ["model.safetensors"]
    assert "save it in smaller shards" in refused[0].refused


def test_the_verb_shows_and_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(run), "me/shapes", "--out", str(tmp_path / "out")]) == 0
    assert "add --yes" in capsys.readouterr().out and (tmp_path / "out" / "README.md").is_file()
    assert cli.main(["push", str(run), "shapes"]) == 2
    assert "'shapes' is no name of a repository; write owner/name" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the Hub that a download reads. Source: https://huggingface.co/docs/hub/api"""

    server: HubServer

    def log_message(self, *words: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append((path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/me/shapes(?:/revision/(\w+))?", path):
            commit = found.group(1) or "main"
            values = {"id": "me/shapes", "sha": self.server.main if commit == "main" else commit, "siblings": []}
            return self._send(json.dumps(values).encode(), body)
        if found := re.fullmatch(r"/api/models/me/shapes/tree/(\w+)", path):
            content = self.server.commits[self.server.main if found.group(1) == "main" else found.group(1)]
            rows = [{"type": "file", "path": n, "size": len(d), "oid": sha1(d).hexdigest()} for n, d in content.items()]
            return self._send(json.dumps(rows).encode(), body)
        if found := re.fullmatch(r"/me/shapes/resolve/(\w+)/(.+)", path):
            commit = self.server.main if found.group(1) == "main" else found.group(1)
            if (data := self.server.commits[commit].get(found.group(2))) is not None:
                return self._send(data, body, commit, found.group(2))
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if "/me/shapes/" in path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def _send(self, data: bytes, body: bool, commit: str = "", name: str = "") -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body and name == self.server.breaks:
            self.server.breaks = None
            self.wfile.write(data[start : len(data) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(data[start:])


class HubServer(ThreadingHTTPServer):
    """commits: by name, what each holds; main: the newest; breaks: a file whose first transfer ends in the middle."""

    def __init__(self, content: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.commits, self.main = {"1" * 40: content}, "1" * 40
        self.breaks: str | None = None
        self.seen: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that holds what ``push`` sent, and a pickle that somebody else put there."""
    list(push(run, "me/shapes", yes=True, api=FakeApi(tmp_path / "hub")))  # type: ignore[arg-type]
    content = {name: (tmp_path / "hub" / name).read_bytes() for name in files(tmp_path / "hub")}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer({**content, "evil.bin": pickle.dumps({})}) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def test_a_model_goes_to_the_hub_and_comes_back(server: HubServer, run: Path, tmp_path: Path) -> None:
    assert download("me/shapes", tmp_path / "back", endpoint=server.address) == "1" * 40
    back = {name for name in files(tmp_path / "back") if not name.startswith(".cache")}
    assert back == files(tmp_path / "hub") - {"before_after.png"}
    again = "\n".join(push(tmp_path / "back", "me/again"))
    assert "REFUSED" not in again and "**Verdict of its evaluation: sees" in again
    picture = Image.new("RGB", (16, 16), "red")
    one, other = (eyespot.load(folder, "cpu") for folder in (run / "model", tmp_path / "back"))
    assert one.ask(picture, "hm?", max_new_tokens=8) == other.ask(picture, "hm?", max_new_tokens=8)


def test_an_interrupted_download_goes_on_in_the_middle(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    server.breaks = "model.safetensors"
    download("me/shapes", tmp_path / "back", endpoint=server.address)
    whole = server.commits["1" * 40]["model.safetensors"]
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == whole
    (given,) = [given for path, given in server.seen if path.endswith("model.safetensors") and given]
    assert given == f"bytes={len(whole) // 2 // 1024 * 1024}-"


def test_all_files_are_of_one_commit(server: HubServer, tmp_path: Path) -> None:
    server.commits["2" * 40] = {**server.commits["1" * 40], "training.json": b'{"newer": true}'}
    server.main = "2" * 40
    assert download("me/shapes", tmp_path / "old", revision="1" * 40, endpoint=server.address) == "1" * 40
    assert "settings" in (tmp_path / "old" / "training.json").read_text()
    assert download("me/shapes", tmp_path / "new", endpoint=server.address) == "2" * 40
    assert "newer" in (tmp_path / "new" / "training.json").read_text()
    used = {path.split("/")[4] for path, _ in server.seen if "/resolve/" in path}
    assert used == {"1" * 40, "2" * 40}


def test_another_kind_of_model_is_refused_before_its_weights_are_read(server: HubServer, tmp_path: Path) -> None:
    server.commits["1" * 40]["config.json"] = b'{"model_type": "llava"}'
    with pytest.raises(ValueError, match="holds a model of type 'llava', not 'eyespot_vlm'"):
        download("me/shapes", tmp_path / "back", endpoint=server.address)
    assert not any("safetensors" in path for path, _ in server.seen)
    assert not (tmp_path / "back").exists()


def test_a_folder_that_holds_something_is_left_alone(
    server: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "model" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="exists already; give a new folder, or delete it first"):
        download("me/shapes", run / "model", endpoint=server.address)
    assert (run / "model" / "config.json").read_bytes() == before

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub, "snapshot_download", stop)
        download("me/shapes", tmp_path / "back", endpoint=server.address)
    with pytest.raises(ValueError, match="exists already"):
        download("me/others", tmp_path / "back", endpoint=server.address)
    assert download("me/shapes", tmp_path / "back", endpoint=server.address) == "1" * 40


def test_a_repository_that_is_not_there(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="404"):
        download("me/other", tmp_path / "back", endpoint=server.address)


def test_a_hub_that_is_not_there(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the Hub cannot be reached"):
        download("me/shapes", tmp_path / "back", endpoint="http://127.0.0.1:9")


def test_load_takes_a_name_on_the_hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    picture = Image.new("RGB", (16, 16), "blue")
    found = eyespot.load("me/shapes", "cpu").ask(picture, "what colour?", max_new_tokens=8)
    assert found == eyespot.load(tmp_path / "hub", "cpu").ask(picture, "what colour?", max_new_tokens=8) == "blue"
    fetched = {path.rpartition("/")[2] for path, _ in server.seen if "/resolve/" in path}
    assert "model.safetensors" in fetched and "evil.bin" not in fetched
