"""HF peft's side of the training bench: one job a line, answered with the seconds its steps took.

Arguments: the folder and the name of a GGUF file, and the number of threads.
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

folder, file, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
bases = {}


def base(dtype):
    if dtype not in bases:
        bases[dtype] = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, dtype))
    return bases[dtype]


def batch_of(examples):
    longest = max(len(tokens) for tokens, _ in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


for line in sys.stdin:
    job = json.loads(line)
    config = LoraConfig(r=8, lora_alpha=8, lora_dropout=job["dropout"], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base(job["dtype"]), config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    examples, size = job["examples"], job["batch"]
    steps = job["epochs"] * -(-len(examples) // size)
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, -(-steps // 10), steps)
    for _ in range(job["epochs"]):
        for at in range(0, len(examples), size):
            model(**batch_of(examples[at : at + size]), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.3)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    model.unload()
