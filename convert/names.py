"""Names that an index or a manifest gives to other files. They are checked here, and only here."""

from typing import Any

LONGEST = 255  # bytes, on nearly all file systems


def check_weights_file(name: Any) -> str:
    """The name, if it is that of a weights file right in its folder.

    Raises ValueError for anything but a plain `….safetensors`: other paths lead out of the folder,
    other names are those of files with a meaning of their own.
    """
    if not isinstance(name, str):
        raise ValueError(f"it names {name!r} as a weights file, which is no text")
    if any(mark in name for mark in "/\\:") or not name.isprintable():
        raise ValueError(f"it names a file outside its folder: {name!r}")
    if not name.endswith(".safetensors") or name.startswith("."):
        raise ValueError(f"it names {name!r} as a weights file; *.safetensors is wanted")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"it names a file with more than {LONGEST} bytes: {name!r}")
    return name
