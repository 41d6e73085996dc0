"""What the command says of itself: help on arguments, and what a slip of the pen may mean."""

from pathlib import Path

import pytest
from support.command import fedphd


@pytest.mark.parametrize(
    ("command", "text"),
    [(("sample",), "a run's folder, or its checkpoint/"), (("keys", "sign"), "what a site sent")],
)
def test_help_says_what_arguments_are(command: tuple[str, ...], text: str, tmp_path: Path) -> None:
    assert text in fedphd(*command, "--help", cwd=tmp_path).stdout


def test_a_command_that_is_not_there_gets_one_suggestion(tmp_path: Path) -> None:
    done = fedphd("locall", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("Did you mean 'local'?") == 1
