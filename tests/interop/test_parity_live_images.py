"""Fresh random models that see images, as `test_parity_live.py` does it for decoders."""

import importlib.util
from pathlib import Path

import pytest
from interop import test_parity

from eqx_transformer.interop import load_pretrained, save_pretrained

torch = pytest.importorskip("torch", reason="needs torch (the group parity)")
pytest.importorskip("transformers", reason="needs transformers (the group parity)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_spec = importlib.util.spec_from_file_location(
    "make_images", Path(__file__).parent / "parity" / "make_images.py"
)
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(scope="module", params=make.MODELS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / request.param
    return folder, make.make(request.param, folder, seed=1)


def test_we_compute_what_transformers_computes(made, tmp_path):
    folder, _ = made
    test_parity.test_outputs(folder)
    test_parity.test_every_spelling_is_the_same_model(folder, tmp_path)


def test_transformers_loads_what_we_save(made, tmp_path):
    folder, theirs = made
    save_pretrained(load_pretrained(folder), tmp_path, model_type=theirs.config.model_type)
    again, report = type(theirs).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    again.eval()
    # A vector of training, which nothing here has.
    missing = {name for name in report["missing_keys"] if not name.endswith("mask_token")}
    assert not missing and not report["unexpected_keys"] and not report["mismatched_keys"]
    mine, other = again.state_dict(), theirs.state_dict()
    different = mine.keys() ^ other.keys()
    assert all(name.endswith("mask_token") for name in different), different
    for name in mine.keys() - different:
        assert torch.equal(mine[name], other[name]) or name.endswith("mask_token"), name
    inputs = {"pixel_values": torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
    if theirs.config.model_type in ("clip", "siglip"):
        inputs["input_ids"] = torch.arange(26).reshape(2, 13) + 3
    with torch.no_grad():
        ours, want = (model(**inputs)[0] for model in (again, theirs))
    assert torch.equal(ours, want)
