"""Which name each node's key may speak for: told by the launcher, which registers the keys."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedphd.common.files import replaced

NAMES = "node_names.json"


def write_names(path: Path, names: Mapping[int, str]) -> None:
    """Store names by node id, where a ``BoundNames`` may be reading."""
    with replaced(path) as beside:
        beside.write_text(json.dumps({str(node): name for node, name in names.items()}), "utf-8")


@dataclass
class BoundNames:
    """The names at ``path``, read again for a node that it did not hold before."""

    path: Path
    _names: dict[int, str] = field(default_factory=dict)

    def __call__(self, node_id: int) -> str | None:
        """The name that a node's key is registered for; None: for none.

        Raises OSError or ValueError where the file is there, but cannot be read.
        """
        if node_id not in self._names:
            try:
                found = json.loads(self.path.read_text("utf-8"))
            except FileNotFoundError:
                return None
            self._names = {int(node): str(name) for node, name in found.items()}
        return self._names.get(node_id)
