"""Who a SuperLink turned away, of which only its log tells."""

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

# An intruder that tries again and again gets a line so often.
SAY_S: Final = 30.0
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

    Args:
        say: told "refused ...", with how often.
        clock: monotonic seconds; for tests.
    """

    log: Path
    say: Callable[[str], None]
    say_s: float = SAY_S
    clock: Callable[[], float] = time.monotonic
    _offset: int = 0
    _counts: Counter[str] = field(default_factory=Counter)
    _next_s: dict[str, float] = field(default_factory=dict)

    def follow(self) -> None:
        """Look once for new lines."""
        for line in self._new_lines():
            self._counts.update(meaning for text, meaning in MEANINGS if re.search(text, line))
        now_s = self.clock()
        for meaning, count in list(self._counts.items()):
            if now_s >= self._next_s.get(meaning, 0.0):
                self._next_s[meaning] = now_s + self.say_s
                del self._counts[meaning]
                times = f" ({count} times)" if count > 1 else ""
                self.say(f"refused {meaning}{times}; see {self.log}")

    def forget(self) -> None:
        """Never mind what has happened so far."""
        self._new_lines()

    def _new_lines(self) -> list[str]:
        try:
            with self.log.open("rb") as file:
                file.seek(self._offset)
                # A line that is still being written has its turn next time.
                lines = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            # Somebody tidied up.
            return []
        self._offset += len(lines)
        return lines.decode("utf-8", "replace").splitlines()
