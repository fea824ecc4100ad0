"""What the library says of itself, by the logger `interop`: nothing, unless somebody listens.

At debug level it tells what was traced, captured and copied, and where it fell back on another way; at info level, once
for a function, of a trace or a compilation that took long. A message begins with the name of the crossing. What is
copied is told when a structure of call is met first; no call that has run before comes by here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger("interop")

# Seconds that a compilation may take without a word.
LONG = 2.0


def is_heard() -> bool:
    """Whether somebody listens at debug level: asked where there is something to find out first."""
    return _log.isEnabledFor(logging.DEBUG)


def tell(name: str, what: str, *details: object) -> None:
    """Tell what happened to the crossing of this name. Details that are functions are called only if it is heard."""
    if is_heard():
        words = tuple(detail() if callable(detail) else detail for detail in details)
        _log.debug("%s: %s", name, what % words if words else what, stacklevel=2)


def tell_time(name: str, what: Callable[[], str], seconds: float, *, loudly: bool) -> bool:
    """Tell how long something took; whether that was long. `loudly` is whether a long time is told at info level."""
    is_long = seconds > LONG
    level = logging.INFO if is_long and loudly else logging.DEBUG
    if _log.isEnabledFor(level):
        again = "; calls with the same shapes do not do it again" if level == logging.INFO else ""
        _log.log(level, "%s: %s in %.1f s%s", name, what(), seconds, again, stacklevel=2)
    return is_long
