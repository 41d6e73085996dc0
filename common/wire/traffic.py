"""Bytes over a link."""

from typing import Self

from pydantic import Field

from fedphd.common.wire.payload import MOST, MOST_OF_CLIENT, Payload


class Traffic(Payload):
    """Bytes over one link, as counted by the server side of it."""

    sent_bytes: int = Field(0, ge=0, le=MOST)
    received_bytes: int = Field(0, ge=0, le=MOST)

    def __add__(self, other: Self) -> Self:
        return type(self)(
            sent_bytes=self.sent_bytes + other.sent_bytes,
            received_bytes=self.received_bytes + other.received_bytes,
        )

    def minus(self, earlier: Self) -> Self:
        """What came since ``earlier``."""
        return type(self)(
            sent_bytes=self.sent_bytes - earlier.sent_bytes,
            received_bytes=self.received_bytes - earlier.received_bytes,
        )

    @property
    def is_absurd(self) -> bool:
        """Whether no link moves that many bytes in an interval; sums of less do not overflow."""
        return max(self.sent_bytes, self.received_bytes) > 1000 * MOST_OF_CLIENT

    @property
    def total_bytes(self) -> int:
        """Bytes in both directions."""
        return self.sent_bytes + self.received_bytes
