"""The errors that callers are expected to tell apart. Anything else that is raised is a bug."""

from __future__ import annotations


class UserError(Exception):
    """What the user handed us cannot be used.

    The message is one clear sentence: what was expected, what came, how to fix it. The command
    line prints it without a traceback and exits with status 2.
    """


class WorldError(Exception):
    """A simulation process died, hung or failed; `cause` is one word for counting.

    A failed simulation never becomes a reward: callers mask what depended on it and restart
    the world.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return (WorldError, (self.cause, self.detail))
