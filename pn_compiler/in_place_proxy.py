"""Tracing ``y += w`` as what it is: a write, which a view of y shows as well."""

import operator
from typing import Any

from torch import fx


class InPlaceProxy(fx.Proxy):
    """A proxy with the operators in place, which torch.fx records as ``y = y + w``."""

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._in_place(operator.ifloordiv, other)

    def __imod__(self, other: Any) -> Any:
        return self._in_place(operator.imod, other)

    def __ipow__(self, other: Any) -> Any:
        return self._in_place(operator.ipow, other)

    def __imatmul__(self, other: Any) -> Any:
        return self._in_place(operator.imatmul, other)

    def __iand__(self, other: Any) -> Any:
        return self._in_place(operator.iand, other)

    def __ior__(self, other: Any) -> Any:
        return self._in_place(operator.ior, other)

    def __ixor__(self, other: Any) -> Any:
        return self._in_place(operator.ixor, other)

    def __ilshift__(self, other: Any) -> Any:
        return self._in_place(operator.ilshift, other)

    def __irshift__(self, other: Any) -> Any:
        return self._in_place(operator.irshift, other)

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})
