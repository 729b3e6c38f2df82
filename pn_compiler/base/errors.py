"""Every exception that pn_compiler raises on purpose."""


class PnCompilerError(Exception):
    """Base class: the message is one that a user can act on."""


class ConfigError(PnCompilerError):
    """An option has a value that makes no sense, alone or beside another."""


class LoadError(PnCompilerError):
    """A model file cannot be read, or would have to run code to be read."""


class TraceError(PnCompilerError):
    """torch.fx cannot follow the model's forward."""


class UnsupportedModelError(PnCompilerError):
    """The model holds something that cannot be converted, such as an uninitialised lazy module."""


class RefusedError(PnCompilerError):
    """``strict=True`` and at least one site was refused; the message lists all of them."""


class PassError(PnCompilerError):
    """A pass failed; the message names the pass, its place and the cause."""


class PostconditionError(PassError):
    """A pass left a graph that breaks its own promise."""


class ExportError(PnCompilerError):
    """The ONNX file cannot be written."""


class VerificationError(ExportError):
    """The ONNX file computes something else than the PyTorch model."""


class BatchDependentError(ExportError):
    """The outputs of a sample would depend on the others in its batch; the message says what is to blame."""


class SmokeError(PnCompilerError):
    """A server cannot be asked, or does not give the golden outputs."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank, or its type if there is none.

    A bare ``assert`` and a bare ``raise`` have no message, and that of a KeyError is nothing but the key.
    """
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # of an exception class that cannot print itself
        return name
    found = next((line.strip() for line in text.splitlines() if line.strip()), name)
    return f"{name}: {found}" if isinstance(error, KeyError | SystemExit) and found != name else found


def named_line(error: BaseException) -> str:
    """`first_line` behind the type of the exception, for one whose type is part of what it says."""
    name, line = type(error).__name__, first_line(error)
    return line if line.startswith(name) else f"{name}: {line}"


def root_cause(error: BaseException) -> str:
    """Type and first line of the innermost exception, where torch wraps others around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def printable(message: str) -> str:
    """`message` on one line, without what would steer a terminal: names come from files."""
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
