"""Where a torch function runs: in which modes of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import torch

from interop._private import torch as torch_private

_TINY, _ONE = 5e-324, 1.0
_CPU = torch.device("cpu")
is_grad_enabled, is_inference_mode, default_dtype = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.get_default_dtype,
)
any_autocast, function_modes = torch_private.any_autocast, torch_private.function_modes


def flushes() -> bool:
    """Whether denormal numbers are flushed to zero in this thread, as they are in a program of JAX."""
    return _TINY * _ONE == 0


class TorchState(NamedTuple):
    """What torch functions depend on beside their arguments, as it was where the program was made.

    A callback runs on any thread, with that thread's modes.
    """

    grad: bool
    inference: bool
    autocast: tuple[bool, torch.dtype]
    autocast_on_gpu: tuple[bool, torch.dtype]
    default_dtype: torch.dtype
    default_device: torch.device

    @staticmethod
    def now() -> TorchState:
        """The state of this thread."""
        return TorchState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
            (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
            torch.get_default_dtype(),
            torch.get_default_device() if torch_private.function_modes() else _CPU,
        )

    def watch(self) -> Callable[[], bool]:
        """Whether the thread has this state, as a function that is quick where it has, and has nothing uncommon."""
        grad, inference, dtype = self.grad, self.inference, self.default_dtype
        common = not self.is_autocast and self.default_device == _CPU

        def is_here() -> bool:
            if is_grad_enabled() is not grad or is_inference_mode() is not inference or default_dtype() is not dtype:
                return False
            return (common and not any_autocast() and not function_modes()) or TorchState.now() == self

        return is_here

    @property
    def is_autocast(self) -> bool:
        """Whether some autocast is on."""
        return self.autocast[0] or self.autocast_on_gpu[0]

    def put_back(self) -> None:
        """Set what can be set; a context that was entered and not left is out of reach."""
        torch.set_grad_enabled(self.grad)
        for device, (enabled, dtype) in (("cpu", self.autocast), ("cuda", self.autocast_on_gpu)):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_default_dtype(self.default_dtype)

    @contextlib.contextmanager
    def entered(self) -> Generator[None]:
        """A context with this state, whatever the thread's is."""
        now = TorchState.now()
        with contextlib.ExitStack() as stack:
            if self.inference != now.inference:
                stack.enter_context(torch.inference_mode(mode=self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, wanted, given in (("cpu", self.autocast, now.autocast),
                                          ("cuda", self.autocast_on_gpu, now.autocast_on_gpu)):  # fmt: skip
                if wanted != given:
                    stack.enter_context(torch.autocast(device, dtype=wanted[1], enabled=wanted[0]))
            if self.default_dtype is not now.default_dtype:
                stack.callback(torch.set_default_dtype, now.default_dtype)
                torch.set_default_dtype(self.default_dtype)
            if self.default_device != now.default_device:
                stack.enter_context(self.default_device)
            yield
