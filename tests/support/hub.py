"""A stand-in for the model and data hub: the part of its HTTP interface that `datasets` and `transformers` use."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pil

from arguments import later_wins
from sentences import sentences

PROGRAM = "import sys; from fvae_lora_experiments.__main__ import main; sys.argv[0] = 'fvae-lora'; main()"
SMALL = ("train.epochs=1", "train.batch_size=8", "train.precision=fp32", "adapter.r=4")
"""What makes a recipe of the benchmark take a second."""

READ_ONLY = "hf_read_only"
"""A token that may not write."""

SIDE = 8
MODEL = "google/vit-base-patch16-224-in21k"
EXTRA = ("contrast", "gaussian_noise")
"""Corrupted copies of the test split, which a benchmark must not mistake for anything."""

CLASSES = {
    "tanganke/dtd": ["banded", "dotted", "woven"],
    "tanganke/eurosat": ["annual crop land", "forest", "river"],
    "tanganke/gtsrb": ["stop", "yield", "turn left ahead"],
    "tanganke/resisc45": ["airplane", "airport", "beach"],
    "tanganke/sun397": ["abbey", "airport terminal", "alley"],
    "ufldl-stanford/svhn": ["0", "1", "2"],
}
SPLITS = dict.fromkeys(CLASSES, ("train", "test")) | {
    "tanganke/eurosat": ("train", "test", *EXTRA),
    "ufldl-stanford/svhn": ("train", "test", "extra"),
}
PER_CLASS = {"train": 10, "test": 4}

ENCODER = "FacebookAI/roberta-base"
GLUE = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": (("sentence",), ("negative", "positive")),
    "stsb": (("sentence1", "sentence2"), ()),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
"""Columns and classes of each configuration; STS-B has numbers instead."""


class Hub:
    """Repositories in a folder: `models/OWNER/NAME` and `datasets/OWNER/NAME`.

    `asked` lists the paths that were asked for, in order; `private` the repositories that were made so. Whoever has a
    token may write, but for `READ_ONLY`. `refuses` has a status for each action that is refused whoever asks: `create`,
    `preupload`, `commit`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[str] = []
        self.private: set[str] = set()
        self.refuses: dict[str, int] = {}
        self.address = ""

    def environment(self, home: Path) -> dict[str, str]:
        """What makes the clients ask here, and keep what they get in `home`."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    @contextlib.contextmanager
    def serving(self) -> Iterator[Hub]:
        """Answers on a free port of the loopback device."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def write_data_sets(folder: Path) -> None:
    """All six data sets of the benchmark, tiny, under their names, with their columns and splits."""
    for seed, (name, classes) in enumerate(CLASSES.items()):
        place = folder / "datasets" / name / ("cropped_digits" if "svhn" in name else "data")
        place.mkdir(parents=True)
        for split in SPLITS[name]:
            _pictures(classes, split, seed).to_parquet(place / f"{split}-00000-of-00001.parquet")
    files = "".join(f"    - split: {s}\n      path: cropped_digits/{s}-*\n" for s in SPLITS["ufldl-stanford/svhn"])
    splits = "".join(
        f"  - name: {s}\n    num_bytes: 1\n    num_examples: {3 * PER_CLASS.get(s, 4)}\n"
        for s in SPLITS["ufldl-stanford/svhn"]
    )
    card = (
        f"---\ndataset_info:\n- config_name: cropped_digits\n  splits:\n{splits}"
        f"configs:\n- config_name: cropped_digits\n  data_files:\n{files}---\n"
    )
    (folder / "datasets/ufldl-stanford/svhn/README.md").write_text(card)


def write_glue(folder: Path) -> None:
    """GLUE, tiny, under its name, with the columns, splits and absent test labels of its real tables."""
    place = folder / "datasets" / "nyu-mll" / "glue"
    configs, infos = "", ""
    for config, (columns, classes) in GLUE.items():
        (place / config).mkdir(parents=True)
        configs += f"- config_name: {config}\n  data_files:\n"
        infos += f"- config_name: {config}\n  splits:\n"
        for seed, (split, per_class) in enumerate({"train": 20, "validation": 6, "test": 3}.items()):
            rows = _texts(columns, classes, per_class, seed, known=split != "test")
            rows.to_parquet(place / config / f"{split}-00000-of-00001.parquet")
            configs += f"  - split: {split}\n    path: {config}/{split}-*\n"
            infos += f"  - name: {split}\n    num_bytes: 1\n    num_examples: {len(rows)}\n"
    (place / "README.md").write_text(f"---\ndataset_info:\n{infos}configs:\n{configs}---\n")


def _texts(columns: tuple[str, ...], classes: tuple[str, ...], per_class: int, seed: int, known: bool) -> Dataset:
    """The first text tells the label: its class, or a number below or above the middle."""
    labels = np.repeat([0, 1], per_class)
    first = [*sentences(0, per_class, seed), *sentences(1, per_class, seed)]
    texts = [first, sentences(0, 2 * per_class, seed + 10)][: len(columns)]
    numbers = labels if classes else 1.0 + 2.5 * labels + np.random.default_rng(seed).random(len(labels))
    features = {column: Value("string") for column in columns}
    features |= {"label": ClassLabel(names=list(classes)) if classes else Value("float32"), "idx": Value("int32")}
    answers = (numbers if known else np.full(len(labels), -1)).tolist()
    rows = dict(zip(columns, texts, strict=True)) | {"label": answers, "idx": list(range(len(labels)))}
    return Dataset.from_dict(rows, features=Features(features))


def _pictures(classes: list[str], split: str, seed: int) -> Dataset:
    noise = np.random.default_rng([seed, *split.encode()])
    labels = [label for label in range(len(classes)) for _ in range(PER_CLASS.get(split, 4))]
    images = []
    for label in labels:
        colour = np.full(3, 40) + 160 * np.eye(3)[label]
        pixels = np.clip(noise.normal(colour, 60, (SIDE, SIDE, 3)), 0, 255).astype("uint8")
        png = io.BytesIO()
        Pil.fromarray(pixels).save(png, "png")
        images.append({"bytes": png.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


class _Handler(BaseHTTPRequestHandler):
    """`/api/KIND/REPO[/revision/..|/tree/..]` describes a repository, `/[datasets/]REPO/resolve/../FILE` is a file.

    To write, `/api/repos/create` makes one, `/api/models/REPO/commit/..` puts files into it.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: object):
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(path)
        api = path.startswith("api/")
        parts = path.removeprefix("api/").split("/")
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repository, rest = self.hub.folder / kind / "/".join(parts[:2]), parts[2:]
        if not repository.is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif api:
            self._describe(repository, rest)
        elif rest[:1] == ["resolve"]:
            self._file(repository, "/".join(rest[2:]))
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b"".join(self._chunks())
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "api/validate-yaml":
            return self._answer(200, b'{"errors": [], "warnings": []}')
        if token in ("", READ_ONLY):
            return self._answer(401 if not token else 403, b'{"error": "You have no right to write here"}')
        for action, status in self.hub.refuses.items():
            if f"/{action}" in path:
                return self._answer(status, b'{"error": "Not today"}')
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if not (folder := self.hub.folder / "models" / name).exists():
                folder.mkdir(parents=True)
                is_private = asked.get("visibility") == "private" or asked.get("private")
                self.hub.private |= {name} if is_private else set()
                return self._answer(200, json.dumps({"url": f"{self.hub.address}/{name}"}).encode())
            return self._answer(409, json.dumps({"error": "exists", "url": f"{self.hub.address}/{name}"}).encode())
        _, _, owner, name, action, _ = path.split("/")
        repository = self.hub.folder / "models" / owner / name
        if action == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, json.dumps({"files": modes}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                (repository / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
        commit = {"commitUrl": f"{self.hub.address}/{owner}/{name}/commit/1", "commitOid": _commit(repository)}
        return self._answer(200, json.dumps(commit | {"pullRequestUrl": None}).encode())

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _describe(self, repository: Path, rest: list[str]) -> None:
        files = sorted(p for p in repository.rglob("*") if p.is_file())
        if rest[:1] == ["tree"]:
            under = repository / "/".join(rest[2:])
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            found = [_entry(p, repository) for p in sorted(under.rglob("*") if deep else under.glob("*"))]
            if not found:
                return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self._answer(200, json.dumps(found).encode())
        if rest and rest[0] not in ("revision",):
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        about = {
            "id": "/".join(repository.parts[-2:]),
            "sha": _commit(repository),
            "private": "/".join(repository.parts[-2:]) in self.hub.private,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": p.relative_to(repository).as_posix()} for p in files],
        }
        return self._answer(200, json.dumps(about).encode())

    def _file(self, repository: Path, name: str) -> None:
        commit = {"X-Repo-Commit": _commit(repository)}
        file = repository / name
        if not file.is_file():
            return self._answer(404, b"", commit | {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        return self._answer(200, content, commit | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def _entry(path: Path, repository: Path) -> dict[str, object]:
    name = path.relative_to(repository).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


def _commit(repository: Path) -> str:
    return hashlib.sha1("/".join(repository.parts[-2:]).encode()).hexdigest()


def command_line(
    environment: dict[str, str], *arguments: str | Path, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """`fvae-lora` in a process of its own, which reads the hub's variables when it begins."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *later_wins(arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
