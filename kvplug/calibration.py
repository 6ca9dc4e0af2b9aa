"""A small file per model, what `kvplug calibrate` has measured of it: written and read.

A safetensors file. Each stage that learns from it has a section of its own, tensors called
`SECTION.NAME`. Its metadata has one entry, JSON: the format, what kind of model it is of, its name,
and what text it was measured on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import atomic
from .errors import SpecError
from .facts import difference, facts

if TYPE_CHECKING:
    import os

    from torch import Tensor
    from transformers import PreTrainedConfig

FORMAT = 1  # another where names or meanings change
ENTRY = "kvplug"  # of the metadata
HINT = "`kvplug calibrate --model MODEL --out FILE` writes one"


def write(
    path: str | os.PathLike,
    tensors: dict[str, Tensor],
    config: PreTrainedConfig,
    about: dict[str, Any],
) -> None:
    """Write a calibration, in the place of the one that is there, in one step.

    Args:
        path: of the file; its folder must exist.
        tensors: by `SECTION.NAME`.
        config: of the model that was measured.
        about: how, in JSON's types.
    """
    of = {"format": FORMAT, "model": facts(config), "name": config.name_or_path}
    data = save(
        {name: x.contiguous().cpu() for name, x in tensors.items()}, {ENTRY: json.dumps(of | about)}
    )
    atomic.write(Path(path), data)


def read(path: str | os.PathLike, config: PreTrainedConfig, section: str) -> dict[str, Tensor]:
    """The tensors of one section, by NAME, for a model of this config; weights are not compared.

    Raises SpecError where there is no such file, of this format and kind of model, or it lacks the
    section, and why if that could not be measured.
    """
    said = f"calibration={str(path)!r}"
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[ENTRY])
            names = [name for name in file.keys() if name.startswith(f"{section}.")]  # noqa: SIM118
            found = {name.removeprefix(f"{section}."): file.get_tensor(name) for name in names}
        version, theirs = about["format"], about["model"]
        why = dict(about.get("unmeasured", {})).get(section)
    except OSError as e:
        raise SpecError(f"{said}: {e}; {HINT}") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise SpecError(
            f"{said} is not what kvplug calibrate has written ({e!r}); {HINT}"
        ) from None
    if version != FORMAT:
        raise SpecError(f"{said} has format {version!r}, this kvplug reads {FORMAT}; {HINT}")
    mine = facts(config)
    if what := difference(theirs, mine):
        raise SpecError(
            f"{said} is of {about.get('name')!r}, whose {what} is {theirs.get(what)!r}, and the "
            f"{what} of {config.name_or_path or type(config).__name__!r} is {mine[what]!r}; {HINT}"
        )
    if not found:
        raise SpecError(f"{said} has nothing on {section}: {why or HINT}")
    return found
