"""A recipe as text: YAML of which nothing but names, texts and lists of texts is read."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pn_compiler.base.errors import ConfigError, printable
from pn_compiler.base.regular_files import why_unreadable

if TYPE_CHECKING:
    from yaml.events import Event

MOST_BYTES = 1 << 18  # thousands of options
_EXPECTED = "expected lines such as `norm: group`"
_NOTHING = frozenset(["", "~", "null", "Null", "NULL"])  # what YAML reads as no value

Value = str | list["Value"]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """An option in a recipe.

    Attributes:
        line: of the file, from 1.
        value: as it is written: 1.20 stays "1.20", and no stays "no".
        quoted: whether the value is a text in quotes.
    """

    line: int
    value: Value
    quoted: bool = False


def read_recipe(path: Path) -> dict[str, Entry]:
    """The entries of a recipe, by name; ``-`` and ``_`` in names are the same.

    Raises:
        ConfigError: it cannot be read, or is no mapping from names to texts and lists.
    """
    import yaml

    text = _text(path)
    reader = _Reader(path, yaml.parse(text, Loader=yaml.SafeLoader))
    try:
        return reader.entries()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise _wrong(path, line, f"no YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a character that there is not
        raise ConfigError(f"{path}: no YAML: {printable(str(error)):.200}") from error


def _text(path: Path) -> str:
    if (why := why_unreadable(path)) is not None:
        raise ConfigError(f"cannot read {path}: {why}")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path} is no recipe: it is larger than {MOST_BYTES // 1024} KiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no recipe: it is not text in UTF-8") from error


def _wrong(path: Path, line: int, message: str) -> ConfigError:
    return ConfigError(f"{path}, line {line}: {message}")


class _Reader:
    """Makes entries of the events of YAML's parser: no tags, no aliases, nothing below lists of lists."""

    def __init__(self, path: Path, events: "Iterator[Event]") -> None:
        self._path, self._events = path, events
        self._line = 1

    def entries(self) -> dict[str, Entry]:
        from yaml import events

        kinds = (events.StreamStartEvent, events.DocumentStartEvent)
        event = next(event for event in self._each() if not isinstance(event, kinds))
        if isinstance(event, events.StreamEndEvent) or _is_nothing(event):
            raise ConfigError(f"{self._path} holds no options: {_EXPECTED}")
        if not isinstance(event, events.MappingStartEvent):
            raise self._wrong(f"{_EXPECTED}, found {_kind(event)}")
        found: dict[str, Entry] = {}
        while not isinstance(event := next(self._each()), events.MappingEndEvent):
            if not isinstance(event, events.ScalarEvent):
                raise self._wrong(f"{_EXPECTED}, found {_kind(event)} as a name")
            name, line = event.value.replace("_", "-"), self._line
            if name in found:
                raise self._wrong(f"{name} is there twice, first in line {found[name].line}")
            event = next(self._each())
            found[name] = Entry(line, self._value(name, event), bool(getattr(event, "style", None)))
        self._end()
        return found

    def _value(self, name: str, event: "Event", depth: int = 2) -> Value:
        from yaml import events

        if _is_nothing(event):
            raise self._wrong(f"{name} has no value: leave the line out for the default")
        if isinstance(event, events.ScalarEvent):
            text: str = event.value
            return text
        if not isinstance(event, events.SequenceStartEvent) or not depth:
            raise self._wrong(f"{name}: expected a value or a list of values, found {_kind(event)}")
        parts: list[Value] = []
        while not isinstance(event := next(self._each()), events.SequenceEndEvent):
            parts.append(self._value(name, event, depth - 1))
        return parts

    def _end(self) -> None:
        from yaml import events

        for event in self._each():
            if isinstance(event, events.DocumentStartEvent):
                raise self._wrong("a second document begins: a recipe is one")

    def _each(self) -> "Iterator[Event]":
        from yaml import events

        for event in self._events:
            self._line = event.start_mark.line + 1
            if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise self._wrong("anchors and aliases (& and *) have no place in a recipe")
            if getattr(event, "tag", None) is not None:
                raise self._wrong(f"tags such as {event.tag!r:.60} have no place in a recipe")
            yield event

    def _wrong(self, message: str) -> ConfigError:
        return _wrong(self._path, self._line, message)


def _is_nothing(event: "Event") -> bool:
    return getattr(event, "value", None) in _NOTHING and not event.style


def _kind(event: "Event") -> str:
    name = type(event).__name__
    return {"ScalarEvent": "a text", "SequenceStartEvent": "a list"}.get(name, "a mapping")


def write_recipe(values: Mapping[str, Any], comments: Sequence[str]) -> str:
    """The text of a recipe that `read_recipe` reads back, under lines of `comments`."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
        """Gives each option a line, lists included."""

        def represent_list(self, data: Any) -> yaml.SequenceNode:
            return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    for kind in (list, tuple):
        Dumper.add_representer(kind, Dumper.represent_list)
    head = "".join(f"# {printable(comment)}\n" for comment in comments)
    text: str = yaml.dump(
        dict(values),
        Dumper=Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=2**31,
    )
    return head + text
