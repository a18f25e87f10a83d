"""Read a run's configuration: a YAML recipe, then an optional DeepSpeed file, then ``a.b.c=value`` overrides."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml

from megavtp.config.typed import convert, described, unknown
from megavtp.errors import UserError, is_text

C = TypeVar("C")
_MOST_VALUES = 10_000  # in a file; a whole recipe has some 150
_MOST_LEVELS = 32
_TOO_DEEP = f"nested too deeply, {_MOST_LEVELS} levels are the most"


def load_config(
    path: str | Path, root: type[C], overrides: Sequence[str] = (), deepspeed_config: str | Path | None = None
) -> C:
    """Read the configuration of a run, which is a ``root``, from a YAML recipe.

    Args:
        overrides: ``a.b.c=value`` with the value in YAML; they are applied last.
        deepspeed_config: a JSON or YAML file whose keys are merged over the recipe's ``deepspeed`` section.

    A ``data.source`` goes with the recipe's own ``data.root``: with another one it is None. Only types and key names
    are checked here; the recipe's ``validate`` checks the rules between keys. Raises UserError.
    """
    raw = read_yaml(Path(path))
    if deepspeed_config is not None:
        section = raw.get("deepspeed") or {}
        if not isinstance(section, Mapping):
            raise UserError(f"{path}: deepspeed: expected a mapping of keys, got {section!r}")
        raw["deepspeed"] = merged(section, read_yaml(Path(deepspeed_config)))
    own = str(_data(raw).get("root"))
    for override in overrides:
        _apply(raw, override, root)
    if (data := _data(raw)).get("source") is not None and Path(str(data.get("root"))) != Path(own):
        # Another data.root than the recipe's own is the user's to fill: a mistyped one must not be given other data.
        raw["data"] = {**data, "source": None}
    return from_dict(raw, root)


def _data(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    section = raw.get("data")
    return section if isinstance(section, Mapping) else {}


def from_dict(values: Any, cls: type[C], root: type | None = None, prefix: str = "") -> C:
    """Invert ``to_dict``; a key or section that is absent, and a section that is null, take their defaults.

    For a section, ``root`` is the whole configuration's type and ``prefix`` begins its keys. Raises UserError.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the config"
        raise UserError(f"{where}: expected a mapping of keys, got {described(values)}")
    kinds, made = get_type_hints(cls), {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in kinds:
            raise unknown(path, root or cls)
        kind = kinds[key]
        is_section = is_dataclass(kind)
        made[key] = from_dict(value, kind, root or cls, f"{path}.") if is_section else convert(value, kind, path)
    return cls(**made)


def to_dict(value: Any) -> Any:
    """Return a configuration as nested dicts of plain JSON types; tuples become lists."""
    if is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    return [to_dict(v) for v in value] if isinstance(value, (list, tuple)) else value


def to_yaml(config: Any) -> str:
    """Write out every key of the configuration as YAML text; ``load_config`` reads an equal configuration from it."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key written twice (in YAML the last one wins silently), and nested aliases that
    expand to more values than any recipe has."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0  # of the node being read
        self._count = 0  # nodes so far, where an alias counts as all the nodes that it stands for
        self._sizes: dict[yaml.Node | None, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, mark, before = self.check_event(yaml.AliasEvent), self.peek_event().start_mark, self._count
        self._depth += 1
        if self._depth > _MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._count += self._sizes.get(node, _MOST_VALUES) if alias else 1  # an alias of itself has no end
        if self._count > _MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_VALUES:,} values", mark)
        self._sizes.setdefault(node, self._count - before)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value!r} is written twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise yaml.YAMLError(f"the key {key!r} is written twice")
        values[key] = value
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file. UserError: it is missing, unreadable, malformed or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; name another, such as one of configs/") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read the config file: {e}") from None
    values = _parse(text, str(path), is_json=path.suffix == ".json")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    return values


def _parse(text: str, where: str, is_json: bool = False, is_file: bool = True) -> Any:
    """Parse a YAML or JSON text. The UserError for bad syntax, or a value that no setting can have, begins with
    ``where``."""
    try:
        values = json.loads(text, object_pairs_hook=_unique) if is_json else yaml.load(text, _Loader)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}, line {e.lineno}: not JSON: {e.msg}") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = (f", line {mark.line + 1}" if mark else "") if is_file else ": the value is not YAML"
        raise UserError(f"{where}{place}: {getattr(e, 'problem', None) or e}") from None
    except RecursionError:
        raise UserError(f"{where}: {_TOO_DEEP}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as e:  # such as 2024-13-01, which is no date
        why = str(e).partition(":")[0]
        raise UserError(f"{where}: a value is not what its form or tag says ({why}); quote it if it is text") from None
    _check_values(values, where)
    return values


def _check_values(values: Any, where: str) -> None:
    """Refuse values that would fail later, far from their place in the file."""
    left = [(values, 0)]
    while left:
        value, depth = left.pop()
        if depth > _MOST_LEVELS:
            raise UserError(f"{where}: {_TOO_DEEP}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{where}: a whole number is beyond 64 bits; write a smaller one")
        if isinstance(value, str) and not is_text(value):
            raise UserError(f"{where}: {value[:40]!r} holds NUL or half of a surrogate pair; remove it")
        if isinstance(value, dict):
            left += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple | set):
            left += [(part, depth + 1) for part in value]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``over``; where both hold a mapping, the two are merged in turn."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _apply(raw: dict[str, Any], override: str, root: type) -> None:
    """Set one ``a.b.c=value`` in the nested mapping ``raw``."""
    path, equals, text = override.partition("=")
    path = path.strip().removeprefix("--")
    parts = path.split(".")
    if not equals or not all(parts) or len(parts) > _MOST_LEVELS or not is_text(path):
        raise UserError(f"{override[:200]!r}: an override is written key=value, for example train.steps=100")
    kind: Any = root
    for part in parts:  # sections must exist; inside a free mapping (deepspeed, lr_scale) any name will do
        if get_origin(kind) is dict:
            break
        if not is_dataclass(kind) or part not in get_type_hints(kind):
            raise unknown(path, root)
        kind = get_type_hints(kind)[part]
    if is_dataclass(kind):
        keys = ", ".join(f"{path}.{key}" for key in get_type_hints(kind))
        raise UserError(f"{path}: is a section; set one of its keys: {keys}")
    value = _parse(text, f"{path}={text[:40]}", is_file=False)
    for i, part in enumerate(parts[:-1]):
        if raw.get(part) is None:
            raw[part] = {}
        raw = raw[part]
        if not isinstance(raw, dict):
            raise UserError(f"{'.'.join(parts[: i + 1])}: expected a mapping of keys, got {raw!r}")
    raw[parts[-1]] = value
