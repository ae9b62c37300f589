"""Download a model's tokenizer, config or weights from the HuggingFace hub (direction=download).

Credentials, proxies, HF_ENDPOINT and HF_HUB_OFFLINE come from the environment, as huggingface_hub reads them.
The files of one commit are listed first: a refusal is then told before anything is written, and every file
can be compared with the digest that the hub lists for it. huggingface_hub alone takes a folder that exists
for a finished download when the hub refuses.
"""

import glob
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dsv3.config.convert import Assets, ConvertConfig
from dsv3.distributed.directory_lock import DirectoryLock
from dsv3.errors import RunFailed, UserError, quoted
from dsv3.metrics.progress import Phase, phase
from dsv3.tokens.tokenizer_files import is_tokenizer_file
from dsv3.untrusted_files import open_file

_CONFIG = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "configuration_*.py",
    "modeling_*.py",
)

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")

_CHUNK = 1 << 20  # bytes that a digest reads at once

# huggingface_hub keeps its state of an unfinished download here, so that it can be resumed.
_RESUMABLE = Path(".cache") / "huggingface"

_PAGE = re.compile(r"(?:hf:(?://)?|https?://[^/]+/)?(?P<name>[^/]+/[^/]+?)(?:\.git|/tree/[^/]+)?/?")


def download(config: ConvertConfig) -> Path:
    """Download `assets` of `repo` into `output`, going on after a call that was cut off; compare digests.

    UserError for an output in use, for variables of the environment that cannot be used, and for a repository
    that is unknown, refused, not reached or without such files; RunFailed where the hub fails, the download
    breaks off, or a file is not what the hub lists.
    """
    _require_environment()
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ValueError as error:  # it reads its numbers out of the environment when it is imported
        raise _bad_setting(error) from None

    broken: Any = HfHubHTTPError.__bases__  # OSError, and the base of the HTTP client's errors
    output = Path(config.output or "")
    if output.is_file():
        raise UserError(f"output={output} is a file: name a directory")
    if output.is_dir() and any(output.iterdir()) and not (output / _RESUMABLE).is_dir():
        raise UserError(f"output={output} is not empty: name a new directory")
    repo = _name(str(config.repo))
    commit, listed = _list(repo, config)
    files = [file for file in listed if _is_wanted(file.path, config.assets)]
    outside = [file.path for file in files if ".." in Path(file.path).parts or Path(file.path).is_absolute()]
    if outside:
        raise UserError(
            f"repo={config.repo} is refused: {quoted(outside[0])} would lie outside of output={output}"
        )
    if not files:
        other = sorted({Path(file.path).suffix for file in listed} & {".bin", ".pt", ".pth", ".gguf", ".h5"})
        hint = f"; its weights are in {', '.join(other)} files, which dsv3 does not read" if other else ""
        raise UserError(f"repo={config.repo} has no files for assets={config.assets.name}{hint}")
    lock = DirectoryLock(output / _RESUMABLE, f"output={output}", "being downloaded into", stays=False)
    try:
        with lock, phase(f"downloading {repo}") as work:
            snapshot_download(
                repo,
                revision=commit,
                allow_patterns=[glob.escape(file.path) for file in files],
                local_dir=output,
                endpoint=_endpoint(),
                tqdm_class=_counting_bar(work),
            )
    except broken as error:
        # The files of a gated repository are refused one by one; the library may call that no connection.
        for each in (error, error.__cause__):
            if isinstance(each, HfHubHTTPError):
                raise _refusal(each, config) from None
        raise RunFailed(f"the download broke off, the same command goes on: {_lines(error)}") from None
    _compare(output, files)
    return output


def _name(repo: str) -> str:
    """Return OWNER/NAME of a repository that may be given by its page, or behind hf: as elsewhere."""
    found = _PAGE.fullmatch(repo)
    return found["name"] if found else repo


_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def _require_environment() -> None:
    """Raise UserError, by name, for a variable of the environment that no request could be made with.

    Secrets are not repeated: a token, and a proxy's address, which may have a password in it.
    """
    named = next((name for name in _TOKENS if os.environ.get(name)), "")  # the first one counts
    token = re.sub(r"[\r\n]", "", os.environ.get(named, "")).strip()  # as huggingface_hub does
    wrong = next((each for each in token if not "!" <= each <= "~"), None)
    if wrong is not None:
        place = token.index(wrong) + 1
        raise UserError(
            f"{named} is no token: its character {place} is {quoted(wrong)}, and a token has letters, digits "
            "and _ alone; copy it anew from the settings of your account, or unset it"
        )
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is not None and not _is_address(endpoint, "https", "http"):
        raise UserError(
            f"HF_ENDPOINT={quoted(endpoint)} is no address of a hub: give one that begins with https:// or "
            "http://, or unset it for huggingface.co"
        )
    for name in (*_PROXIES, *(each.lower() for each in _PROXIES)):
        proxy = os.environ.get(name)
        address = proxy if not proxy or "://" in proxy else f"http://{proxy}"
        if address and not _is_address(address, "https", "http", "socks5", "socks5h"):
            raise UserError(f"{name} is no address of a proxy: give one like http://HOST:PORT, or unset it")


def _is_address(text: str, *schemes: str) -> bool:
    """Return whether a text is a URL with one of `schemes`, a host, and a port that there can be."""
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and text.split() == [text]
    except ValueError:
        return False


def _bad_setting(error: ValueError) -> UserError:
    """Return the error for a value that huggingface_hub or its HTTP client does not take."""
    what = "a variable of the environment (HF_*, *_PROXY) or the token of hf auth login is no possible value"
    return UserError(f"the hub cannot be asked: {what}: {_lines(error)}")


def _endpoint() -> str | None:
    """Return the address of the hub where it is another one than huggingface_hub's default."""
    return os.environ.get("HF_ENDPOINT") or None


def _list(repo: str, config: ConvertConfig) -> tuple[str, list[Any]]:
    """Return the commit that `revision` means, and huggingface_hub's entries of all its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    unreached: Any = HfHubHTTPError.__bases__  # OSError, and the base of the HTTP client's errors
    api, given = HfApi(endpoint=_endpoint()), f"repo={config.repo}"
    try:
        with phase(f"listing {repo}"):
            commit = str(api.model_info(repo, revision=config.revision).sha)
            entries = api.list_repo_tree(repo, recursive=True, revision=commit)
            return commit, [entry for entry in entries if hasattr(entry, "blob_id")]  # the others are folders
    except HFValidationError as error:
        raise UserError(f"{given} is no repository name: {_lines(error)}") from None
    except RevisionNotFoundError:
        raise UserError(
            f"{given} has no revision={config.revision}: give a branch, tag or commit of it"
        ) from None
    except HfHubHTTPError as error:
        raise _refusal(error, config) from None
    except OfflineModeIsEnabled:
        raise UserError(f"{given} cannot be reached: HF_HUB_OFFLINE is set") from None
    except unreached as error:
        raise UserError(
            f"{given} cannot be reached, there is no connection to {api.endpoint}: {_lines(error)}"
        ) from None
    except ValueError as error:
        raise _bad_setting(error) from None


def _refusal(error: Any, config: ConvertConfig) -> UserError | RunFailed:
    """Return what an answer of the hub other than the file means: its own fault, or that of the request."""
    status = error.response.status_code
    if status >= 500 or status == 429:
        told = f"the hub fails (HTTP {status}), the same command may work later"
        return RunFailed(f"repo={config.repo}: {told}: {_lines(error)}")
    login = " (HF_TOKEN, or hf auth login, says who you are)" if status in (401, 403) else ""
    return UserError(f"repo={config.repo} is refused (HTTP {status}): {_lines(error)}{login}")


def _is_wanted(path: str, assets: Assets) -> bool:
    """Return whether a file belongs to `assets`; of those in folders only templates do, but for all."""
    if assets is Assets.all:
        return True
    if assets is Assets.tokenizer:
        return is_tokenizer_file(path) and ("/" not in path or path.startswith("additional_chat_templates/"))
    patterns = (*_CONFIG, *_WEIGHTS) if assets is Assets.weights else _CONFIG
    return "/" not in path and any(fnmatchcase(path, pattern) for pattern in patterns)


def _compare(output: Path, files: list[Any]) -> None:
    """Compare every file with the size and digest that the hub lists; remove bad ones and raise RunFailed.

    A thread per file reads 1 MiB at a time.
    """
    total = sum(file.size for file in files)
    with phase("comparing digests", total, "bytes") as work, ThreadPoolExecutor(os.cpu_count()) as threads:
        sound = list(threads.map(lambda file: _is_sound(output / file.path, file, work), files))
    bad = [file.path for file, is_sound in zip(files, sound, strict=True) if not is_sound]
    for name in bad:
        (output / name).unlink(missing_ok=True)
    if bad:
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        what = f"{output / bad[0]}{more} did not have the digest that the hub lists, and is removed"
        raise RunFailed(f"{what}: the same command fetches it again")


def _is_sound(path: Path, listed: Any, work: Phase) -> bool:
    """Return whether a file has the SHA-256 of its LFS entry, or else git's digest."""
    size = listed.lfs.size if listed.lfs else listed.size
    if not path.is_file() or path.stat().st_size != size:
        return False
    digest = hashlib.sha256() if listed.lfs else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open_file(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            work.advance(len(chunk))
    wanted: str = listed.lfs.sha256 if listed.lfs else listed.blob_id
    return digest.hexdigest() == wanted


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


def _lines(error: BaseException) -> str:
    """Return the words of the hub in one line of at most 600 characters, without the request's number."""
    lines = [line.strip() for line in str(error).splitlines()]
    idle = re.compile(r"\d+ \w+ Error|.*Request ID|For more information check: |$")
    return " ".join(line for line in lines if not idle.match(line))[:600] or type(error).__name__
