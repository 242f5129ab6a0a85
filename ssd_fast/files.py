"""Files that appear as a whole or not at all."""

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_PREFIX, _SUFFIX = ".ssd_fast-", ".unfinished"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace the content of a file, durably. On an error the old file stays and no other file is left.

    A device such as /dev/null is written to directly.
    Raises OSError that names the file, also where the system's own error would not (full disk).
    """
    temporary = None
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_bytes(content)
            return
        descriptor, temporary = tempfile.mkstemp(_SUFFIX, _PREFIX, path.parent)
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # see remove_leftovers
            os.fchmod(descriptor, 0o666 & ~_UMASK)  # mkstemp's own is for secrets
            file.write(content)
            file.flush()
            os.fsync(descriptor)
            os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"not written: {error.strerror}", str(path)) from None
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: after a crash, a file that was renamed could have its old name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Claim:
    """A lock file that one process holds until it ends, also by a kill. The file stays, and names the last holder.

    On a file system without locks it holds nothing.
    """

    def __init__(self, path: Path, what: str) -> None:
        """path: of the lock file, made if missing. what: is claimed; for errors.

        Raises ValueError that names the holder where another process holds the file.
        """
        self._path = path
        self._what = what
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise ValueError(f"{what}: in use by {holder or 'another process'}: expected to be used by one") from None
        except OSError:  # no locks here
            pass
        self._file.truncate(0)
        self._file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        self._file.flush()

    def check(self) -> None:
        """Raise OSError where the file has been removed or replaced, with the folder around it, say."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return
        raise OSError(errno.ESTALE, "removed or replaced while it was in use", str(self._what))

    def close(self) -> None:
        """Let go of the lock."""
        with contextlib.suppress(OSError):  # its disk may be gone
            self._file.close()


def unfinished(path: Path) -> Path:
    """A name for a file that will get the name of path once it is complete; remove_leftovers knows it."""
    return path.with_name(_PREFIX + path.name + _SUFFIX)


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files that a killed process left in a folder, but none that a process still writes."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if not path.is_file() or path.is_symlink():
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:  # locked: it is being written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def check_writable(path: Path, option: str, is_own: Callable[[Path], bool]) -> None:
    """Raise ValueError, naming the option, where write_atomically could not make a file, or would replace another's.

    is_own: whether an existing file is a result of the same kind, which may be replaced. Writes nothing.
    """
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: no folder {folder}: expected a file in a folder that exists")
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder: expected a file")
    try:
        if path.exists() and not path.is_file():  # a device
            return
        with tempfile.TemporaryFile(dir=folder):
            pass
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # a name may be too long
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {error.strerror}") from None
    if path.exists() and not is_own(path):
        raise ValueError(f"{option} {path}: exists, and is not such a file: expected the name of a new one")


def check_folder(folder: Path, option: str, results: Iterable[str], is_own: Callable[[Path], bool]) -> None:
    """Raise ValueError, naming the option, where results cannot go to a folder, or would replace files of others.

    folder: may be missing, with those above it; it is not made.
    results: names or patterns of files, relative to the folder. is_own: whether such files in the folder are earlier
        results, which may be replaced.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{option} {folder}: {place} is a file: expected a folder, or the place for a new one")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{option} {folder}: {place} cannot be written to: {error.strerror}") from None
    found = [path for pattern in results for path in sorted(folder.glob(pattern))]
    if found and not is_own(folder):
        raise ValueError(
            f"{option} {folder}: {found[0].relative_to(folder)} exists and would be replaced, but is not an earlier "
            "result: expected another folder"
        )


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()
