"""Ways to generate in transformers, from the directory that this script is given: do they write what plain ones do?"""

import json
import sys

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
directory, draft, *more = sys.argv[1:]
trusted = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(directory, **trusted)
model = AutoModelForCausalLM.from_pretrained(directory, **trusted).eval()
ids = tokenizer("the quick", return_tensors="pt").input_ids
plain = model.generate(ids, max_new_tokens=32, do_sample=False)


def same(**options) -> bool:
    return torch.equal(model.generate(ids, max_new_tokens=32, do_sample=False, **options), plain)


def quantized(backend: str, nbits: int) -> float:
    """Share of the plain tokens that generate() finds with a cache in so many bits."""
    config = {"backend": backend, "nbits": nbits, "q_group_size": 16, "residual_length": 8}
    ids_ = model.generate(
        ids, max_new_tokens=32, do_sample=False, cache_implementation="quantized", cache_config=config
    )
    return (ids_ == plain).float().mean().item() if ids_.shape == plain.shape else 0.0


def refused(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)
    return ""


write = pipeline("text-generation", directory, device="cpu", **trusted)
written = write("the quick", max_new_tokens=32, do_sample=False)[0]["generated_text"]
base = AutoModel.from_pretrained(directory, **trusted).eval()
exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False).module()
assistant = AutoModelForCausalLM.from_pretrained(draft, **trusted).eval()
facts = {
    "tokens": plain.shape[1],
    "static": same(cache_implementation="static"),
    "assisted": same(assistant_model=assistant),
    "prompt lookup": same(prompt_lookup_num_tokens=3),
    "hqq, 8 bits": quantized("hqq", 8),
    "hqq, 4 bits": quantized("hqq", 4),
    "pipeline": written == tokenizer.decode(plain[0], skip_special_tokens=True),
    "AutoModel": torch.equal(model.lm_head(base(ids).last_hidden_state), model(ids).logits),
    "torch.export": torch.allclose(exported(input_ids=ids, use_cache=False).logits, model(ids).logits, atol=1e-5),
    "quantized and assisted": refused(lambda: same(assistant_model=assistant, cache_implementation="quantized")),
}
if more == ["quanto"]:  # which compiles its kernels at its first use, for half a minute
    facts["quanto, 4 bits"] = quantized("quanto", 4)
print(json.dumps(facts))
