"""A YAML file as a pydantic model, with errors that say where, what was found there and what would work."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, model: type[Model]) -> Model:
    """The content of `path` as a `model`; ValueError with a line for each fault, naming the file and the dotted key."""
    try:
        content = yaml.load(path.read_text("utf-8"), _OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_explain(item, model, content)}" for item in error.errors())) from error


class _OnceLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            problem = f"the key {twice[0]!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _explain(error: Any, root: type[BaseModel], content: Any) -> str:
    path, keys, inside = _locate(error["loc"], root, content)
    where, found, kind = ".".join(path) or "the file", error["input"], error["type"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {_nearest(path[-1], keys)}"
    if kind == "missing":
        return f"{where}: this key is missing"
    if kind == "union_tag_not_found":
        return f"{where}.name: this key is missing; one of {_names(inside)}"
    if kind == "union_tag_invalid":
        return f"{where}.name: unknown; {_nearest(str(found['name']), _names(inside))}"
    if kind in ("model_type", "model_attributes_type"):
        known = list(dict.fromkeys(key for model in inside for key in model.model_fields))
        return f"{where}: should be a mapping with keys of {known}, found {found!r}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where}: {message}" + ("" if kind == "value_error" else f", found {found!r}")


def _nearest(word: str, known: list[str]) -> str:
    return f"did you mean {get_close_matches(word, known, n=1, cutoff=0.0)[0]!r}? (known here: {', '.join(known)})"


def _locate(
    loc: tuple[int | str, ...], root: type[BaseModel], content: Any
) -> tuple[list[str], list[str], list[type[BaseModel]]]:
    """The keys that lead to an error, the keys known at the last of them, and the models that may stand there.

    `loc` also has what pydantic adds: the tag of a discriminated union, for a union of scalars its member, and the
    place in a list where the file has a single value in its stead.
    """
    path, keys, models = [], list(root.model_fields), [root]
    for part in loc:
        tagged = [model for model in models if part in _names([model])]
        if isinstance(part, int):
            if isinstance(content, list):
                path.append(str(part))
                content = content[part]
        elif len(models) > 1 and tagged:
            models = tagged
        elif models:
            keys = list(dict.fromkeys(key for model in models for key in model.model_fields))
            path.append(part)
            models = [child for model in models for child in _models(_annotation(model, part))]
            content = content.get(part) if isinstance(content, dict) else None
    return path, keys, models


def _names(models: list[type[BaseModel]]) -> list[str]:
    return [name for model in models for name in get_args(_annotation(model, "name"))]


def _annotation(model: type[BaseModel], key: str) -> Any:
    return model.model_fields[key].annotation if key in model.model_fields else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Annotated, Union, UnionType, list):
        return [model for part in get_args(annotation) for model in _models(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
