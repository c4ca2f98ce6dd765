"""What the lab raises when it, and not the command, failed."""


class LabError(Exception):
    """The machine could not be built, fetched or booted; the text says why and what to do."""
