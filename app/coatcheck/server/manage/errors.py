"""Why a use case did not do what it was asked: three kinds, each with a sentence for people."""


class Invalid(ValueError):
    """An input breaks a rule.

    Attributes:
        field: which input, as the API names it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class NotFound(LookupError):
    """There is no such thing, or not for whoever asks."""


class Conflict(Exception):
    """The thing is in a state that does not allow it."""
