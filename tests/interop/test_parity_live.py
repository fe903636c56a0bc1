"""Fresh random models of every family, made by transformers, computed here, and given back.

Needs the group `parity`.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from interop import test_parity

from eqx_transformer.interop import load_pretrained, save_pretrained

torch = pytest.importorskip("torch", reason="needs torch (the group parity)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the group parity)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_spec = importlib.util.spec_from_file_location("make", Path(__file__).parent / "parity" / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(scope="module", params=make.MODELS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / request.param
    return folder, make.make(request.param, folder, seed=1)


def test_we_compute_what_transformers_computes(made, tmp_path):
    folder, _ = made
    test_parity.test_outputs(folder)
    test_parity.test_a_cache_gives_the_same(folder)
    test_parity.test_every_spelling_is_the_same_model(folder, tmp_path)


def test_transformers_loads_what_we_save(made, tmp_path):
    folder, theirs = made
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    save_pretrained(load_pretrained(folder), tmp_path, model_type=model_type)
    again, report = type(theirs).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=theirs.config._attn_implementation
    )
    again.eval()
    if hasattr(again, "set_experts_implementation"):
        again.set_experts_implementation("eager")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    mine, other = again.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, x in mine.items():
        assert torch.equal(x, other[name]), name
    tokens = torch.from_numpy(np.arange(28).reshape(2, 14) + 3)
    with torch.no_grad():
        results = []
        for model in (again, theirs):
            model(input_ids=tokens[:, :2], use_cache=False)
            results.append(model(input_ids=tokens, use_cache=False).logits)
    assert torch.equal(*results)
