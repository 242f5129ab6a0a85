"""What was found in a large data set, kept in the user's cache folder, so that the next start need not look again."""

import hashlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssd_fast.files import write_atomically

logger = logging.getLogger(__name__)

_VERSION = 3  # of the content: raise it whenever what is kept, or how it is found, changes
_KEPT = 64  # files


def cache_folder() -> Path:
    """SSD_FAST_CACHE, or ssd_fast in the user's cache folder."""
    given = os.environ.get("SSD_FAST_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ssd_fast")


def entry_name(*parts: object) -> str:
    """The name of the entry for things that are told apart by these parts."""
    return hashlib.sha256(json.dumps([_VERSION, *parts], default=str).encode()).hexdigest()[:32]


class Entry(NamedTuple):
    """facts: can be written as JSON."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def load_entry(name: str) -> Entry | None:
    """An entry; None where there is none, or none that can be read."""
    try:
        with np.load(cache_folder() / f"{name}.npz", allow_pickle=False) as archive:
            arrays = dict(archive)
        return Entry(json.loads(str(arrays.pop("facts"))), arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def store_entry(name: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Keep facts and arrays for the next start. A folder that cannot be written to is not an error."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.npz", content.getbuffer())
        entries = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in entries[_KEPT:]:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("what was read is not kept for the next start: %s", error)
