"""The hub library itself against a stand-in for the hub on this machine, which fails in every way it can.

The name of a repository says what goes wrong with it. All of them are asked for in one process, whose waits
between two tries are cut out.
"""

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import python

from model.io.hub import NANO

SHA = "a" * 40
FILES = {"config.json": (NANO / "config.json").read_bytes(), "model.safetensors": bytes(1000)}
HTML = b"<html>Please sign in</html>"

CHILD = """
import json, sys, time
time.sleep = lambda seconds: None
from huggingface_hub import constants
from model.io import hub
from model.io.weights import load_config
constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = hub.MAX_SILENCE = 0.3

def words(function, source):
    try:
        return str(function(source))
    except ValueError as error:
        return f"ValueError: {error}"
    except BaseException as error:
        return f"a traceback: {error!r}"

said = {name: words(hub.resolve, f"x/{name}") for name in sys.argv[1:]}
said["damaged"] = [words(load_config, "x/damaged") for _ in range(2)]
blob = said["damaged"][0].partition("delete ")[2].partition(",")[0]
if blob:
    hub.Path(blob).unlink()
said["damaged"].append(words(load_config, "x/damaged"))
print(json.dumps(said))
"""

# {repository: what its complaint must say}
SENTENCES = {
    "401": "hf auth login",
    "403": "licence",
    "404": "check the name",
    "429": "wait",
    "500": "fault",
    "503": "fault",
    "gated": "gated",
    "files-401": "hf auth login",
    "files-403": "licence",
    "files-429": "wait",
    "files-500": "fault",
    "dropped": "could not be reached",
    "silent": "does not answer",
    "silent-list": "does not answer",
    "silent-file": "does not answer",
    "silent-head": "does not answer",
    "html": "HF_ENDPOINT",
    "html-files": "HF_ENDPOINT",
    "a-list": "HF_ENDPOINT",
    "no-sha": "HF_ENDPOINT",
    "cut": "run it again",
    "short": "run it again",
    "long": "run it again",
    "empty": "no checkpoint",
    "others": "no checkpoint",
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    done = threading.Event()  # lets those that are silent go
    asked = set()
    unanswered = 0  # requests of "silent-head"

    def log_message(self, *_):
        pass

    def reply(self, status=200, body=b"", length=None, **headers):
        self.send_response(status)
        headers["Content-Length"] = str(len(body) if length is None else length)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = length is not None

    def be_silent(self):
        self.done.wait(20)
        self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match = re.fullmatch(
            r"/(?:api/models/)?x/([^/]+)/(revision|tree|resolve)/[^/?]+/?([^?]*).*", self.path
        )
        if not match:
            return self.reply(404)
        repo, kind, file = match.groups()
        if kind == "resolve":
            self.file(repo, file)
        elif repo.isdigit():
            self.reply(int(repo))
        elif repo == "dropped":
            self.close_connection = True
        elif repo == "silent" or repo == "silent-list" and kind == "tree":
            self.be_silent()
        elif repo == "gated":
            self.reply(403, X_Error_Code="GatedRepo")
        elif repo == "html":
            self.reply(body=HTML)
        elif repo == "a-list":
            self.reply(body=b"[]")
        elif kind == "revision":
            self.reply(body=json.dumps(dict(id=repo) | ({} if repo == "no-sha" else dict(sha=SHA))).encode())
        else:
            files = dict(empty={}, others={"README.md": b"hello"}).get(repo, FILES)
            rows = [dict(type="file", path=name, size=len(files[name]), oid=name) for name in files]
            self.reply(body=json.dumps(rows).encode())

    def file(self, repo, file):
        content = FILES[file]
        headers = dict(ETag=f'"{repo}-{file}"', X_Repo_Commit=SHA)
        if self.command == "GET" and repo == "damaged" and file not in self.asked:
            self.asked.add(file)
            return self.reply(body=HTML.ljust(len(content)), **headers)
        if file == "config.json":
            return self.reply(body=content, **headers)
        if repo.startswith("files-"):
            return self.reply(int(repo[-3:]))
        if repo == "html-files":
            return self.reply(body=HTML)
        if self.command == "HEAD" and repo == "silent-head":
            Hub.unanswered += 1
            return self.be_silent()
        if self.command == "GET" and repo == "silent-file":
            return self.be_silent()
        if self.command == "GET" and repo == "cut":
            return self.reply(length=len(content), **headers)
        if self.command == "GET" and repo in ("short", "long"):
            content = content[:500] if repo == "short" else 2 * content
        self.reply(body=content, **headers)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What is said of each repository."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = str(tmp_path_factory.mktemp("hub"))
    environment = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=home, HF_HUB_OFFLINE="0")
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "")
    try:
        yield json.loads(python("-c", CHILD, "good", *SENTENCES, **environment).splitlines()[-1]) | dict(
            home=home
        )
    finally:
        Hub.done.set()
        server.shutdown()
        server.server_close()


def test_download(said):
    """The stand-in is good enough: what is not spoiled is downloaded to the cache."""
    for name, content in FILES.items():
        with open(os.path.join(said["good"], name), "rb") as file:
            assert file.read() == content
    assert said["good"].startswith(said["home"])


@pytest.mark.parametrize("repo", SENTENCES)
def test_failures(repo, said):
    """Each has a sentence of its own that says what to do, in one line."""
    message = said[repo]
    print(message)
    assert message.startswith("ValueError: ") and f"x/{repo}" in message and SENTENCES[repo] in message
    assert "\n" not in message and len(message) < 500
    others = set(SENTENCES.values()) - {SENTENCES[repo]}
    assert repo == "gated" or not [sentence for sentence in others if sentence in message]


def test_silence_has_an_end(said):
    """The library alone would ask for the head of a file seven times, and mostly wait for a minute."""
    assert "does not answer" in said["silent-head"] and 0 < Hub.unanswered <= 5


def test_a_damaged_file_in_the_cache(said):
    """It is named with its path; as long as it is there, it is what is read, and then it comes anew."""
    first, second, mended = said["damaged"]
    print(first)
    assert first == second and "not readable JSON" in first and "downloaded again" in first
    assert mended.startswith("PaliGemmaConfig(")
