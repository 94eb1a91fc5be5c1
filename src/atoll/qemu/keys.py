"""Keys by QEMU's names (QKeyCode in qapi/ui.json), and text as presses on a US keyboard. Pure."""

import difflib

from atoll.errors import InvalidInput

_PLAIN = {
    " ": "spc", "\n": "ret", "\t": "tab", "-": "minus", "=": "equal", "[": "bracket_left", "]": "bracket_right",
    "\\": "backslash", ";": "semicolon", "'": "apostrophe", "`": "grave_accent", ",": "comma", ".": "dot", "/": "slash",
    "\b": "backspace", "\x1b": "esc",
}  # fmt: skip
_SHIFTED = dict(zip('!@#$%^&*()_+{}|:"~<>?', "1234567890-=[]\\;'`,./", strict=True))

# What people call keys, beside QEMU's own names.
# fmt: off
_ALIASES = {
    "control": "ctrl", "enter": "ret", "return": "ret", "escape": "esc", "space": "spc", "del": "delete",
    "ins": "insert", "pageup": "pgup", "pagedown": "pgdn", "win": "meta_l", "super": "meta_l", "cmd": "meta_l",
    "meta": "meta_l", "altgr": "alt_r", "option": "alt", "bksp": "backspace", "print": "sysrq",
}
KNOWN = frozenset([
    *"abcdefghijklmnopqrstuvwxyz0123456789", *_PLAIN.values(),
    *(f"f{number}" for number in range(1, 13)), *(f"kp_{number}" for number in range(10)),
    "shift", "shift_r", "ctrl", "ctrl_r", "alt", "alt_r", "meta_l", "meta_r", "menu", "caps_lock", "num_lock",
    "scroll_lock", "sysrq", "pause", "insert", "delete", "home", "end", "pgup", "pgdn", "up", "down", "left", "right",
    "kp_enter", "kp_add", "kp_subtract", "kp_multiply", "kp_divide",
])
# fmt: on


def chord(text: str) -> list[str]:
    """`ctrl-alt-delete` → its key codes, in the order they go down. `+` joins too. Raises `InvalidInput`."""
    codes = []
    for part in text.replace("+", "-").lower().split("-"):
        name = _ALIASES.get(part, _PLAIN.get(part, part))
        if name not in KNOWN:
            near = difflib.get_close_matches(part, [*KNOWN, *_ALIASES], n=3)
            hint = (
                f"Did you mean {' or '.join(near)}?"
                if near
                else "Keys are named like a, f2, ret, esc, ctrl-alt-delete."
            )
            raise InvalidInput(f"'{part}' is no key", f"in '{text}'" if part != text else "", hint)
        codes.append(name)
    return codes


def keys_of_text(text: str) -> list[list[str]]:
    """The chord for each character. Raises `InvalidInput` for characters that a US keyboard doesn't have."""
    chords = []
    for character in text.replace("\r\n", "\n").replace("\r", "\n"):
        if character in _SHIFTED:
            base = _SHIFTED[character]
            chords.append(["shift", _PLAIN.get(base, base)])
        elif character in _PLAIN:
            chords.append([_PLAIN[character]])
        elif character.isascii() and character.isalnum():
            chords.append(["shift", character.lower()] if character.isupper() else [character])
        else:
            raise InvalidInput(
                f"{character!r} can't be typed", "a US keyboard doesn't have it", "Use `atoll exec` or `atoll cp`."
            )
    return chords
