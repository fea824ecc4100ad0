"""The only users of private interfaces of either framework, one file each.

Every entry says what it is for, and has a public fallback that is taken when the private one is missing. Set
`INTEROP_PUBLIC_ONLY=1` before the import to take every fallback.
"""

from __future__ import annotations

import os

PUBLIC_ONLY = os.environ.get("INTEROP_PUBLIC_ONLY", "") not in ("", "0")
