"""A metric of `evaluate` on what the model directory that it is given writes, and its text-generation evaluator."""

import json
import sys

import datasets
import evaluate
import torch
from transformers import pipeline

torch.set_num_threads(1)


class Letters(evaluate.Measurement):
    """How many letters the texts have in all."""

    def _info(self):
        features = datasets.Features({"data": datasets.Value("string")})
        return evaluate.MeasurementInfo(description="letters", citation="", features=features)

    def _compute(self, data):
        return {"letters": sum(map(len, data))}


def refused() -> str:
    """Why evaluate's own way from a pipeline to a score does not go."""
    try:
        data = datasets.Dataset.from_dict({"text": prompts})
        evaluate.evaluator("text-generation").compute(write, data=data, metric=metric)
    except AttributeError as error:
        return str(error)
    return ""


write = pipeline("text-generation", sys.argv[1], trust_remote_code=True, device="cpu")
prompts, metric = ["the quick", "a lazy dog"], Letters()
texts = [rows[0]["generated_text"] for rows in write(prompts, max_new_tokens=8, do_sample=False)]
facts = {"letters": metric.compute(data=texts)["letters"], "texts": texts, "evaluator": refused()}
print(json.dumps(facts))
