"""Why a module is not traced, and the tracer base class that records it."""

import dataclasses
from typing import NoReturn

from torch import fx

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.proxies.proxies import Untraceable


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why a module is not traced.

    Attributes:
        path: path of the innermost module whose code is the reason.
        code: code of the diagnostic that reports it; None for what torch.fx itself cannot trace.
        reason: the reason in words.
    """

    path: str
    code: str | None
    reason: str

    def notes(self) -> set[Diagnostic]:
        return {whole_note(self.code or "PN128", self.path, self.reason)}


def whole_note(code: str, path: str, reason: str) -> Diagnostic:
    """The diagnostic that the module at `path` is not traced."""
    hint = "what it calls is converted on its own"
    return Diagnostic(code, path, f"the module stays whole: {reason}", hint)


class RefusingTracer(fx.Tracer):
    """A tracer that knows which module it is in, and remembers why it gave up.

    Attributes:
        stack: paths of the modules being traced, outermost first.
        failure: the first failure, even if the forward catches the exception.
    """

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.stack = [""]
        self.failure: Failure | None = None

    def refuse(self, code: str | None, reason: str) -> NoReturn:
        """Gives up: the module being traced does something that a graph would not do."""
        self.failed(code, reason)
        raise Untraceable(code, reason)

    def failed(self, code: str | None, reason: str) -> None:
        failure = Failure(self.stack[-1], code, reason)
        if self.failure is None or (self.failure.path == failure.path and code == "PN115"):
            self.failure = failure  # rewriting weights must not be masked by another reason
