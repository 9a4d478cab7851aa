"""The base and the controls of requests, loaded once for several."""

from __future__ import annotations

from controlkit.bases.base import Base
from controlkit.bases.devices import choose_device, choose_dtype
from controlkit.bases.load import load_base
from controlkit.controls.control import Control
from controlkit.formats.load import load_control
from controlkit.sampling.request import GenerateRequest


class Models:
    """The base and the controls of the last request, kept for the next one."""

    def __init__(self) -> None:
        self.shared: dict[str, Control] = {}
        """Companions of the controls, as `load_control` keeps them."""
        self._base: tuple[object, Base] | None = None
        self._controls: dict[tuple[int, str], Control] = {}

    def base(self, request: GenerateRequest) -> Base:
        """The base of a request."""
        key = base_key(request)
        if self._base is None or self._base[0] != key:
            self._base = None  # its memory is free before the next one is loaded
            self._controls, self.shared = {}, {}
            device = choose_device(request.device)
            text_device = None if request.text_device is None else choose_device(request.text_device)
            dtype = choose_dtype(request.precision, device)
            self._base = (
                key,
                load_base(request.base, device=device, dtype=dtype, text_device=text_device, vae=request.vae),
            )
        return self._base[1]

    def control(self, index: int, name: str, base: Base) -> Control:
        """The control at `index` of a request on `base`, the last one."""
        if (index, name) not in self._controls:
            self._controls[index, name] = load_control(name, base, shared=self.shared)
        return self._controls[index, name]

    def keep_only(self, request: GenerateRequest) -> None:
        """Forget all controls but those of `request`, and the companions that none of them has."""
        names = {(index, use.control) for index, use in enumerate(request.controls)}
        self._controls = {key: control for key, control in self._controls.items() if key in names}
        kept = {id(module) for control in self._controls.values() for module in control.modules()}
        self.shared = {name: control for name, control in self.shared.items() if id(control) in kept}


def base_key(request: GenerateRequest) -> tuple[object, ...]:
    """What decides how the base is loaded."""
    return request.base, request.device, request.text_device, request.precision, request.vae
