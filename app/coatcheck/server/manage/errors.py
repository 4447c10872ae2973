"""Why a use case did not do what it was asked, each with a sentence for people."""

from typing import Final


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
    """The thing is in a state that does not allow it.

    Attributes:
        code: stable name of the obstacle, for programs.
        evidence: what is known of it, as the API writes it.
    """

    def __init__(
        self, message: str, code: str = "conflict", evidence: dict[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.evidence = evidence or {}


#: How the API calls the axes of `Rights`.
_AXES: Final = {
    "environment": "env",
    "expires_at": "expiresAt",
    "networks": "cidrs",
    "project_id": "project",
    "role": "permissions",
    "member_role": "role",
    "group_id": "group",
    "credit_limit": "creditLimit",
}


class Beyond(Exception):
    """Whoever asks would give away, or get at, more than it has itself.

    Attributes:
        fields: on which axes, as the API names them.
    """

    def __init__(self, axes: tuple[str, ...]) -> None:
        self.fields = tuple(_AXES.get(axis, axis) for axis in axes)
        super().__init__(
            f"this goes beyond your own rights: {', '.join(self.fields)}.  An API key can only"
            " manage what lies within itself"
        )
