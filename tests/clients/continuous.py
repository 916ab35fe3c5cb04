"""generate_batch on the model directory that it is given: many requests at once, the same text as one by one."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
prompts = [tokenizer(text).input_ids for text in ("the quick", "jump", "a lazy dog, and", "how vexingly", "d") * 2]
greedy = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
alone = [model.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() for ids in prompts]
outputs = model.generate_batch(
    prompts,
    generation_config=GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **greedy),
    continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=64),
    progress_bar=False,
)
together = [output.generated_tokens for output in outputs.values()]
print(json.dumps({"same": sorted(together) == sorted(alone), "requests": len(together)}))
