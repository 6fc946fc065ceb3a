"""Uploading a finished run's adapter to the hub."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from fvae_lora_experiments.card import HERE, MARKER, card, on_hub
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.archive import tells_where
from fvae_lora_experiments.run.folder import RunFolder


@dataclass(frozen=True)
class Upload:
    """What is uploaded: files by name, each as a local path or as its contents."""

    repository: str
    files: dict[str, Path | bytes]
    base_is_local: bool
    """Whether the base model has no name on the hub, so that others cannot fetch it."""

    def sizes(self) -> dict[str, int]:
        """The size of each file, in bytes."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}


def collect(path: Path, repository: str) -> Upload:
    """Collects what to upload of the run in `path`; the card in its README then names `repository` as the adapter.

    Text of the card that was edited by hand is kept.

    Raises:
        UserError: no finished run, or no adapter; a name other than OWNER/NAME; a file that reveals where the run was
            done.
    """
    _check_name(repository)
    folder = RunFolder(path)
    record = folder.read()
    if record is None or record.state != "complete":
        raise UserError(f"{path}: no finished run" + ("" if record is None else f"; its state is {record.state}"))
    if not any(folder.adapter.glob("*.safetensors")):
        raise UserError(f"{path}: the run has no adapter to push")
    files: dict[str, Path | bytes] = {
        file.name: file for file in sorted(folder.adapter.iterdir()) if file.is_file() and file.name[0] != "."
    }
    readme = folder.adapter / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if MARKER not in text:  # written by an earlier version or by peft
        text = card(record, folder.adapter)
    files["README.md"] = text.replace(HERE, f"adapter = {json.dumps(repository)}").encode()
    for name, file in files.items():
        _refuse_places(folder.adapter / name, file)
    return Upload(repository, dict(sorted(files.items())), not on_hub(record.recipe.get("model")))


def upload(what: Upload, public: bool) -> str:
    """Creates the repository if it does not exist, and uploads all files in one commit.

    Returns:
        The repository's address.

    Raises:
        UserError: nobody is logged in; the hub refuses or cannot be reached; the repository is public although `public`
            is False.
    """
    api, repository = HfApi(), what.repository
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise UserError(f"{repository}: is already public; give --public to upload to it")
        operations = [CommitOperationAdd(name, file) for name, file in what.files.items()]
        api.create_commit(repository, operations, commit_message="Adapter and model card")
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repository}: not logged in to the hub; run hf auth login") from error
    except HfHubHTTPError as error:
        said = error.server_message or str(error).strip().partition("\n")[0]
        raise UserError(f"{repository}: the hub refused ({error.response.status_code}): {said}") from error
    except (HTTPError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{repository}: the hub cannot be reached: {reason}") from error
    return str(made)


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: not the name of a repository; expected OWNER/NAME") from error
    if repository.count("/") != 1:
        raise UserError(f"{repository}: not the name of a repository; expected OWNER/NAME")


def _refuse_places(path: Path, file: Path | bytes) -> None:
    """Raises a `UserError` if a file reveals a path, a host or a user; of weights, the metadata is checked."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np") as weights:
                text = json.dumps(weights.metadata() or {}, indent=1)
        except SafetensorError as error:
            raise UserError(f"{path}: not readable as safetensors: {error}") from error
    else:
        text = (file if isinstance(file, bytes) else file.read_bytes()).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        for part in (line.strip(), *line.split('"')):  # a path starts a line or a quoted string
            if tells_where(part):
                raise UserError(f"{path}: line {number}: {part.strip()!r} reveals where the run was done")
