"""Values in messages to the user."""


def short_repr(value, most: int = 60) -> str:
    """A value from a file or a user for a message: at most so many characters, all printable on any terminal."""
    try:
        text = ascii(value)
    except ValueError:  # a number with more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."
