"""The one exception that means "the user can fix this"."""

_LONGEST = 2000  # characters of a message


def is_text(value: str) -> bool:
    """Whether ``value`` can be a file's name and be printed: it holds no NUL and no half of a surrogate pair, which
    stands for a byte of a command line that is no UTF-8."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)


class UserError(Exception):
    """Bad input of the user (config, data, checkpoint, environment).

    The message is one line that names the offending thing and the remedy. Launchers and tools print it
    as ``error: ...`` and exit with status 2; no traceback is shown. Line breaks, as in quoted messages of
    libraries, become spaces, and halves of surrogate pairs, as in a file name that is not UTF-8, become question marks,
    so that the message can be sent and printed anywhere. The middle of a very long message is left out.
    """

    def __init__(self, message: str):
        message = message.encode(errors="replace").decode()
        line = " ".join(line.strip() for line in message.splitlines())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)
