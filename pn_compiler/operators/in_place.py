"""Traces ``y += w`` as the in-place write that it is, which views of y also see.

torch.fx traces it as ``y = y + w``. A call of ``operator.iadd`` would not do either: in its generated code,
``y += w; z = y``, y is rebound if it is a number.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx


def _called(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Wraps the in-place operator `function` as a function of this module."""

    def call(target: Any, other: Any) -> Any:
        return function(target, other)

    call.__name__ = call.__qualname__ = function.__name__
    return call


iadd = _called(operator.iadd)
isub = _called(operator.isub)
imul = _called(operator.imul)
itruediv = _called(operator.itruediv)
ifloordiv = _called(operator.ifloordiv)
imod = _called(operator.imod)
ipow = _called(operator.ipow)
imatmul = _called(operator.imatmul)
iand = _called(operator.iand)
ior = _called(operator.ior)
ixor = _called(operator.ixor)
ilshift = _called(operator.ilshift)
irshift = _called(operator.irshift)


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        proxy: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return proxy

    return record


class InPlaceProxy(fx.Proxy):
    """A proxy that records in-place operators."""

    __iadd__ = _recorded(iadd)
    __isub__ = _recorded(isub)
    __imul__ = _recorded(imul)
    __itruediv__ = _recorded(itruediv)
    __ifloordiv__ = _recorded(ifloordiv)
    __imod__ = _recorded(imod)
    __ipow__ = _recorded(ipow)
    __imatmul__ = _recorded(imatmul)
    __iand__ = _recorded(iand)
    __ior__ = _recorded(ior)
    __ixor__ = _recorded(ixor)
    __ilshift__ = _recorded(ilshift)
    __irshift__ = _recorded(irshift)
