"""The one error that a user can mend, and how text from outside is shown."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do. The command line exits with code 2."""


def printable(text: object) -> str:
    """One line that is safe to log and to show: whatever a terminal would act on, or no encoding can hold, is escaped.

    File names and keys come from outside. They may hold control characters, marks that turn the direction of writing, and
    bytes that are not UTF-8 (which Python keeps as lone surrogates, and no log can store). Markup is not touched: print with
    `markup=False`, or through `rich.markup.escape`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
