"""Let Hydra read a user's presets under the limits of untrusted_files.py.

Hydra reads every YAML file of --config-dir that a command composes, by a class of its own for `file://`. A
preset may be a stranger's, and a few aliases in it stand for more values than memory holds. Every file
outside of conf/ is looked at first.
"""

import os
from pathlib import Path
from typing import ClassVar

from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydraSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult

from dsv3.untrusted_files import require_bounded_yaml


class FileConfigSource(HydraSource):
    """Hydra's source of files. It has the name of the class that it replaces, which Hydra tells it by."""

    own: ClassVar[Path | None] = None
    """The folder of dsv3's own files, which are read as they are; None where a sweep has unpickled it."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a file holds; BadFile for one that passes the limits."""
        file = Path(os.path.realpath(Path(self.path) / self._normalize_file_name(config_path)))
        if file.exists() and not (self.own and file.is_relative_to(self.own)):
            here = Path.cwd()  # messages name a file as one would type it
            require_bounded_yaml(file.relative_to(here) if file.is_relative_to(here) else file)
        return super().load_config(config_path)


def bound_presets(own: Path) -> None:
    """Make the source known to Hydra 1.3, whose plugins cannot replace one of its own.

    `own` is conf/ of dsv3.
    """
    FileConfigSource.own = own.resolve()
    SourcesRegistry.instance().types[HydraSource.scheme()] = FileConfigSource
