"""Fresh random encoders and encoder-decoders, as `test_parity_live.py` does it for decoders."""

import importlib.util
from pathlib import Path

import pytest
from interop import test_parity

from eqx_transformer.interop import load_pretrained, save_pretrained

torch = pytest.importorskip("torch", reason="needs torch (the group parity)")
pytest.importorskip("transformers", reason="needs transformers (the group parity)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_spec = importlib.util.spec_from_file_location(
    "make_encoders", Path(__file__).parent / "parity" / "make_encoders.py"
)
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(scope="module", params=make.MODELS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / request.param
    return folder, make.make(request.param, folder, seed=1)


def test_we_compute_what_transformers_computes(made, tmp_path):
    folder, theirs = made
    test_parity.test_outputs(folder)
    if theirs.config.is_encoder_decoder:
        test_parity.test_a_cache_gives_the_same(folder)
    test_parity.test_every_spelling_is_the_same_model(folder, tmp_path)


def test_transformers_loads_what_we_save(made, tmp_path):
    folder, theirs = made
    kind = theirs.config.model_type
    save_pretrained(load_pretrained(folder), tmp_path, model_type=kind)
    again, report = type(theirs).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    again.eval()
    # What has no weights: the table of sines of Marian.
    missing = {name for name in report["missing_keys"] if "embed_positions" not in name}
    assert not missing and not report["unexpected_keys"] and not report["mismatched_keys"]
    mine, other = again.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, x in mine.items():
        assert torch.equal(x, other[name]), name
    tokens = torch.arange(28).reshape(2, 14) + 3
    inputs = {"input_ids": tokens}
    if kind == "whisper":
        inputs = {"input_features": torch.linspace(-2, 2, 240).reshape(1, 10, 24)}
    if theirs.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[: 1 if kind == "whisper" else 2, :6]
    with torch.no_grad():
        ours, want = (model(**inputs)[0] for model in (again, theirs))
    assert torch.equal(ours, want)
