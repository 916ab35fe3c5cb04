"""quantization_config on the model directory that it is given: which libraries load it, and how far the logits move."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

torch.set_num_threads(1)
ids = torch.tensor([[10, 20, 30, 40, 50, 60]])


def load(**options):
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options).eval()


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu")


def quanto():
    return load(quantization_config=QuantoConfig(weights="int8"), device_map="cpu")


def distance(make) -> dict:
    """Which classes hold the projections, and the largest difference of a probability."""
    model = make()
    with torch.no_grad():
        probabilities, grown = model(ids).logits.float().softmax(-1), model.generate(ids, max_new_tokens=4)
    projection = model.model.layers[0].mlp.up_proj
    kinds = {type(projection).__name__, type(getattr(projection, "weight", None)).__name__}
    return {"kinds": sorted(kinds), "off": (probabilities - plain).abs().max().item(), "tokens": grown.shape[1]}


with torch.no_grad():
    plain = load()(ids).logits.softmax(-1)
print(json.dumps({make.__name__: distance(make) for make in (torchao, quanto)}))
