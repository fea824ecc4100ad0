"""An error of a function's own in words, and what is added to it where there is a way out of it here."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

_LIBRARIES = tuple(str(Path(file).parent) for file in (__file__, inspect.getfile(torch)))

_VALUES = (
    "{name}: as_torch traces a function, as jax.jit does. One that needs values has them under as_torch(jit=False), "
    "and an argument that is an option can be static: static_argnames"
)
_OF_TORCH = "{name}: as_torch takes a function of JAX's arrays; of one of torch's tensors, as_jax makes one of JAX"
_OF_JAX = "{name}: as_jax takes a function of torch's tensors; of one of JAX's arrays, as_torch makes one of torch"
_NEITHER = "{name}: it is called as it is, since neither as_torch nor as_jax is stacked on it"
_LONG = "{name}: an int32 of JAX is an int32 in torch. Call .long() on it there, or pass int64 (jax_enable_x64)"

_BUFFERS = (
    "{name}: of buffers there is no gradient. Differentiate in the parameters alone, and give the others beside them"
)


def in_words(error: BaseException) -> str:
    """Its type, its message, and the lines of the user's that raised it."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - the user's own `__str__`
        message = "(it has no message: its __str__ raises)"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    lines = "".join(f"\n  {f.filename}:{f.lineno} in {f.name}: {f.line}" for f in frames)
    return f"{type(error).__name__}: {message}{lines}"


def _is_of_jax(error: BaseException) -> bool:
    return type(error).__module__.startswith("jax")


# By the host: which errors, and what there is to say.
_NOTES: dict[str, list[tuple[Callable[[BaseException, str], bool], str]]] = {
    "torch": [
        (lambda error, text: isinstance(error, TypeError) and (_is_of_jax(error) or "concrete" in text), _VALUES),
        (lambda error, text: isinstance(error, TypeError) and "Tracer" in text, _OF_TORCH),
    ],
    "JAX": [
        (lambda error, text: isinstance(error, TypeError) and "torch.Tensor" in text, _OF_JAX),
        (lambda _, text: any(words in text for words in ("dtype to be Long", "LongTensor", "scalar type Long")), _LONG),
        (lambda _, text: "not differentiable with respect to argument" in text, _BUFFERS),
    ],
    "": [(lambda error, text: isinstance(error, TypeError) and ("Tensor" in text or "Array" in text), _NEITHER)],
}


def note_of(error: BaseException, host: str, name: str) -> str | None:
    """What there is to say of an error of the function's own, or of its framework's."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the user's own `__str__`
        return None
    return next((note.format(name=name) for applies, note in _NOTES[host] if applies(error, text)), None)


def annotate(error: BaseException, host: str, name: str) -> None:
    """Add it, once."""
    note = note_of(error, host, name)
    if note is not None and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
