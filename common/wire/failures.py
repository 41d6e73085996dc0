"""Why there is no answer: as who failed says it, and as the asking side takes it."""

import logging

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedphd.common.errors import FailureKind, FedPhDError, told_of

logger = logging.getLogger(__name__)


class NoAnswerError(Error):
    """The error reply that stands for an answer which did not come, or failed.

    It never travels: what a peer sends is a plain ``Error``, and ``kind_of`` calls that "error".
    """

    def __init__(self, code: int, reason: str, kind: FailureKind) -> None:
        super().__init__(code, reason)
        self.kind: FailureKind = kind


def kind_of(error: Error) -> FailureKind:
    """Why there is no answer, in a word."""
    return error.kind if isinstance(error, NoAnswerError) else "error"


def failed(asked: Message, error: Exception) -> Message:
    """The answer to a message over which ``error`` was raised.

    The asking side gets what ``told_of`` says; this process's log keeps the whole text.
    """
    kind = asked.metadata.message_type
    if isinstance(error, FedPhDError):
        # It says all that there is to know.
        logger.error("%s failed: %s", kind, error)
    else:
        logger.error("%s failed", kind, exc_info=error)
    failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told_of(error))
    return Message(failure, reply_to=asked)
