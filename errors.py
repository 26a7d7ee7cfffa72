"""Errors that the user can put right. Nothing is imported here, so that flags can be checked before torch is there."""


class UserError(ValueError):
    """Something the user can put right; shown as one line, without a traceback."""
