"""Asks a server for the golden outputs: ``python -m pn_compiler.smoke URL --golden golden.npz``.

For any server of the Open Inference Protocol, version 2, such as Triton, MLServer and KServe. Needs the extra
``serving``.
"""

import argparse
import contextlib
import os
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pn_compiler.base.errors import ConfigError, PnCompilerError, SmokeError
from pn_compiler.base.option_checks import check_number, check_path, one_of
from pn_compiler.repository.golden import Arrays, Golden

if TYPE_CHECKING:
    from numpy import ndarray

Protocol = Literal["http", "grpc"]

_BINARY = "binary_tensor_data"  # an extension of the protocol, of Triton and KServe


def smoke_test(
    url: str,
    golden: Path,
    *,
    protocol: Protocol = "http",
    model: str | None = None,
    timeout: float = 60,
    wait: float = 0,
) -> str:
    """Compares the answers of a server with the golden ones.

    Args:
        url: such as ``127.0.0.1:8000``; ``https://`` before it encrypts.
        golden: the file ``golden.npz`` of the version that is served.
        model: its name on the server, if that is not its name in the repository.
        timeout: seconds for an answer.
        wait: seconds in which server and model may still become ready.

    Returns:
        One line about what was compared.

    Raises:
        ConfigError: `url` is not an address, or tritonclient is not installed.
        LoadError: `golden` is not such a file.
        SmokeError: the server cannot be reached, is not ready, or gives other answers.
    """
    one_of("protocol", protocol, get_args(Protocol))
    check_path("golden", golden)
    check_number("timeout", timeout, "seconds, more than 0", sys.float_info.min)
    check_number("wait", wait, "seconds, 0 or more", 0)
    expected = Golden.load(golden)
    name = model or expected.model
    server = _Server(url, protocol, timeout)
    try:
        _wait_until_ready(server, name, wait)
        metadata = server.metadata(name)
        _check_interface(metadata, expected)
        hint = _other_version(metadata, expected)
        worst = max(_compare(server.infer(name, *call), call[1], expected, hint) for call in expected.calls)
    finally:
        server.close()
    sizes = " and ".join(str(len(next(iter(inputs.values())))) for inputs, _ in expected.calls)
    return (
        f"{name} on {url} ({protocol}): largest error {worst:.1e} (relative, limit {expected.tolerance:.1e}) "
        f"at batch {sizes}"
    )


class _Server:
    """A client of a server, the same for HTTP and gRPC; its failures are SmokeErrors."""

    def __init__(self, url: str, protocol: Protocol, timeout: float) -> None:
        try:
            if protocol == "grpc":
                import tritonclient.grpc as client
            else:
                import tritonclient.http as client
        except ImportError as error:
            raise ConfigError(
                "the smoke test needs tritonclient: pip install 'pn-compiler[serving]'"
            ) from error
        scheme, address = _split(url)
        self.url, self._http, self._timeout = url, protocol == "http", timeout
        limits: dict[str, Any] = {"ssl": scheme in ("https", "grpcs")}
        if self._http:
            limits |= {"connection_timeout": timeout, "network_timeout": timeout}
        self._library = client
        self._binary = False
        with self._smoke_errors("connect"):
            self._client = client.InferenceServerClient(address, **limits)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._client.close()

    def why_not_ready(self, model: str) -> str:
        """Empty if the model is ready; else what the server says of it."""
        with self._smoke_errors("is it live?"):
            if not self._client.is_server_live(**self._limit()):
                return "the server is not live, or speaks another protocol"
        with self._smoke_errors(f"is {model} ready?"):
            if self._client.is_model_ready(model, **self._limit()):
                return ""
        known = self._index()
        found = [entry for entry in known if entry["name"] == model]
        if known and not found:
            names = ", ".join(sorted({entry["name"] for entry in known}))
            return f"there is no model {model}; the server has {names}"
        reasons = [entry["reason"] for entry in found if entry.get("reason")]
        return f"model {model} is not ready{': ' + reasons[0] if reasons else ', or there is none'}"

    def _index(self) -> list[dict[str, Any]]:
        """Name, version, state and reason of each model; empty if the server does not list them."""
        try:
            options = {} if self._http else {"as_json": True}
            index = self._client.get_model_repository_index(**options, **self._limit())
        except Exception:  # an extension of the protocol, which not every server has
            return []
        return index if isinstance(index, list) else index.get("models", [])

    def metadata(self, model: str) -> dict[str, Any]:
        options = {} if self._http else {"as_json": True}
        with self._smoke_errors(f"metadata of {model}"):
            server = self._client.get_server_metadata(**options, **self._limit())
            self._binary = _BINARY in server.get("extensions", [])
            found: dict[str, Any] = self._client.get_model_metadata(model, **options, **self._limit())
            return found

    def infer(self, model: str, inputs: Arrays, outputs: Arrays) -> Arrays:
        library, binary = self._library, {"binary_data": self._binary} if self._http else {}
        tensors = []
        for name, value in inputs.items():
            tensor = library.InferInput(name, list(value.shape), _datatype(value))
            tensors.append(tensor.set_data_from_numpy(value, **binary))
        requested = [library.InferRequestedOutput(name, **binary) for name in outputs]
        with self._smoke_errors(f"batch of {len(next(iter(inputs.values())))}"):
            result = self._client.infer(model, tensors, outputs=requested, **self._limit())
            return {name: result.as_numpy(name) for name in outputs}

    def _limit(self) -> dict[str, float]:
        return {} if self._http else {"client_timeout": self._timeout}

    @contextlib.contextmanager
    def _smoke_errors(self, what: str) -> Iterator[None]:
        """Turns whatever the client raises into a SmokeError of one line."""
        try:
            yield
        except PnCompilerError:
            raise
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            status = str(getattr(error, "status", lambda: "")())
            if isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in status or "timed out" in text:
                raise SmokeError(f"{self.url}: no answer within {self._timeout:g} s ({what})") from error
            if "closed" in text.lower() or "reset by peer" in text:
                raise SmokeError(f"{self.url} closed the connection ({what}): {text}") from error
            if isinstance(error, OSError) or "UNAVAILABLE" in status:
                raise SmokeError(f"{self.url} cannot be reached ({what}): {text}") from error
            raise SmokeError(f"{self.url} refuses ({what}): {text}") from error


def _split(url: str) -> tuple[str, str]:
    """Scheme and address. Raises ConfigError if `url` is not an address."""
    scheme, _, address = url.rpartition("://")
    try:
        found = urllib.parse.urlsplit(f"//{address}")
        right = bool(found.hostname) and found.port != 0  # reading a wrong port raises
    except ValueError:
        right = False
    if not right:
        raise ConfigError(f"url {url!r}: expected an address such as 127.0.0.1:8000")
    return scheme, address.rstrip("/")


def _datatype(value: "ndarray[Any, Any]") -> str:
    from tritonclient.utils import np_to_triton_dtype

    return str(np_to_triton_dtype(value.dtype))


def _wait_until_ready(server: _Server, model: str, seconds: float) -> None:
    """Raises SmokeError if server and model are not ready within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            reason = server.why_not_ready(model)
            if not reason:
                return
            failure = SmokeError(f"{server.url}: {reason}")
        except SmokeError as error:
            failure = error
        if time.monotonic() >= end:
            raise failure
        time.sleep(0.2)


def _check_interface(metadata: dict[str, Any], golden: Golden) -> None:
    """Raises SmokeError if names, element types or shapes are not those of the golden arrays."""
    for kind, arrays in zip(("input", "output"), golden.calls[-1], strict=True):
        served = {value["name"]: value for value in metadata.get(f"{kind}s", [])}
        if served.keys() != arrays.keys():
            names = f"{', '.join(served)}, not {', '.join(arrays)}"
            raise SmokeError(
                f"{golden.model}: the server's {kind}s are {names}{_other_version(metadata, golden)}"
            )
        for name, value in arrays.items():
            datatype, shape = served[name]["datatype"], [int(size) for size in served[name]["shape"]]
            if datatype != _datatype(value):
                raise SmokeError(
                    f"{golden.model}: {kind} {name} is {datatype}, the golden one {_datatype(value)}"
                )
            if len(shape) != value.ndim or any(
                s not in (-1, v) for s, v in zip(shape, value.shape, strict=True)
            ):
                raise SmokeError(
                    f"{golden.model}: {kind} {name} has shape {shape}, the golden one {list(value.shape)}"
                )


def _compare(actual: Arrays, expected: Arrays, golden: Golden, hint: str) -> float:
    """The largest relative error of an output. Raises SmokeError if it is beyond the tolerance."""
    from pn_compiler.export import relative_error

    worst = 0.0
    for name, value in expected.items():
        answer = actual[name]
        if answer is None or answer.shape != value.shape:
            found = "nothing" if answer is None else str(list(answer.shape))
            raise SmokeError(f"{golden.model}: output {name} came as {found}, expected {list(value.shape)}")
        error = relative_error(answer, value)
        if not error <= golden.tolerance:
            raise SmokeError(
                f"{golden.model}: output {name} differs by {error:.1e} at batch {len(value)} (relative, "
                f"limit {golden.tolerance:.1e}){hint}"
            )
        worst = max(worst, error)
    return worst


def _other_version(metadata: dict[str, Any], golden: Golden) -> str:
    versions = metadata.get("versions", [])
    if not versions or str(golden.version) in versions:
        return ""
    return f" (it serves version {', '.join(versions)}, the golden file is of {golden.version})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command: 0 if all answers are right, 1 with one line if not, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m pn_compiler.smoke",
        description="Asks a server of the Open Inference Protocol, and compares its answers.",
    )
    parser.add_argument("url", help="such as 127.0.0.1:8000")
    parser.add_argument("--golden", type=Path, required=True, metavar="FILE", help="golden.npz of the model")
    parser.add_argument("--protocol", choices=get_args(Protocol), default="http")
    parser.add_argument("--model", metavar="NAME", help="on the server (default: as in the golden file)")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds for an answer")
    parser.add_argument("--wait", type=float, default=0, metavar="S", help="seconds to become ready")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own log lines; what matters is raised
    try:
        line = smoke_test(**vars(arguments))
    except PnCompilerError as error:
        sys.stderr.write(f"smoke: error: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(f"smoke: passed: {line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
