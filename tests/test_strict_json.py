"""catp_jax.strict_json: no key twice, no endless number; in all files that numbers come from."""

from pathlib import Path

import numpy as np
import pytest

import convert
from catp_jax import strict_json
from convert import weights
from tests.convert.folders import hf_folder

BAD = {
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
    "twice inside": (b'{"x": [{"a": 1, "a": 1}]}', "key 'a' is there twice"),
    "twice, escaped": (b'{"a": 1, "\\u0061": 2}', "key 'a' is there twice"),
    "too large": (b'{"a": 1e400}', "1e400 is too large"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is too large, or none"),
    "no number": (b'{"a": NaN}', "NaN is too large, or none"),
    "too deep": (b'{"a":' * 200_000, "nested too deeply"),
    "no object": (b"[1]", "not a JSON object but list"),
    "half": (b'{"a": ', "it is not JSON"),
    "too many digits": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize(("raw", "message"), BAD.values(), ids=BAD)
def test_what_readers_take_differently_is_refused(raw: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        strict_json.parse(raw)


def test_a_byte_order_mark_is_passed_over():
    assert strict_json.parse(b"\xef\xbb\xbf" + '{"ä": [1.5, 2]}'.encode()) == {"ä": [1.5, 2]}


FILES = ("config.json", weights.INDEX, "catp_jax.json", weights.SINGLE)


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_folder_says_anything_twice(tmp_path: Path, name: str):
    folder = hf_folder(tmp_path / "hf", "sharded" if name == weights.INDEX else "hub")
    if name == "catp_jax.json":
        convert.to_orbax(folder, tmp_path / "converted")
        folder = tmp_path / "converted"
    path = folder / name
    raw = path.read_bytes()
    if name == "model.safetensors":
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].rstrip()
        again = header[: header.index(b"}") + 1].lstrip(b"{")  # the first entry, or metadata
        header = header[:-1] + b"," + again + b"}"
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    else:
        end = raw.rindex(b"}")
        first = raw[raw.index(b'"') : raw.index(b":")]
        path.write_bytes(raw[:end] + b"," + first + b": {}}")
    with pytest.raises(ValueError, match="is there twice") as error:
        convert.load(folder)
    assert name in str(error.value)


def test_no_number_of_a_config_is_endless(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    path = folder / "config.json"
    said = path.read_text()
    assert '"rms_norm_eps"' in said
    for number in ("1e400", "NaN"):
        path.write_text(said.replace('"rms_norm_eps": ', f'"rms_norm_eps": {number}, "x": '))
        with pytest.raises(ValueError, match=rf"config\.json cannot be used \(the number {number}"):
            convert.load(folder)
    assert np.isinf(float("1e400"))
