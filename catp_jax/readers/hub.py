"""Models by name: `org/name` is looked up among what Hugging Face's tools have downloaded."""

import os
import re
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PUBLISHED = (
    *(
        f"meta-llama/Llama-3.2-{size}-Vision{kind}"
        for size in ("11B", "90B")
        for kind in ("", "-Instruct")
    ),
    *(f"Salesforce/blip2-{part}" for part in ("opt-2.7b", "opt-6.7b", "flan-t5-xl", "flan-t5-xxl")),
    *("Salesforce/blip2-itm-vit-g", "Salesforce/blip2-itm-vit-g-coco"),
    *("Salesforce/instructblip-vicuna-7b", "Salesforce/instructblip-vicuna-13b"),
    *("Salesforce/instructblip-flan-t5-xl", "Salesforce/instructblip-flan-t5-xxl"),
)
"""Checkpoints that are found by the last part of their names, too."""
FULL_NAMES = {name.partition("/")[2]: name for name in PUBLISHED}


def find_folder(model: str | Path) -> Path:
    """The folder of a model: a path, with `~`, or a name in the local Hugging Face cache, of one of
    the `PUBLISHED` also without its organisation.

    Nothing is downloaded. Raises ValueError if there is neither, with what to do.
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"a model is a folder or a name (org/name), got {model!r}")
    for path in (Path(model), Path(os.path.expanduser(model))):
        try:
            if path.exists():
                return path
        except (OSError, ValueError):  # longer than any path, or with a zero byte
            continue
    name = FULL_NAMES.get(str(model), str(model))
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name} is not a folder; a Hugging Face folder, one made by `catp-jax convert`, or a "
            "downloaded model's name (org/name) is wanted"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        page = f"https://huggingface.co/{name}"
        licence = (
            f"; accept its licence on {page} first, then `hf auth login`"
            if name.lower().startswith("meta-llama/")
            else ""
        )
        raise ValueError(
            f"{name} is neither a folder nor in the local Hugging Face cache; download it with "
            f"`hf download {name}`{licence}"
        ) from None


def name_of(folder: Path) -> str:
    """What a model in a folder is called: the folder's name, or that of a snapshot in the cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # models--org--name/snapshots/commit
        return folder.parent.parent.name.split("--", 2)[-1]
    return folder.name
