"""How weights are written on each link: a section of ``common/config/run.py``."""

from typing import Literal, Self

from pydantic import model_validator

from fedphd.common.config.data import Section, setting

CodecName = Literal["fp32", "bf16", "int8", "int4"]


class WireConfig(Section):
    """How weights are written on each link and in each direction."""

    # Anything but fp32 is, upwards and from the cloud to its edges, the difference to what the
    # other end has, so that rounding does not add up (edge/link.py, server/broadcast.py).
    # The defaults are the smallest that cost no distance (docs/results, "Bytes a value"). Clients,
    # who come and go, get whole weights, which few bits would spoil.
    cloud_down: CodecName = setting(
        "int4", "changes from the cloud to its edges: fp32, bf16, int8, int4"
    )
    cloud_up: CodecName = setting("int4", "changes from an edge to the cloud")
    client_down: CodecName = setting("bf16", "weights from a server to its clients")
    client_up: CodecName = setting("int4", "changes from a client to its server")

    @property
    def cloud_variate_down(self) -> CodecName:
        """How SCAFFOLD's variate goes to the edges: whole, which few bits would spoil."""
        return "fp32" if self.cloud_down == "fp32" else "bf16"

    @model_validator(mode="after")
    def _what_is_rounded_comes_back_as_a_change(self) -> Self:
        for link in ("cloud", "client"):
            down, up = getattr(self, f"{link}_down"), getattr(self, f"{link}_up")
            if down != "fp32" and up == "fp32":
                raise ValueError(
                    f"wire.{link}_down = {down!r} cannot be used with wire.{link}_up = 'fp32': "
                    "whole weights that come back would bring along what was rounded on the way "
                    f"down; use wire.{link}_up = 'bf16', or wire.{link}_down = 'fp32' too"
                )
        return self
