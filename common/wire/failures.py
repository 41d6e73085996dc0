"""Why there is no answer, on the asking side."""

from flwr.app import Error

from fedphd.common.errors import FailureKind


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
