"""How weights are written on each link: a section of ``common/config/run.py``."""

from typing import Literal

from fedphd.common.config.data import Section, setting

CodecName = Literal["fp32", "bf16", "int8", "int4"]


class WireConfig(Section):
    """How weights are written on each link and in each direction."""

    # Anything but fp32 is, upwards and from the cloud to its edges, the difference to what the
    # other end has, so that rounding does not add up (edge/link.py, server/broadcast.py).
    cloud_down: CodecName = setting(
        "fp32", "changes from the cloud to its edges: fp32, bf16, int8, int4"
    )
    cloud_up: CodecName = setting("fp32", "changes from an edge to the cloud")
    client_down: CodecName = setting("fp32", "weights from a server to its clients")
    client_up: CodecName = setting("fp32", "changes from a client to its server")
