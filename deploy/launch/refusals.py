"""Who a SuperLink turned away, of which only its log tells."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

# An intruder that tries again and again gets a line so often.
SAY_S: Final = 30.0
# Strangers' connections each add a line; a log as long as this is cut, or the disk is full one day.
MOST_BYTES: Final = 32 * 1024 * 1024
# What the log says, and what it means. Flower's lines do not say from where; nor does gRPC's.
MEANINGS: Final = (
    (r"No SuperNode found with the given public key", "a node whose key is not registered here"),
    (r"SuperNode registration is disabled", "a node without a registered key"),
    (r"Handshake failed.*(WRONG_VERSION_NUMBER|HTTP_REQUEST)", "somebody who spoke plain text"),
    (r"Handshake failed.*UNKNOWN_CA", "somebody who does not trust this server's authority"),
    (r"Handshake failed.*CERTIFICATE_EXPIRED", "somebody who finds this certificate expired"),
)


@dataclass(eq=False)
class Refusals:
    """Reads a SuperLink's log as it grows, and says what was refused, seldom.

    A log that has become too long is emptied; its first line then tells how often what was refused.
    The SuperLink has to write it by appending.

    Args:
        say: told "refused ...", with how often.
        clock: monotonic seconds; for tests.
    """

    log: Path
    say: Callable[[str], None]
    say_s: float = SAY_S
    most_bytes: int = MOST_BYTES
    clock: Callable[[], float] = time.monotonic
    _offset: int = 0
    _size: int = 0
    _counts: Counter[str] = field(default_factory=Counter)
    _total: Counter[str] = field(default_factory=Counter)
    _next_s: dict[str, float] = field(default_factory=dict)

    def follow(self) -> None:
        """Look once for new lines."""
        for line in self._new_lines():
            found = [meaning for text, meaning in MEANINGS if re.search(text, line)]
            self._counts.update(found)
            self._total.update(found)
        too_long, now_s = self._size > self.most_bytes, self.clock()
        for meaning, count in list(self._counts.items()):
            # The lines that it tells of are about to go.
            if too_long or now_s >= self._next_s.get(meaning, 0.0):
                self._next_s[meaning] = now_s + self.say_s
                del self._counts[meaning]
                times = f" ({count} times)" if count > 1 else ""
                self.say(f"refused {meaning}{times}; see {self.log}")
        if too_long:
            self._cut()

    def _cut(self) -> None:
        refused = "; ".join(f"{what} ({count} times)" for what, count in self._total.most_common())
        at = time.strftime("%Y-%m-%d %H:%M:%S %z")
        line = f"{at} fedphd cut this log at {self._size} bytes; refused so far: {refused or '-'}"
        # Where the disk is full, the next one may have room.
        with suppress(OSError), self.log.open("ab") as file:
            file.truncate(0)
            self._offset = self._size = 0
            self.say(f"{self.log} was cut, since it was too long")
            file.write(f"{line}\n".encode())

    def forget(self) -> None:
        """Never mind what has happened so far."""
        self._new_lines()

    def _new_lines(self) -> list[str]:
        try:
            with self.log.open("rb") as file:
                # Somebody else may have cut it.
                self._size = file.seek(0, os.SEEK_END)
                if self._size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                # A line that is still being written has its turn next time.
                lines = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            # Somebody tidied up.
            self._size = 0
            return []
        self._offset += len(lines)
        return lines.decode("utf-8", "replace").splitlines()
