"""Where a checkpoint or an adapter is: a folder, a hub id, or "nano", which comes with this repository."""

import re
import shutil
from pathlib import Path

NANO = Path(__file__).parent.parent / "nano"
CODEC = "codec.safetensors"  # the mask codec's weights (model/decoding/masks.py)
OFFICIAL_CODEC = "vae-oid.npz"  # the same, as big_vision publishes them
COMPANION_FILES = ("tokenizer.model", CODEC, OFFICIAL_CODEC)  # travel with a checkpoint's config and weights


def resolve(source: str | Path, weights: bool = True) -> Path:
    """The folder of a source. A hub id is downloaded first, with or without the weights."""
    source = str(source)
    if source == "nano":
        return NANO
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", source):
        where = "give a folder, a hub id such as google/paligemma2-3b-pt-448, or 'nano'"
        raise ValueError(f"no folder {source!r}; {where}")
    # Imported here, because neither a folder nor nano needs it.
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition("@")
    wanted = ["config.json", "adapter_config.json", "detection.json", *COMPANION_FILES]
    wanted += ["*.safetensors", "model.safetensors.index.json"] if weights else []
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except hub.GatedRepoError as error:
        how = "accept its licence on its hub page and run `hf auth login`, or download it and give the folder"
        raise ValueError(f"{repo} is gated: {how}") from error
    except hub.RepositoryNotFoundError as error:
        raise ValueError(f"no folder {source!r}, and no such hub repository (private: log in)") from error
    except hub.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r}: its hub page lists all") from error
    except hub.HfHubHTTPError.__bases__ as error:  # OSError, and the HTTP library's, whichever that is
        raise ValueError(f"no folder {source!r}, and the hub could not be reached: {error}") from error


def replacement(path: Path, elsewhere: str = "") -> str:
    """How to get a damaged file or folder anew, to be put after a complaint about it. What lies in the hub's
    cache would be taken from there for ever. elsewhere: what to say of any other place."""
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
    folder = resolve(source, weights=False)
    for name in (CODEC, OFFICIAL_CODEC):
        if (folder / name).exists():
            return folder / name
    url = f"https://storage.googleapis.com/big_vision/paligemma/{OFFICIAL_CODEC}"
    raise ValueError(f"{source} has no mask codec: download {url} into its folder, or give it with --codec")
