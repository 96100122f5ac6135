"""Where a checkpoint or an adapter is: a folder, a hub id, or "nano", which comes with this repository."""

import re
import shutil
import time
from pathlib import Path

NANO = Path(__file__).parent.parent / "nano"
CODEC = "codec.safetensors"  # the mask codec's weights (model/decoding/masks.py)
PHOTOGRAPHS = "photographs.safetensors"  # tells them from drawings (model/decoding/photographs.py)
OFFICIAL_CODEC = "vae-oid.npz"  # the same, as big_vision publishes them
MAX_SILENCE = 10  # seconds to wait for an answer of the hub, unless HF_HUB_ETAG_TIMEOUT asks for more
PATIENCE = 3  # such waits for an answer from one address, whatever the library tries
COMPANION_FILES = ("tokenizer.model", CODEC, OFFICIAL_CODEC)  # travel with a checkpoint's config and weights

_STATUSES = {  # of the hub's answers: what a user can do
    401: "the hub does not accept the login: run `hf auth login`",
    403: "the hub forbids it: accept the licence on its hub page, and give your token the right to read it",
    404: "the hub does not have it: check the name",
    429: "the hub has had too many requests: wait some minutes, or log in, which raises the limit",
}

# What the library stumbles over when another server answers: no JSON, or JSON of another kind.
_NOT_THE_HUB = ValueError, AssertionError, TypeError, KeyError, AttributeError


def resolve(source: str | Path, weights: bool = True) -> Path:
    """The folder of a source, or its .npz file: the source itself, or the only one in a folder without a
    config. A hub id is downloaded first; weights: with its weight files."""
    source = str(source)
    if source == "nano":
        return NANO
    if source.endswith(".npz") and Path(source).is_file():
        return Path(source)
    if source and Path(source).is_dir():  # "" is no name, and to Path the working folder
        files = [file for file in Path(source).glob("*.npz") if file.name != OFFICIAL_CODEC]
        alone = len(files) == 1 and not any(Path(source).glob("*config.json"))
        return files[0] if alone else Path(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", source):
        where = "give a folder, an .npz file, a hub id such as google/paligemma2-3b-pt-448, or 'nano'"
        raise ValueError(f"no folder {source!r}; {where}")
    return _download(source, weights)


def folder_of(path: Path) -> Path:
    """The folder of what lies beside a checkpoint: tokenizer, codec. path: what `resolve` returned."""
    return path if path.is_dir() else path.parent


def weight_files(path: Path) -> list[Path]:
    """The *.safetensors files of a folder, a mask codec's too, or the .npz file. path: what `resolve`
    returned."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _download(source: str, weights: bool) -> Path:
    """The folder of a hub id "owner/name" or "owner/name@revision" in the hub's cache."""
    # Imported here, because neither a folder nor nano needs it.
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import get_session

    repo, _, revision = source.partition("@")
    wanted = ["config.json", "adapter_config.json", "detection.json", *COMPANION_FILES]
    wanted += ["*.safetensors", "model.safetensors.index.json"] if weights else []
    hooks = getattr(get_session(), "event_hooks", None)  # older versions have another kind of session
    if hooks and _limit_silence not in hooks["request"]:
        hooks["request"].append(_limit_silence)
        hooks["response"].append(_note_answer)
    _unanswered.clear()
    # OSError and the HTTP library's, whichever that is; RuntimeError is the storage's (Xet).
    failures = *hub.HfHubHTTPError.__bases__, RuntimeError, *_NOT_THE_HUB
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except hub.GatedRepoError as error:
        how = "accept its licence on its hub page and run `hf auth login`, or download it and give the folder"
        raise ValueError(f"{repo} is gated: {how}") from error
    except hub.RepositoryNotFoundError as error:
        raise ValueError(f"no folder {source!r}, and no such hub repository (private: log in)") from error
    except hub.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r}: its hub page lists all") from error
    except hub.HFValidationError as error:
        raise ValueError(f"no folder {source!r}, and that is no hub id: {error}") from error
    except failures as error:
        raise ValueError(_what_to_do(source, error)) from error
    if not folder.is_dir():
        raise ValueError(f"{repo} on the hub holds no checkpoint and no adapter: it has none of {wanted}")
    return folder


class SilenceTimeout(OSError):
    """An address has not answered, however often it was asked."""


_unanswered: dict[str, float] = {}  # {address: when it was first asked}, until it answers


def _limit_silence(request) -> None:
    """Let a request of the hub library end when the server is silent. By itself the library waits for ever
    in some requests, and repeats others seven times, a minute each."""
    from huggingface_hub import constants

    longest = max(MAX_SILENCE, constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    waited = time.monotonic() - _unanswered.setdefault(str(request.url), time.monotonic())
    if waited > PATIENCE * longest:
        raise SilenceTimeout(f"no answer for {waited:.0f} seconds")
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        phase: min(limits.get(phase) or longest, longest) for phase in ("connect", "read", "write", "pool")
    }


def _note_answer(response) -> None:
    _unanswered.pop(str(response.request.url), None)


def _what_to_do(source: str, error: BaseException) -> str:
    """A complaint about a failed download. The error that says most is often the cause of another one."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    statuses = [getattr(getattr(one, "response", None), "status_code", None) for one in chain]
    status = next((status for status in statuses if isinstance(status, int)), 0)
    kinds, text = [type(one).__name__ for one in chain], " ".join(str(error).split())
    if status in _STATUSES:
        why = _STATUSES[status]
    elif status >= 500:
        why = "the hub itself has a fault: try again later"
    elif status:
        why = "the hub refuses"
    elif any("Timeout" in kind for kind in kinds):
        why = "the hub does not answer: check the connection, or try again later"
    elif re.search("Consistency check|complete message|IncompleteRead", text):
        why = "the download broke off, or has another size than the hub said: run it again"
    elif "FileMetadataError" in kinds or isinstance(error, _NOT_THE_HUB):
        why = "something else than the hub answers: check HF_ENDPOINT, the proxy, the network's sign-in page"
    else:
        why = "the hub could not be reached"
    status = f"HTTP {status}, " if status else ""
    return f"no folder {source!r}, and {why}; or give a folder with the files ({status}{text:.120})"


def replacement(path: Path, elsewhere: str = "") -> str:
    """How to replace a damaged file or folder, to be put after a complaint about it: what lies in the hub's
    cache is not downloaded again by itself. elsewhere: what to say of any other place."""
    cached = re.match(r"(.*[/\\]models--[^/\\]+)[/\\]snapshots[/\\]", str(path))
    if not cached:
        return elsewhere
    # The cache links to a file's bytes, and would link to the same ones again. A folder has many such files.
    return f"; delete {path.resolve() if path.is_file() else cached[1]}, and it is downloaded again"


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer and mask codec, where a checkpoint has them, to the folder of another."""
    for name in COMPANION_FILES if source.resolve() != target.resolve() else ():
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def codec_file(source: str | Path) -> Path:
    """The mask codec that lies beside a checkpoint."""
    folder = folder_of(resolve(source, weights=False))
    for name in (CODEC, OFFICIAL_CODEC):
        if (folder / name).exists():
            return folder / name
    url = f"https://storage.googleapis.com/big_vision/paligemma/{OFFICIAL_CODEC}"
    raise ValueError(f"{source} has no mask codec: download {url} into its folder, or give it with --codec")
