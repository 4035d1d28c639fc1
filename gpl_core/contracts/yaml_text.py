"""YAML files written by users: plain values only, and a bounded number of them."""

from collections import Counter
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

_MOST = 100_000  # values
_TOO_MANY = f"more than {_MOST:,} values, with every alias (*name) written out; use fewer"


class InvalidYamlError(ValueError):
    """A text that is not YAML, or holds too much; the caller names the file."""


class _BoundedLoader(yaml.SafeLoader):
    """Counts every value, those behind an alias (`*name`) each time: nine lines can mean 10^9 values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self._count
        name: str = getattr(event, "anchor", None) or ""
        if not isinstance(event, yaml.AliasEvent):
            self._count += 1
        elif name in self.anchors:  # a value of unknown size: the alias stands inside of it
            self._count += self._sizes.get(name, _MOST)
        if self._count > _MOST:
            raise ComposerError(None, None, _TOO_MANY, event.start_mark)
        node = super().compose_node(parent, index)
        self._sizes.setdefault(name, self._count - before)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The content of `text`; InvalidYamlError says what is wrong and where."""
    try:
        return _BoundedLoader(text).get_single_data()
    except RecursionError:
        raise InvalidYamlError("lists or mappings nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f"line {at.line + 1}, column {at.column + 1}: " if at else ""
        raise InvalidYamlError(f"{place}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date such as 2026-13-01
        raise InvalidYamlError(str(error)) from None
