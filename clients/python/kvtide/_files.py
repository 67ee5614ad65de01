"""Files and folders that a command is given: what is wrong with them is said before the work."""

from __future__ import annotations

import os
from typing import Optional


def check_writable(flag: str, path: Optional[str]) -> None:
    """ValueError if `path`, given by `flag`, cannot be made or written over. None passes."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ValueError(f"{flag}: {path} is a folder; name a file")
    if not os.path.isdir(folder):
        raise ValueError(f"{flag}: there is no folder {folder} for {os.path.basename(path)}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"{flag}: this user cannot write {path}")


def check_model(flag: str, model: str) -> None:
    """ValueError if a model that is named by a path is not there; other names are the hub's."""
    if (os.path.isabs(model) or model.startswith((".", "~"))) and not os.path.exists(os.path.expanduser(model)):
        raise ValueError(f"{flag}: there is no folder {model}")
