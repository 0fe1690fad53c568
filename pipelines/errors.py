"""What can end a run with a message instead of a traceback."""


class ConfigurationError(ValueError):
    """A value of the configuration cannot be used."""


class RunStopped(RuntimeError):
    """A run cannot go on; its message says why, what is left, and how to continue."""
