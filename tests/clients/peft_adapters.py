"""PEFT on the model directory that it is given: each kind of adapter wrapped, trained, saved and loaded two ways."""

import json
import sys
import warnings

import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from peft import get_peft_model as wrap
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
warnings.simplefilter("ignore")
ADAPTERS = {
    "lora": LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "dora": LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "embeddings": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def load():
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)


@torch.no_grad()
def greedy(model, ids, tokens: int):
    """What generate() should give, by whole passes."""
    for _ in range(tokens):
        ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def generated(model, ids) -> str | bool:
    """Whether generate() is right, or what it raises."""
    try:
        return torch.equal(model.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None), greedy(model, ids, 8))
    except ValueError as error:
        return str(error)


ids, facts = torch.tensor([[10, 20, 30, 40, 50, 60]]), {}
for name, config in ADAPTERS.items():
    torch.manual_seed(0)
    model = wrap(load(), config)
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    model.save_pretrained(name)
    logits = model.eval()(input_ids=ids).logits
    on_base = PeftModel.from_pretrained(load(), name).eval()
    alone = AutoPeftModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    facts[name] = {
        "losses": losses,
        "gradients": all(weight.grad is not None for weight in trained.values()),
        "on the base": (logits - on_base(input_ids=ids).logits).abs().max().item(),
        "alone": (logits - alone(input_ids=ids).logits).abs().max().item(),
        "generate": generated(alone, ids),
    }
print(json.dumps(facts))
