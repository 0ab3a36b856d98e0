"""A terminal in memory: what a person would see after everything that was written to it."""

from __future__ import annotations

import io
import re

_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class FakeTerminal(io.StringIO):
    """Understands what the command line writes, and raises at anything else.

    Attributes:
        screen: lines as they stand; it never scrolls, so a cursor that moves above the first line raises.
        styles: SGR parameters of each character of `screen`.
        frames: the screen at each flush.
        cursor_shown: whether the cursor can be seen.
    """

    encoding = "utf-8"

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self.encoding = encoding  # type: ignore[misc]
        self.screen: list[list[str]] = [[]]
        self.styles: list[list[str]] = [[]]
        self.frames: list[str] = []
        self.codes: list[str] = []
        self.cursor_shown = True
        self._row = self._column = 0
        self._style = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        place = 0
        while place < len(text):
            if found := _CODE.match(text, place):
                self._obey(found[1], found[2])
                place = found.end()
                continue
            self._put(text[place])
            place += 1
        return super().write(text)

    def flush(self) -> None:
        if not self.frames or self.frames[-1] != self.shown():
            self.frames.append(self.shown())

    def shown(self) -> str:
        return "\n".join("".join(line) for line in self.screen)

    def styled(self, style: str) -> str:
        """Return the characters on the screen that are drawn in a style, line after line."""
        pairs = zip(self.screen, self.styles, strict=True)
        return "".join(c for line, kinds in pairs for c, kind in zip(line, kinds, strict=True) if kind == style)

    def _put(self, char: str) -> None:
        if char == "\n":
            self._row, self._column = self._row + 1, 0
        elif char == "\r":
            self._column = 0
        elif char < " " or "\x7f" <= char < "\xa0":
            raise AssertionError(f"control character {char!r} reached the terminal")
        else:
            self._here()
            line, kinds = self.screen[self._row], self.styles[self._row]
            line[self._column : self._column + 1] = [char]
            kinds[self._column : self._column + 1] = [self._style]
            self._column += 1
        self._here()

    def _here(self) -> None:
        while len(self.screen) <= self._row:
            self.screen.append([])
            self.styles.append([])
        missing = self._column - len(self.screen[self._row])
        self.screen[self._row] += [" "] * missing
        self.styles[self._row] += [""] * missing

    def _obey(self, parameters: str, letter: str) -> None:
        self.codes.append(parameters + letter)
        if letter == "m":
            self._style = "" if parameters == "0" else parameters
        elif letter == "A":
            self._row -= int(parameters or 1)
            assert self._row >= 0, "the cursor left the screen at the top"
        elif letter in "KJ":
            del self.screen[self._row][self._column :]
            del self.styles[self._row][self._column :]
            if letter == "J":
                del self.screen[self._row + 1 :]
                del self.styles[self._row + 1 :]
        elif parameters + letter in ("?25l", "?25h"):
            self.cursor_shown = letter == "h"
        else:
            raise AssertionError(f"unknown code {parameters}{letter}")
