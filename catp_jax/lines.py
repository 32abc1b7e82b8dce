"""A file of JSON lines that only grows, so that interrupted work resumes where it was.

A line is handed to the system as soon as its work is done: a kill costs no more than the line that
was being written, and that is cut off before the next one is added. One process writes at a time.
"""

import fcntl
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class JsonLines:
    """A file of rows that is `what`; `opening` is the text that each such file begins with.

    Reading changes nothing and waits for nobody: `read` gets each row with its line number, and
    raises ValueError for one that cannot be. `report` hears of a last line that was cut off, which
    goes when the first row is added.

    Raises ValueError if the file is another kind of file, or damaged elsewhere than at its end.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        opening: str,
        read: Callable[[int, Row], None],
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.path = path
        self._file: int | None = None
        self._close: Callable[[], object] = lambda: None
        self._end = 0  # of the last whole line
        self._size = 0  # of the file, as it was read
        if not path.exists():
            return
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give one for the lines to be written")
        data = path.read_bytes()
        if not (data.startswith(opening.encode()) or opening.encode().startswith(data)):
            raise ValueError(f"{path} is not {what}; give another --out")
        self._end = _parse(data, path, read)
        self._size = len(data)
        if cut := self._size - self._end:
            report(f"{path}: the last line was cut off and does not count ({cut} bytes)")

    def claim(self) -> None:
        """Makes the file this process's, to be written by no other until `release`.

        Raises ValueError if another one writes it, or has since it was read, or if it cannot be
        written at all.
        """
        if self._file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror or error}") from None
        is_ours = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        except OSError:
            pass  # a file system without locks
        status = os.fstat(file)
        if not is_ours or status.st_size != self._size or not status.st_nlink:
            os.close(file)
            raise ValueError(
                f"another process {'has written' if is_ours else 'is writing'} {self.path}; wait "
                "for it and start again, or give another --out"
            )
        os.ftruncate(file, self._end)
        self._file, self._size = file, self._end
        self._close = weakref.finalize(self, os.close, file)

    def append(self, row: Row) -> None:
        """Adds a row and hands it to the system at once. Raises ValueError as `claim` does."""
        self.claim()
        line = rest = _line(row)
        if self._file is not None:
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except BaseException:  # a full disk, say: half a line would stand in the way
                os.ftruncate(self._file, self._end)
                raise
        self._end = self._size = self._end + len(line)

    def release(self) -> None:
        """Lets others write the file; one without a row is removed."""
        if self._file is not None and not self._end:
            self.path.unlink(missing_ok=True)
        self._close()
        self._file = None


def _line(row: Row) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 cannot say
        return json.dumps(row).encode() + b"\n"


def _parse(data: bytes, path: Path, read: Callable[[int, Row], None]) -> int:
    """Has every row read; returns where the last whole one ends."""
    end = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines) or (number == len(lines) - 1 and not lines[-1])
        row = None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if is_last:
                break
        if number == len(lines):  # whole, but its newline is missing
            break
        try:
            if not isinstance(row, dict):
                raise ValueError("damaged")
            read(number, row)
        except ValueError as error:
            raise ValueError(
                f"line {number} of {path} is {error}; delete it and what follows, and the work "
                "resumes after what is before it"
            ) from None
        end += len(line) + 1
    return end
