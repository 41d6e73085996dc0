"""Imports Flower's typer without the warnings of newer click versions about names that it uses."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # typer 0.20 on click 8.5; the message is about typer's own imports.
    warnings.filterwarnings("ignore", r"'click\.utils\.", DeprecationWarning)
    import typer  # noqa: F401
