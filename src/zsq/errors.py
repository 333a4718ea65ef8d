"""Errors a user can meet. Imports nothing, so that `zsq --help` stays fast.

Every message says what was expected, what was found and what to do next; the command line prints it without a traceback
and ends with `exit_code`.
"""


class ZsqError(Exception):
    """Base of all errors raised on purpose by zsq."""

    exit_code = 1


class BadInput(ZsqError, ValueError):
    """Something the user gave cannot be used; nothing on disk was damaged.

    Args:
        subject: what is wrong, e.g. ``"--bits"`` or a file name.
        expected: what would have been accepted.
        got: what was found instead.
        fix: what to do, as a full sentence.

    Example:
        >>> raise BadInput("--bits", expected="a whole number from 2 to 8", got="9", fix="Choose 2 to 8.")
        Traceback (most recent call last):
        ...
        zsq.errors.BadInput: --bits: expected a whole number from 2 to 8, got 9. Choose 2 to 8.
    """

    exit_code = 2

    def __init__(self, subject: str, *, expected: object, got: object, fix: str) -> None:
        self.subject, self.expected, self.got, self.fix = subject, expected, got, fix
        super().__init__(f"{subject}: expected {expected}, got {got}. {fix}")


class RunFailed(ZsqError, RuntimeError):
    """A run or a verification that started well and then failed; the message says what is kept on disk."""

    exit_code = 1


class Interrupted(ZsqError):
    """A signal asked the run to stop; the step was finished and a checkpoint written.

    Args:
        signum: number of the signal (2 for SIGINT, 15 for SIGTERM).
        where: what was saved, and how to go on.
    """

    def __init__(self, signum: int, where: str) -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(f"stopped by signal {signum}. {where}")
