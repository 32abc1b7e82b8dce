"""What methods have learned: its folder, and methods that are made of it."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import catp_jax
from catp_jax.contract import Site, settle
from catp_jax.pruning import learned, make, methods_for
from catp_jax.pruning.attention_predictor import Network
from catp_jax.pruning.learned import Learned
from catp_jax.pruning.named import named, pruners
from tests.shallow import shallow

EVERYWHERE = frozenset(Site)
NAMES = ("eigen", "attention_predictor")


def eigen(checksum: str = "abc") -> Learned:
    """Directions of one layer with two heads of four channels: a head takes 2, 1 or 4 for half."""
    arrays = {}
    for name in ("keys", "values"):
        arrays[f"1.{name}"] = np.broadcast_to(np.eye(4, dtype=np.float32), (2, 4, 4))
        arrays[f"1.{name}.strength"] = np.asarray([[4, 3, 2, 1]] * 2, np.float32)
    figures = {"figures": {"share": 0.5}}
    return Learned("eigen", {"checksum": checksum, "model": "Tiny"}, {}, arrays, figures)


def predictor(**settings: int) -> Learned:
    network = Network.start(jax.random.key(0))
    arrays = {name: np.asarray(array) for name, array in network.named().items()}
    settings = {"block": 4, "rows": 6, **settings}
    return Learned("attention_predictor", {"checksum": "abc"}, settings, arrays)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    eigen().write(tmp_path / "learned")
    return tmp_path / "learned"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    predictor().write(tmp_path / "network")
    return tmp_path / "network"


def test_what_is_written_is_read(folder: Path):
    found, expected = learned.read(folder, "eigen"), eigen()
    assert (found.method, found.model, found.settings) == ("eigen", expected.model, {})
    assert found.record["figures"] == {"share": 0.5}
    assert {*found.arrays} == {*expected.arrays}
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(found.arrays[name], array)
    assert sorted(path.name for path in folder.iterdir()) == ["arrays.npz", "learned.json"]


def test_a_tilde_is_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert learned.read("~/learned", "eigen").model["model"] == "Tiny"


def test_a_folder_that_was_made_anew_is_read_anew(folder: Path):
    learned.read(folder, "eigen")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    eigen("other").write(folder)
    assert learned.read(folder, "eigen").model["checksum"] == "other"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file"])
def test_without_a_folder_it_says_how_to_make_one(name: str, there: str, tmp_path: Path):
    place = tmp_path / "x"
    if there == "an empty folder":
        place.mkdir()
    elif there == "a file":
        place.write_text("hello")
    says = f"{place} has no learned.json; make it with catp-jax calibrate MODEL --method {name} "
    with pytest.raises(ValueError, match=f"{says}--out {place}"):
        learned.read(place, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_without_its_folder_says_how_to_make_one(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Even where the working directory would do."""
    monkeypatch.chdir(folder)
    for spec in (name, f"{name}:"):
        with pytest.raises(ValueError, match=rf"\({name}:DIR\); make it .* --out DIR"):
            make(spec, 3, EVERYWHERE)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "learned.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "no JSON": lambda folder: (folder / "learned.json").write_text("{"),
    "another JSON": lambda folder: (folder / "learned.json").write_text("[1]"),
    "no text": lambda folder: (folder / "learned.json").write_bytes(b"\xff\x00"),
    "keys are missing": lambda folder: (folder / "learned.json").write_text('{"format": 1}'),
    "no model": lambda folder: change(folder, model="Tiny"),
    "no checksum": lambda folder: change(folder, model={"checksum": 3}),
    "no settings": lambda folder: change(folder, settings=[]),
    "no arrays": lambda folder: (folder / "arrays.npz").unlink(),
    "other arrays": lambda folder: (folder / "arrays.npz").write_bytes(b"hello"),
    "cut off": lambda folder: os.truncate(folder / "arrays.npz", 700),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(harm: Any, folder: Path):
    harm(folder)
    with pytest.raises(ValueError, match=rf"^{folder} is damaged \(.*calibrate anew$"):
        learned.read(folder, "eigen")


def test_wherever_a_byte_of_the_arrays_is_changed_it_is_read_or_refused(folder: Path):
    whole = (folder / "arrays.npz").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in range(0, len(whole), 5):
        broken = bytearray(whole)
        broken[place] ^= int(rng.integers(1, 256))
        (folder / "arrays.npz").write_bytes(bytes(broken))
        learned._read.cache_clear()
        try:
            learned.read(folder, "eigen")
        except ValueError:
            refused += 1
    assert refused > len(whole) // 10


def test_another_format_and_another_method_are_refused(folder: Path):
    with pytest.raises(ValueError, match="is what eigen has learned, not attention_predictor"):
        learned.read(folder, "attention_predictor")
    change(folder, format=2)
    with pytest.raises(ValueError, match="has format 2, and this version reads 1; calibrate anew"):
        learned.read(folder, "eigen")


def test_a_folder_that_exists_is_left_as_it_is(folder: Path):
    before = (folder / "learned.json").read_bytes()
    with pytest.raises(ValueError, match="exists already; choose another folder or delete it"):
        eigen("other").write(folder)
    assert (folder / "learned.json").read_bytes() == before


def test_a_link_to_nowhere_and_a_folder_in_a_file_are_refused(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link exists already"):
        learned.check_new(tmp_path / "link")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ValueError, match=f"cannot be made: {tmp_path / 'file'} is not a folder"):
        learned.check_new(tmp_path / "file" / "a" / "b")


@pytest.mark.parametrize("fault", ["savez", "dumps", "rename"])
def test_a_folder_is_written_whole_or_not_at_all(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*given: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    of = {"savez": np, "dumps": json, "rename": os}[fault]
    with monkeypatch.context() as patch:
        patch.setattr(of, fault, full)
        with pytest.raises(OSError, match="No space left"):
            eigen().write(tmp_path / "place" / "learned")
    assert [*(tmp_path / "place").iterdir()] == []
    eigen().write(tmp_path / "place" / "learned")
    assert learned.read(tmp_path / "place" / "learned", "eigen").method == "eigen"


def test_eigens_bases_have_the_bytes_of_the_budget(folder: Path):
    method = make(f"eigen:{folder}", 5, EVERYWHERE, of=10)
    assert (method.site, method.keep, method.of_model) == (Site.CACHE, 5, "abc")
    assert [basis.matrix.shape for basis in method.bases[1]] == [(2, 4, 2)] * 2
    whole = make(f"eigen:{folder}", 10, EVERYWHERE, of=10)
    assert whole.bases[1] == (None, None)


@pytest.mark.parametrize(
    ("asked", "keep"), [(1, 4), (3, 4), (4, 4), (7, 4), (8, 8), (9, 8), (100, 100)]
)
def test_attention_predictors_budget_is_rounded_down_to_whole_blocks(
    asked: int, keep: int, network: Path
):
    method = make(f"attention_predictor:{network}", asked, EVERYWHERE, of=200)
    assert (method.keep, method.block, method.rows, method.refresh) == (keep, 4, 6, 5)
    assert (method.site, method.of_model) == (Site.READ, "abc")
    for name, array in predictor().arrays.items():
        np.testing.assert_array_equal(method.network.named()[name], array)


def test_options_follow_the_folder(network: Path):
    assert make(f"attention_predictor:{network}:refresh=3", 8, EVERYWHERE).refresh == 3
    assert named(f"attention_predictor:{network}:refresh=3", "50%")[0][1] == "50%"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        *(
            (f"attention_predictor:NETWORK:{name}=2", r"takes refresh=…")
            for name in ("block", "rows")
        ),
        ("attention_predictor:NETWORK:network=1", r"takes refresh=…"),
        ("attention_predictor:NETWORK:of_model=x", r"takes refresh=…"),
        ("attention_predictor:NETWORK:refresh=0", "wants refresh at least 1, got 0"),
        ("attention_predictor:NETWORK:refresh=x", "refresh takes a whole number, got 'x'"),
        ("eigen:EIGEN:bases=1", "it takes no options"),
        ("eigen:EIGEN:x", "eigen does not know the option 'x'"),
        ("eigen:NETWORK", "is what attention_predictor has learned, not eigen"),
    ],
)
def test_what_comes_with_the_folder_is_no_option(spec: str, says: str, folder: Path, network: Path):
    spec = spec.replace("NETWORK", str(network)).replace("EIGEN", str(folder))
    with pytest.raises(ValueError, match=says):
        make(spec, 8, EVERYWHERE)


def test_a_budget_is_wanted(network: Path):
    with pytest.raises(ValueError, match="attention_predictor wants a number of visual tokens"):
        make(f"attention_predictor:{network}", None, EVERYWHERE)


def test_eigen_has_a_budget_of_its_own_where_ranks_were_searched(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks '1\.ranks'; calibrate anew"):
        named(f"eigen:{folder}", "auto")
    before = eigen()
    ranks = {"1.ranks": np.asarray([1, 4], np.int32)}
    searched = Learned("eigen", before.model, {}, {**before.arrays, **ranks})
    searched.write(tmp_path / "searched")
    methods = named(f"eigen:{tmp_path / 'searched'}", "auto")
    (method,) = settle(pruners(methods, [10, 3], 10, EVERYWHERE), EVERYWHERE)
    (keys, values) = method.bases[1]
    assert (keys.matrix.shape, values, method.keep) == ((2, 4, 1), None, None)
    with pytest.raises(ValueError, match=r"eigen leaves the same share .* got '8'"):
        named(f"eigen:{tmp_path / 'searched'}", "8")


def test_methods_that_must_learn_first_are_not_among_those_that_fit():
    assert not {*NAMES} & {*methods_for(EVERYWHERE)}
    assert "k_norm" in methods_for(EVERYWHERE)


def test_what_was_learned_of_another_model_is_refused(folder: Path):
    model = catp_jax.load(shallow("mini-llama-vision"))
    image = Image.new("RGB", (64, 64), "red")
    says = f"EigenAttention has learned is of another model .checksum abc.*{model.checksum}"
    with pytest.raises(ValueError, match=says):
        model.generate([image], ["what is it?"], prune=f"eigen:{folder}", keep="50%")


def test_a_folder_that_lacks_an_array_is_refused(tmp_path: Path):
    folder = tmp_path / "lacking"
    Learned("eigen", {"checksum": "x"}, {}, {"1.keys": np.eye(4)[None]}).write(folder)
    with pytest.raises(ValueError, match=r"lacks '1\..*'; calibrate anew"):
        make(f"eigen:{folder}", 4, frozenset({Site.CACHE}))
