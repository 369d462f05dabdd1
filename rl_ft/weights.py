"""A version of the policy on its way from the learner to a sampler, verified on arrival.

What travels are the full, merged tensors, or those of an adapter, as numpy arrays under one digest;
how they travel is the caller's `put` and `get` (Ray's object store). Model folders are read and
written here too. This module keeps no copy and no history.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from envs.errors import UserError
from rl_ft.merging import merge
from rl_ft.run_folder import appearing
from rl_ft.types import WeightsRef

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Shape = tuple[int, ...]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


class WeightsError(Exception):
    """A version of the weights is incomplete, altered or gone; nothing may be sampled with it."""


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """Hash over names, dtypes, shapes and bytes of all tensors, whatever their order."""
    return _digest(_as_arrays(state_dict))


def publish(
    state_dict: Mapping[str, Tensor],
    version: int,
    put: Callable[[object], object],
    *,
    base: str | None = None,
) -> WeightsRef:
    """Hand the tensors to `put` (for example `ray.put`) and name what was handed over.

    With `base` they are an adapter of the model in that folder, which every reader must see.
    """
    arrays = _as_arrays(state_dict)
    return WeightsRef(version=version, digest=_digest(arrays), payload=put(arrays), base=base)


def fetch(ref: WeightsRef, get: Callable[[object], object]) -> dict[str, Tensor]:
    """All tensors of a published version; WeightsError unless what came is what was published.

    They may be views of read-only shared memory: load them, do not write to them.
    """
    import torch

    try:
        arrays = get(ref.payload)
    except Exception as error:
        raise WeightsError(f"weights version {ref.version} cannot be fetched: {error}") from error
    if not isinstance(arrays, Mapping):
        raise WeightsError(f"weights version {ref.version} is missing: got {type(arrays).__name__}")
    if (came := _digest(arrays)) != ref.digest:
        raise WeightsError(
            f"weights version {ref.version} arrived altered: expected digest {ref.digest[:12]}, "
            f"got {came[:12]}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensors = {
            name: torch.from_numpy(array).view(getattr(torch, dtype))
            for name, (dtype, array) in arrays.items()
        }
    return tensors if ref.base is None else merge(_base(ref.base), tensors)


@lru_cache(maxsize=1)
def _base(model_path: str) -> dict[str, Tensor]:
    return read_folder(model_path)


def save_folder(state_dict: Mapping[str, Tensor], like: str | Path, directory: str | Path) -> None:
    """Write the tensors as a Hugging Face folder with the configuration and tokenizer of another.

    It appears whole or not at all. A head that is tied to the embeddings is left out, as
    `save_pretrained` does.
    """
    from safetensors.torch import save_file

    check_complete({n: tuple(t.shape) for n, t in state_dict.items()}, checkpoint_shapes(like))
    source = Path(like)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tied = settings.get("tie_word_embeddings", False)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in state_dict.items()
        if not (tied and name == HEAD)
    }
    others = shutil.ignore_patterns("*.safetensors*", "sft.json")
    with appearing(Path(directory)) as partial:
        shutil.copytree(source, partial, ignore=others, dirs_exist_ok=True)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})


def read_folder(model_path: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder; a tied head is there as the embeddings it equals."""
    from safetensors.torch import load_file

    expected = checkpoint_shapes(model_path)
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(model_path).glob("*.safetensors")):
        tensors |= load_file(file)
    if HEAD in expected:
        tensors.setdefault(HEAD, tensors[EMBEDDINGS])
    return tensors


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of all numbers of two models with the same tensors; 0.0 if and only if they are equal."""
    return max(
        (tensor.double() - other[name].double()).abs().max().item() for name, tensor in one.items()
    )


def checkpoint_shapes(model_path: str | Path) -> dict[str, Shape]:
    """Name and shape of every tensor of a model folder, read from the safetensors headers.

    The output head is listed even where it is tied to the embeddings and not in the file.
    """
    folder = Path(model_path)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise UserError(
            f"Expected a model folder with config.json and *.safetensors, but {str(folder)!r} is "
            "not one: give the folder that save_pretrained wrote."
        )
    shapes: dict[str, Shape] = {}
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    if EMBEDDINGS in shapes:
        shapes.setdefault(HEAD, shapes[EMBEDDINGS])
    return shapes


def check_complete(came: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """WeightsError unless the names and shapes are exactly the expected ones."""
    missing = sorted(expected.keys() - came.keys())
    unknown = sorted(came.keys() - expected.keys())
    differ = sorted(name for name in expected.keys() & came.keys() if came[name] != expected[name])
    if missing or unknown:
        raise WeightsError(
            f"the weights must have exactly the {len(expected)} tensors of the checkpoint: "
            f"{_first(missing)} missing, {_first(unknown)} unknown (send the full state_dict of "
            "the unwrapped model with adapters merged)"
        )
    if differ:
        name = differ[0]
        raise WeightsError(
            f"{len(differ)} weights have another shape than in the checkpoint: {name} came as "
            f"{came[name]}, expected {expected[name]}"
        )


def _first(names: list[str]) -> str:
    return f"{len(names)} ({names[0]}, ...)" if names else "none"


def _as_arrays(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[str, np.ndarray]]:
    """Tensors as (dtype, array); bfloat16 and the like travel as integers of the same width."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    for name, tensor in state_dict.items():
        plain = tensor.detach().cpu().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        arrays[name] = (dtype, plain.view(integers[plain.element_size()]).numpy())
    return arrays


def _digest(arrays: Mapping[str, tuple[str, np.ndarray]]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        dtype, array = arrays[name]
        total.update(f"{name} {dtype} {array.shape}\n".encode())
        total.update(memoryview(array).cast("B") if array.size else b"")
    return total.hexdigest()
