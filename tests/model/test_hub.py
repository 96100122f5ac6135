"""Hub sources without a network: what is asked for, and how each failure reads."""

import importlib
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from model import PaliGemma
from model.io.hub import NANO, resolve
from model.io.tokenizer import Tokenizer
from model.io.weights import load_config

http = importlib.import_module(errors.Response.__module__.partition(".")[0])  # httpx, or what follows it
REPO = "google/paligemma2-3b-pt-224"
FILES = [  # of an official repository, and what others put beside them
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
]
OTHERS = [
    "README.md", ".gitattributes", "tokenizer.json", "preprocessor_config.json", "added_tokens.json",
    "pytorch_model.bin", "training_args.bin", "flax_model.msgpack", "modeling_paligemma.py",
]  # fmt: skip


def http_error(kind, status: int, message: str):
    """An error as huggingface_hub raises it after an answer of the server."""
    request = http.Request("GET", f"https://huggingface.co/api/models/{REPO}")
    return kind(message, response=http.Response(status, request=request))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """snapshot_download notes how it is called, then raises hub.error or returns hub.folder."""

    class Hub:
        def __init__(self):
            self.calls, self.error, self.folder = [], None, tmp_path / "snapshot"

        def snapshot_download(self, *args, **kwargs):
            self.calls.append((args, kwargs))
            if self.error is not None:
                raise self.error
            return str(self.folder)

    hub = Hub()
    hub.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def asked(hub) -> dict:
    """Repository, revision and patterns of the only call."""
    ((args, kwargs),) = hub.calls
    return dict(zip(("repo_id",), args)) | kwargs


def complaint(hub, error, source=REPO) -> str:
    """The message, one readable line, of the ValueError that an error of the hub must become."""
    hub.error = error
    with pytest.raises(ValueError) as raised:
        resolve(source)
    assert raised.value.__cause__ is error
    print(raised.value)
    return str(raised.value)


# What is asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [
        (REPO, REPO, None),
        (f"{REPO}@bfloat16", REPO, "bfloat16"),
        (f"{REPO}@refs/pr/3", REPO, "refs/pr/3"),
        (f"{REPO}@1.0-rc.1_b", REPO, "1.0-rc.1_b"),
        ("some-one/My_Model.v2@" + 40 * "a", "some-one/My_Model.v2", 40 * "a"),
    ],
)
def test_revision(source, repo, revision, hub):
    assert resolve(source) == hub.folder
    assert asked(hub)["repo_id"] == repo and asked(hub).get("revision") == revision


def test_only_what_is_needed(hub):
    """Config, weights with their index, tokenizer; nothing that can run and no weights in another format."""
    resolve(REPO)
    patterns = asked(hub)["allow_patterns"]
    chosen = huggingface_hub.utils.filter_repo_objects(FILES + OTHERS, allow_patterns=patterns)
    assert sorted(chosen) == sorted(FILES)


def test_folders_are_not_asked_for(hub, tmp_path, monkeypatch):
    """A folder wins over a repository of the same name; nano comes with the project."""
    (tmp_path / "google" / "paligemma2-3b-pt-224").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(REPO).resolve() == tmp_path / REPO
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("nano") == NANO
    assert hub.calls == []


def test_downloaded_folder_is_used(hub, tokenizer_file):
    """What was downloaded is read like any folder, and what it lacks is named with its place."""
    with pytest.raises(ValueError, match="config.json is missing") as error:
        PaliGemma.from_pretrained(REPO)
    assert str(hub.folder) in str(error.value)
    shutil.copy(tokenizer_file, hub.folder)
    assert Tokenizer(resolve(REPO)).bos == 2


# What can go wrong ------------------------------------------------------------------------------------------


def test_gated(hub):
    """Accept the licence, log in, or bring the files."""
    message = complaint(hub, http_error(errors.GatedRepoError, 403, "Cannot access gated repo"))
    assert REPO in message and "licence" in message and "hf auth login" in message and "folder" in message


def test_gated_revision(hub):
    message = complaint(hub, http_error(errors.GatedRepoError, 403, "Access denied"), f"{REPO}@bfloat16")
    assert REPO in message and "licence" in message


def test_not_found(hub):
    """A typing error, or a private repository, or a folder that is not there."""
    error = http_error(errors.RepositoryNotFoundError, 404, "Repository Not Found")
    message = complaint(hub, error, "google/paligemma2-3b-pt-225")
    assert "google/paligemma2-3b-pt-225" in message and "folder" in message and "log in" in message


def test_revision_not_found(hub):
    """The hub was reached: it is the revision that is wrong."""
    message = complaint(hub, http_error(errors.RevisionNotFoundError, 404, "Invalid rev"), f"{REPO}@bf16")
    assert "bf16" in message and "revision" in message.lower() and "reached" not in message


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("outgoing traffic has been disabled"),
        errors.OfflineModeIsEnabled("offline mode is enabled"),
        http_error(errors.HfHubHTTPError, 503, "Service Unavailable"),
        ConnectionResetError("Connection reset by peer"),
        http.ConnectError("Name or service not known"),
        http.ProxyError("Proxy Authentication Required"),
        http.ReadTimeout("The read operation timed out"),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unreachable(error, hub):
    """No network, a hub that is down, a broken line, a full disk: the source is named, and the reason."""
    message = complaint(hub, error)
    assert REPO in message and "folder" in message
    assert str(error.args[-1]) in message


def test_offline_for_real(monkeypatch, tmp_path):
    """huggingface_hub itself, offline by its own setting, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError) as error:
        resolve(REPO)
    assert REPO in str(error.value) and "folder" in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "runs",
        "./runs",
        "../runs",
        "./runs/nano",
        "runs/nano/final",
        "/runs/nano",
        "~/nano",
        "C:\\runs\\nano",
        "a b/c",
    ],
)
def test_folder_that_does_not_exist(source, hub, tmp_path, monkeypatch):
    """What cannot be a repository is a folder that is not there: no download is tried."""
    monkeypatch.chdir(tmp_path / "snapshot")
    with pytest.raises(ValueError) as error:
        resolve(source)
    message = str(error.value)
    assert "folder" in message and repr(source) in message and "nano" in message and REPO[:18] in message
    assert hub.calls == []


def test_relative_folder_that_looks_like_a_repository(hub, tmp_path, monkeypatch):
    """runs/nano could be either: the message speaks of both."""
    monkeypatch.chdir(tmp_path)
    error = http_error(errors.RepositoryNotFoundError, 404, "Repository Not Found")
    message = complaint(hub, error, "runs/nano")
    assert "'runs/nano'" in message and "folder" in message and "hub" in message


def test_paths_are_sources_too(hub, tmp_path, monkeypatch):
    """pathlib's paths are taken like strings, found or not."""
    monkeypatch.chdir(tmp_path)  # here, there is no runs/nano
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="folder"):
        resolve(tmp_path / "none")
    hub.error = http_error(errors.RepositoryNotFoundError, 404, "Repository Not Found")
    with pytest.raises(ValueError, match="folder"):
        resolve(Path("runs") / "nano")


def test_file_instead_of_folder(hub, tmp_path):
    """The weights' file instead of its folder."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="folder"):
        load_config(str(file))
    assert hub.calls == [] and os.path.exists(file)
