"""Where a checkpoint or an adapter is: a folder, a hub id, or "nano", the one in this repository."""

import re
from pathlib import Path

NANO = Path(__file__).parent.parent / "nano"
CODEC = "codec.safetensors"  # weights of model/decoding/masks.py
OFFICIAL_CODEC = "vae-oid.npz"  # the same, as big_vision has them
BESIDE = ("tokenizer.model", CODEC, OFFICIAL_CODEC)  # what a checkpoint has beside config and weights


def resolve(source: str | Path, weights: bool = True) -> Path:
    """The folder of a source; a hub id's files are downloaded, with the weights or without.

    Raises ValueError that says what to do.
    """
    source = str(source)
    if source == "nano":
        return NANO
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", source):
        raise ValueError(
            f"no folder {source!r}; give a folder, a hub id such as google/paligemma2-3b-pt-448, or 'nano'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = source.partition("@")
    wanted = ["config.json", "adapter_config.json", "detection.json", *BESIDE]
    wanted += ["*.safetensors", "model.safetensors.index.json"] if weights else []
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated: accept its licence on its hub page, then run `hf auth login`; "
            "or download it yourself and give the folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{source!r} is neither a folder here nor a repository on the hub (private: log in)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repo} has no revision {revision!r}: its hub page lists branches and tags"
        ) from error
    except HfHubHTTPError.__bases__ as error:  # the HTTP library's errors, whichever it is, and OSError
        raise ValueError(
            f"{source!r} is no folder here, and the hub could not be reached: {error}"
        ) from error


def codec_file(source: str | Path) -> Path:
    """The mask codec beside a checkpoint. Raises ValueError that says where to get one."""
    folder = resolve(source, weights=False)
    for name in (CODEC, OFFICIAL_CODEC):
        if (folder / name).exists():
            return folder / name
    url = f"https://storage.googleapis.com/big_vision/paligemma/{OFFICIAL_CODEC}"
    raise ValueError(f"{source} has no mask codec: fetch {url}, and put it there, or give it with --codec")
