"""What every message has in common."""

from typing import Annotated, ClassVar, Final

from pydantic import AfterValidator, BaseModel, ConfigDict

# Beyond any honest figure, and small enough that an edge's sums of them pass at the cloud and
# the cloud's sums do not overflow.
MOST_OF_CLIENT: Final = 10**12
MOST: Final = 10**30
# Of a text that a peer writes and that people are shown: an error, a reason, a name.
MOST_CHARACTERS: Final = 500


def shown(text: str) -> str:
    """A peer's ``text`` for logs and reports: cut off, and without control characters.

    An error reply may hold a gigabyte, or what a terminal takes for commands.
    """
    plain = "".join(c if c.isprintable() else " " for c in text[:MOST_CHARACTERS])
    return plain if len(text) <= MOST_CHARACTERS else f"{plain}..."


# A text of a peer that people are shown.
Shown = Annotated[str, AfterValidator(shown)]


class Payload(BaseModel):
    """Base of every message's scalars: strict types, no unknown keys, finite numbers.

    Attributes:
        most_bytes: of its JSON text. To say what is wrong with one pydantic may take a hundred
            times as much, so what a client sends is kept short.
    """

    most_bytes: ClassVar[int] = 1 << 20
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
