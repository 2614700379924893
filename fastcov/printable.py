"""Text of other people's files as a terminal may show it: what would command it is spelled out.

Everything that reaches a person goes through here: the messages of errors, lines of the command line and of logs, and
what a report is made of.
"""

from __future__ import annotations

import logging

#: The C0 and C1 controls with DEL, and Unicode's Bidi_Control, which reorders what is around it.
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
#: Line ends for Unicode, though for no terminal; and halves of surrogate pairs, which no encoding
#: can write.
_OTHERS = (0x2028, 0x2029, *range(0xD800, 0xE000))


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_FIELD = {code: _spelled(code) for code in (*_CONTROLS, *_BIDI, *_OTHERS)}
_LINES = {code: text for code, text in _FIELD.items() if chr(code) not in "\n\t"}


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` with every control character spelled out: ESC becomes the four letters ``\x1b``.

    Args:
        text: From a file, or about one.
        lines: Leave line feeds and tabs, as in text of several lines that this program laid out.

    Returns:
        The text, equal to what was given where there is nothing to spell out.
    """
    # The test is quick, and text with nothing to spell out is almost all of it.
    return text if text.isprintable() else text.translate(_LINES if lines else _FIELD)


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), lines=True), None
        return True


def printable_logger(name: str) -> logging.Logger:
    """A module's logger, for records that quote files: they are printable whoever handles them."""
    found = logging.getLogger(name)
    if not any(isinstance(one, _Printable) for one in found.filters):
        found.addFilter(_Printable())
    return found
