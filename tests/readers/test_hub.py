"""Models by name, in a cache as Hugging Face's tools leave it."""

from pathlib import Path

import pytest

import catp_jax
from catp_jax.readers.hub import find_folder
from tests.command import catp_jax as command

ASSETS = Path(catp_jax.__file__).parent / "assets"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, org/mini: links in a folder named after a commit."""
    model = tmp_path / "hub" / "models--org--mini"
    snapshot = model / "snapshots" / COMMIT
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    for path in (ASSETS / "mini-llama-vision").iterdir():
        (snapshot / path.name).symlink_to(path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_downloaded_model_is_found_by_its_name(cache: Path):
    assert find_folder("org/mini") == cache
    asked = ("--image", ASSETS / "blue-circle.png", "--prompt", "what color is the shape?")
    done = command("generate", "org/mini", *asked, "--processor", ASSETS / "mini-llama-vision")
    assert (done.stdout, done.stderr, done.returncode) == ("blue\n", "", 0)
    done = command("convert", "org/mini", cache.parent / "converted")
    assert done.returncode == 0, done.stderr
    assert find_folder(cache.parent / "converted")


def test_a_published_checkpoint_is_found_without_its_organisation(cache: Path):
    hub = cache.parents[2]
    cache.parents[1].rename(hub / "models--Salesforce--blip2-opt-2.7b")
    found = find_folder("blip2-opt-2.7b")
    assert found == find_folder("Salesforce/blip2-opt-2.7b")
    assert found.is_relative_to(hub / "models--Salesforce--blip2-opt-2.7b")


def test_folders_come_first_and_may_be_at_home(cache: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org/mini", "models/a b"):
        (tmp_path / name).mkdir(parents=True)
        assert find_folder(name) == find_folder(Path(name)) == Path(name)
        assert find_folder(f"~/{name}") == tmp_path / name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/other", r"download it with `hf download org/other`$"),
        ("meta-llama/Llama-3.2-11B-Vision", r"licence on https://huggingface.co/meta-llama/Llama"),
        (
            "blip2-opt-2.7b",
            r"^Salesforce/blip2-opt-2.7b is .* `hf download Salesforce/blip2-opt-2.7b`$",
        ),
        ("nowhere", "nowhere is not a folder"),
        ("/no/where", "/no/where is not a folder"),
        ("./org/mini", "is not a folder"),
        ("../org/mini", "is not a folder"),
        ("a/b/c", "is not a folder"),
        ("org/..", "is not a folder|hf download"),
        ("org/" + "x" * 300, "is not a folder|hf download"),
        ("\ud800", "is not a folder"),
    ],
)
def test_what_is_nowhere_is_refused_with_what_to_do(cache: Path, name: str, says: str):
    with pytest.raises(ValueError, match=says):
        find_folder(name)


def test_an_interrupted_download_is_refused(cache: Path):
    (cache / "model.safetensors").unlink()
    done = command("generate", "org/mini", "--prompt", "a")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "safetensors" in done.stderr


def test_the_version_is_printed():
    done = command("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("catp-jax 0.")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "~nosuchuser", "~/gone"])
def test_a_home_that_is_not_there_is_no_folder(name):
    with pytest.raises(ValueError, match=r"is not a folder|neither a folder"):
        find_folder(name)
