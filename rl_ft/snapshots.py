"""Weights kept on the way: those whose mean is the model that a run leaves, and the best checked.

Single versions of a policy in training differ by chance; their mean does less so (Izmailov et al.
2018, "Averaging weights leads to wider optima and better generalization"). Full tensors in files,
so a resumed run, or one that trains an adapter, leaves the same mean.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rl_ft.sections import GrpoConfig

if TYPE_CHECKING:
    from torch import Tensor


def is_averaged(version: int, grpo: GrpoConfig) -> bool:
    """Whether a version is one of those whose mean is left; so is the last, whichever that is."""
    is_late = version >= round(grpo.average_from * grpo.max_steps)
    return is_late and version % grpo.save_steps == 0


class Snapshots:
    """Versions of the weights in a folder, one file each.

    Example:
        kept = Snapshots(folder)
        kept.add(60, weights)
        kept.rewind(59)   # 60 will be made anew
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def versions(self) -> list[int]:
        """What is kept, in order."""
        return sorted(int(file.stem) for file in self._folder.glob("[0-9]*.safetensors"))

    def add(self, version: int, state_dict: Mapping[str, Tensor]) -> None:
        """Keep a version; the file appears whole or not at all."""
        from safetensors.torch import save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{version}.partial"
        # Tied tensors are one storage under two names, which safetensors refuses.
        save_file({name: tensor.clone() for name, tensor in state_dict.items()}, partial)
        partial.replace(self._file(version))

    def rewind(self, version: int) -> None:
        """Forget what came after a version."""
        self.keep_only([kept for kept in self.versions() if kept <= version])

    def get(self, version: int) -> dict[str, Tensor]:
        """The weights of a version that is kept."""
        from safetensors.torch import load_file

        return load_file(self._file(version))

    def keep_only(self, versions: Collection[int]) -> None:
        """Forget all others."""
        for version in set(self.versions()) - set(versions):
            self._file(version).unlink()

    def mean(self) -> dict[str, Tensor]:
        """The mean of all versions, tensor by tensor.

        As a running mean: that of equal tensors is the tensor itself, to the last bit.

        Raises:
            ValueError: nothing was kept.
        """
        means: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}
        for count, version in enumerate(self.versions(), start=1):
            last = self.get(version)
            for name, tensor in last.items():
                mean = means.setdefault(name, tensor.float())
                means[name] = mean + (tensor.float() - mean) / count
        if not means:
            raise ValueError(f"no weights were kept in {self._folder}")
        return {name: mean.to(last[name].dtype) for name, mean in means.items()}

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, version: int) -> Path:
        return self._folder / f"{version}.safetensors"
