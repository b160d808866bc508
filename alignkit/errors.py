"""What can go wrong, in the user's words.

An error says where it happened, which rule was broken, which value broke it, and in `hint`
what to do about it. The command line prints it without a traceback and exits with its code.
"""

from __future__ import annotations


class AlignkitError(Exception):
    """An error that the user can fix.

    Args:
        message: where, which rule, which value: one sentence.
        hint: what to do about it; empty if the message already says so.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        # a line break in a name or a key must not look like another error or hint
        self.message, self.hint = (text.replace("\n", " ") for text in (message, hint))
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RecipeError(AlignkitError):
    """A recipe breaks one or more rules; `problems` holds every one of them.

    Args:
        problems: one error per broken rule, in file order.
    """

    def __init__(self, problems: list[AlignkitError]) -> None:
        super().__init__(problems[0].message if problems else "")
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class FileError(AlignkitError):
    """A file or folder cannot be read or written, or does not hold what it should."""


class DataError(AlignkitError):
    """A row, a file or a data set cannot be used."""


class ModelError(AlignkitError):
    """A model, tokenizer, adapter or template cannot be used."""


class RoundingError(ModelError):
    """A merged model differs from the trained one more than allowed; wider weights help."""


class RunError(AlignkitError):
    """A run folder is in use, incomplete, or does not fit the recipe."""


class TrainingError(AlignkitError):
    """Training cannot continue: a loss that is not finite, a full disk."""


class NotFiniteError(TrainingError):
    """A loss or a gradient is not finite; the optimizer has not stepped on it."""


class RewardError(AlignkitError):
    """A reward function, server or rule returned no usable scores."""


class Interrupted(AlignkitError):
    """The user or a scheduler stopped the run; a checkpoint was saved.

    Args:
        message: one sentence.
        hint: what to do about it.
        exit_code: 128 and the number of the signal: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
