"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input of the user (config, data, checkpoint, environment).

    The message is one line that names the offending thing and the remedy. Launchers and tools print it
    as ``error: ...`` and exit with status 2; no traceback is shown. Line breaks, which quoted messages of libraries
    bring along, become spaces.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
