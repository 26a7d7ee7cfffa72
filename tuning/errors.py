"""Errors that the user can put right. Nothing is imported here, so that flags can be checked before torch is there."""


class UserError(ValueError):
    """Something the user can put right; shown as one line, without a traceback."""


class DataError(ValueError):
    """A row or file that cannot be used; the message names file and line and what is wrong."""


class FolderError(ValueError):
    """A folder that cannot be written, or is not as it was written; the message names it and what to do."""
