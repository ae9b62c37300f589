"""Download a model's tokenizer, config or weights from the HuggingFace hub (direction=download)."""

from pathlib import Path
from typing import Any

from dsv3.config.convert import Assets, ConvertConfig
from dsv3.errors import RunFailed, UserError
from dsv3.metrics.progress import Phase, phase

_PATTERNS = {
    Assets.tokenizer: ["tokenizer*", "special_tokens_map.json", "*tiktoken*", "vocab*", "merges*"],
    Assets.config: ["config.json", "generation_config.json"],
    Assets.weights: ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"],
}

# huggingface_hub keeps its state of an unfinished download here, so that it can be resumed.
_RESUMABLE = Path(".cache") / "huggingface"


def download(config: ConvertConfig) -> Path:
    """Download `assets` of `repo` into `output`, going on where an earlier call was cut off.

    Credentials, proxies and HF_HUB_OFFLINE come from the environment, as huggingface_hub reads them.
    UserError for an output in use, an unknown repository or no connection; RunFailed when it breaks off.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    output = Path(config.output or "")
    if output.is_file():
        raise UserError(f"output={output} is a file: name a directory")
    if output.is_dir() and any(output.iterdir()) and not (output / _RESUMABLE).is_dir():
        raise UserError(f"output={output} is not empty: name a new directory")
    try:
        with phase(f"downloading {config.repo}") as work:
            snapshot_download(
                str(config.repo),
                revision=config.revision,
                allow_patterns=_PATTERNS[config.assets],
                local_dir=output,
                tqdm_class=_counting_bar(work),
            )
    except HFValidationError as error:
        raise UserError(f"repo={config.repo} is no repository name: {_first_line(error)}") from None
    except LocalEntryNotFoundError:
        why = "there is no connection, or HF_HUB_OFFLINE is set"
        raise UserError(f"repo={config.repo} cannot be reached: {why}") from None
    except HfHubHTTPError as error:
        raise UserError(f"repo={config.repo} is refused: {_first_line(error)}") from None
    except OSError as error:
        raise RunFailed(f"the download broke off, the same command goes on: {_first_line(error)}") from None
    if not any(path.is_file() for path in output.glob("*")):
        raise UserError(f"repo={config.repo} has no files for assets={config.assets.name}")
    return output


def _counting_bar(work: Phase) -> Any:
    """Return the class of a progress bar that shows nothing and tells `work` its bytes.

    huggingface_hub has a bar for the number of files and, depending on its version, some for bytes (received,
    written): the one that is ahead counts.
    """
    from huggingface_hub import utils

    base: Any = utils.tqdm  # type: ignore[attr-defined]  # public, but not in __all__

    class Bar(base):  # type: ignore[misc]
        """A bar that is not shown."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})
            self.counts_bytes = settings.get("unit") == "B"
            self.bytes_done = 0

        def update(self, n: float | None = 1) -> Any:
            """Count `n` more, as bytes if this is a bar for bytes."""
            if self.counts_bytes:
                self.bytes_done += int(n or 0)
                if self.bytes_done >= work.done:
                    work.done, work.total = self.bytes_done, int(self.total or 0) or None
            return super().update(n)

    return Bar


def _first_line(error: Exception) -> str:
    """Return the first line of a message, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
