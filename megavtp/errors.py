"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input of the user (config, data, checkpoint, environment).

    The message is one line that names the offending thing and the remedy. Launchers and tools print it
    as ``error: ...`` and exit with status 2; no traceback is shown. Line breaks, which quoted messages of libraries
    bring along, become spaces, and half surrogate pairs, as in a file's name that is not UTF-8, question marks: the
    message can be sent and printed anywhere.
    """

    def __init__(self, message: str):
        message = message.encode(errors="replace").decode()
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
