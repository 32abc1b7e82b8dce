"""Files of a folder that may be there or not. What is there and cannot be read is not absent: in a
download that was cut off every file may be a link, and some of them lead nowhere.
"""

import os
from pathlib import Path


def is_there(path: Path) -> bool:
    """Whether there is such a file. Raises ValueError for a name that is no file."""
    if not os.path.lexists(path):
        return False
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file but {what(path)}; download or copy it again")
    return True


def what(path: Path) -> str:
    """What stands at a path where a file is wanted."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to nothing ({os.readlink(path)})"
    if os.path.isdir(path):
        return "a folder"
    return "a pipe, socket or device" if os.path.exists(path) else "nothing"
