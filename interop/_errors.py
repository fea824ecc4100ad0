"""The exceptions of the library, and the one format of their messages.

    InteropError
    ├── OptionError            (TypeError)            a decorator was given what it can't take
    ├── LeafError              (TypeError)            a leaf can't cross
    │   └── PrecisionError                            a 64-bit result has nowhere to go while x64 is off
    ├── ContainerError         (TypeError)            a container hides a leaf, or can't be opened
    ├── NarrowingError         (OverflowError)        a 64-bit integer does not fit into 32 bits
    ├── DeviceError            (ValueError)           leaves on devices that can't be used together
    ├── NotDifferentiableError (RuntimeError)         a derivative was asked of a function without `differentiable`
    ├── NotJittableError       (RuntimeError)         a trace was asked of a function without `jittable`
    ├── AbstractEvalError      (RuntimeError)         the shapes of the outputs can't be inferred
    ├── OutputMismatchError    (ValueError)           a result disagrees with what was promised
    ├── UnsupportedError       (NotImplementedError)  a transform that has no rule yet
    ├── NestedError            (RuntimeError)         a nested crossing that could hang
    └── ForkError              (RuntimeError)         a crossing in a forked child of a process that runs JAX

An error is raised low, where the reason is known, and completed once at the boundary, where the function and the path
of the argument are known (`locate`). Each class has its section in `examples/errors.md`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Self


class InteropError(Exception):
    """Base class of every error that the library raises on its own account.

    The text is assembled in one order: the guest function, the argument's path, what happened, what was got, what was
    expected, the way out, the place in the documentation. Parts that are not known are left out.
    """

    def __init__(
        self, what: str, *, got: str | None = None, expected: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.got = got
        self.expected = expected
        self.hint = hint
        self.leaf: int | None = None
        self.function: str | None = None
        self.argument: str | None = None
        self.result: str | None = None

    def __str__(self) -> str:
        if self.what.rstrip().endswith(self._place()):
            return self.what  # made of another's text, as `DataLoader` does for its workers
        return f"{self.words()} {self._place()}"

    def words(self) -> str:
        """The text without its place in the documentation: for a sentence that goes on."""
        argument = f"argument {self.argument}" if self.argument else None
        result = f"result{self.result}" if self.result is not None else None
        where = [part for part in (self.function, argument or result) if part]
        found = [f"{word} {part}" for word, part in (("got", self.got), ("expected", self.expected)) if part]
        head = ": ".join([*where, self.what])
        sentence = f"{head}: {', '.join(found)}" if found else head
        return f"{sentence}. {self.hint}" if self.hint else f"{sentence}."

    def _place(self) -> str:
        """The section on the class; of a class derived from it elsewhere, the same."""
        ours = next(kind for kind in type(self).__mro__ if kind.__module__ == InteropError.__module__)
        return f"[errors.md#{ours.__name__.lower()}]"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"  # Dynamo shows this of an error that it wraps

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__)

    def at(self, leaf: int) -> InteropError:
        """The same error, blaming the leaf of this index among the leaves of the call."""
        if self.leaf is None:
            self.leaf = leaf
        return self

    def of(self, function: str) -> Self:
        """The same error, blaming this function: where no frame above will."""
        self.function = function
        return self


class OptionError(InteropError, TypeError):
    """A decorator was given an option, or a function, that it can't take."""


class LeafError(InteropError, TypeError):
    """A leaf can't cross: its type, layout or dtype has no exact counterpart on the other side."""


class PrecisionError(LeafError):
    """A torch function returned a 64-bit float to a JAX that keeps 32 bits."""


class ContainerError(InteropError, TypeError):
    """A container holds a tensor or an array and can't be opened."""


class NarrowingError(InteropError, OverflowError):
    """A 64-bit integer does not fit into the 32 bits that JAX keeps while x64 is off."""


class DeviceError(InteropError, ValueError):
    """Leaves live on devices that can't be used together, or on a kind of device that is not supported."""


class NotDifferentiableError(InteropError, RuntimeError):
    """A derivative was asked of a crossing that was not declared `differentiable`."""


class NotJittableError(InteropError, RuntimeError):
    """A trace was asked of a crossing that was not declared `jittable`."""


class AbstractEvalError(InteropError, RuntimeError):
    """The shapes and dtypes of the outputs can't be inferred without running the function."""


class OutputMismatchError(InteropError, ValueError):
    """A result disagrees in structure, shape or dtype with what was promised for it."""


class UnsupportedError(InteropError, NotImplementedError):
    """A transform that has no rule here; never a wrong number instead."""


class NestedError(InteropError, RuntimeError):
    """A crossing inside a callback of a running JAX program, in the one situation that could hang."""


class ForkError(InteropError, RuntimeError):
    """A crossing in a forked child whose parent had started JAX: its threads do not survive the fork."""


def named(error: BaseException) -> str:
    """The type of an error and the first line of its text, for a sentence that goes on."""
    text = error.words() if isinstance(error, InteropError) else str(error)
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


@contextlib.contextmanager
def blaming(function: str, argument: str) -> Generator[None]:
    """Errors from here are of this argument of this function: where no call of a crossing is above to say so."""
    try:
        yield
    except InteropError as error:
        error.function, error.argument = function, argument
        raise


def _rebuild(kind: type[InteropError], state: dict[str, object]) -> InteropError:
    """Unpickle: the keywords of the constructor are gone, the attributes are not."""
    error = kind(str(state["what"]))
    error.__dict__.update(state)
    return error


for _kind in [kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, InteropError)]:
    _kind.__module__ = "interop"  # what a reader of a traceback can import
