"""Lets a refusal of ``flwr run`` stand last, which Flower would bury in three tracebacks."""

import logging
import threading
from typing import Final

from fedphd.common.errors import ConfigError

_TRACEBACK: Final = "Traceback (most recent call last)"
_WORDS: Final = "refused before the start: {}"


def words_of(error: ConfigError) -> str:
    """The refusal for people."""
    return _WORDS.format(error)


class LastWord(logging.Filter):
    """Of Flower's logger: tracebacks go, and Flower's last report says why instead."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__()
        self._error = error

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether Flower logs the record, which may have changed."""
        text = record.getMessage()
        if text.startswith(_TRACEBACK) or (str(self._error) in text and not record.exc_info):
            return False
        if record.exc_info:
            record.msg, record.args, record.exc_info = words_of(self._error), (), None
        return True


def stand_last(error: ConfigError) -> None:
    """Before ``error`` is raised in a ServerApp of Flower's, which ends the process."""
    logging.getLogger("flwr").addFilter(LastWord(error))
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not error:
            before(arguments)

    threading.excepthook = hook
