"""The one error that bad data raises, so that callers can tell it from a bug."""


class DataError(ValueError):
    """The user's data cannot be used; the message names the file, the value and the remedy."""
