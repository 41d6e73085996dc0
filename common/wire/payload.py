"""What every message has in common."""

from typing import Final

from pydantic import BaseModel, ConfigDict

# Beyond any honest figure, and small enough that an edge's sums of them pass at the cloud and
# the cloud's sums do not overflow.
MOST_OF_CLIENT: Final = 10**12
MOST: Final = 10**30


class Payload(BaseModel):
    """Base of every message's scalars: strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
