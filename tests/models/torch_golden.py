"""PyTorch's own transformers on fixed inputs, for `test_torch_parity.py`.

    python tests/models/torch_golden.py

needs torch (the `parity` extra) and writes `data/torch_transformers.npz`.
"""

from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "data" / "torch_transformers.npz"
D_MODEL, HEADS, D_FF, LAYERS, SOURCE, TARGET = 16, 4, 24, 2, 7, 5
CASES = {
    "encoder post relu": {"norm_first": False, "activation": "relu"},
    "encoder pre gelu": {"norm_first": True, "activation": "gelu"},
    "decoder post gelu": {"norm_first": False, "activation": "gelu"},
    "decoder pre relu": {"norm_first": True, "activation": "relu"},
    "transformer post relu": {"norm_first": False, "activation": "relu"},
    "transformer pre gelu": {"norm_first": True, "activation": "gelu"},
}


def outputs(name: str) -> dict[str, np.ndarray]:
    """Weights, inputs and output of one case. The last two source positions are padding."""
    import torch

    torch.manual_seed(sum(map(ord, name)))
    options = {**CASES[name], "dropout": 0.0, "batch_first": True, "dim_feedforward": D_FF}
    source, target = torch.randn(1, SOURCE, D_MODEL), torch.randn(1, TARGET, D_MODEL)
    padding = torch.zeros(1, SOURCE, dtype=torch.bool)
    padding[:, -2:] = True
    causal = torch.nn.Transformer.generate_square_subsequent_mask(TARGET)
    kind = name.split()[0]
    if kind == "encoder":
        layer = torch.nn.TransformerEncoderLayer(D_MODEL, HEADS, **options)
        model = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    elif kind == "decoder":
        layer = torch.nn.TransformerDecoderLayer(D_MODEL, HEADS, **options)
        model = torch.nn.TransformerDecoder(layer, LAYERS)
    else:
        model = torch.nn.Transformer(D_MODEL, HEADS, LAYERS, LAYERS, **options)
    # Norms and biases are all ones and zeros initially, and copies of a layer are equal.
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    with torch.no_grad():
        if kind == "encoder":
            out = model(source, src_key_padding_mask=padding)
        elif kind == "decoder":
            out = model(target, source, tgt_mask=causal, memory_key_padding_mask=padding)
        else:
            masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
            out = model(source, target, tgt_mask=causal, **masks)
    arrays = {f"weights/{k}": v.numpy() for k, v in model.state_dict().items()}
    arrays |= {"source": source[0].numpy(), "target": target[0].numpy(), "out": out[0].numpy()}
    return arrays


def main() -> None:
    """Writes all cases into one file."""
    arrays = {f"{name}/{k}": v for name in CASES for k, v in outputs(name).items()}
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH}: {len(arrays)} arrays, {PATH.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
