"""The ladder of rooms: who may import whom."""

from __future__ import annotations

ROLES = {"server", "edge", "client"}
# A room and the rooms that it may import; every room may import itself.
COMMON = [
    "common", "common.config", "common.unet", "common.data", "common.wire", "common.history",
    "common.quality",
]  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "common.config": {"common"},
    "common.config.presets": set(),
    "common.unet": {"common", "common.config"},
    "common.data": {"common", "common.config"},
    "common.wire": {"common", "common.config", "common.unet"},
    "common.history": {"common", "common.config", "common.unet", "common.wire"},
    "common.quality": set(COMMON),
    "client": set(COMMON),
    "edge": set(COMMON),
    "server": set(COMMON),
    "deploy": set(),
    "deploy.keys": {*COMMON},
    "deploy.launch": {*COMMON, "deploy.keys"},
    "deploy.live": {*COMMON, "deploy.launch"},
    "deploy.report": {*COMMON, "deploy.launch"},
    "deploy.simulation": {*COMMON, "edge", "deploy.launch"},
    "deploy.apps": {*COMMON, *ROLES, "deploy.launch", "deploy.report", "deploy.simulation"},
    "deploy.bundle": {"deploy.apps"},
    "deploy.compare": {*COMMON, "deploy.launch", "deploy.report", "deploy.simulation"},
    "deploy.share": {*COMMON, "deploy.launch"},
    "deploy.cli": {
        *COMMON,
        *ROLES,
        "deploy.keys",
        "deploy.launch",
        "deploy.report",
        "deploy.live",
        "deploy.simulation",
        "deploy.compare",
        "deploy.share",
    },
}
