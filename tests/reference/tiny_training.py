"""Writes tests/fixtures/<model>/train-*: for adapters of every kind one backward pass and fifty AdamW steps from their weights."""

import math
import re

from common import FIXTURES, load_adapted, save_json, save_tensors

import numpy as np
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

STEPS, DECAY, CLIP, WARMUP_RATIO = 50, 1e-2, 0.3, 0.1
MASKED = [8, 14]  # tokens at the start of each sequence that take no part in the loss

# model -> the adapter to start from -> learning rate
RUNS = {
    "tiny-llama": {
        "lora-qv": 1e-3,
        "lora-all": 1e-3,
        "lora-patterns": 1e-3,
        "lora-rslora": 1e-3,
        "lora-layers": 2e-3,
        "lora-bias": 1e-3,
        "dora": 1e-3,
        "ia3": 1e-2,
        "prompt": 1e-2,
    },
    "tiny-qwen2": {"lora-all": 1e-3, "dora": 1e-3, "prompt": 1e-2},
    "tiny-qwen3": {"lora-all": 1e-3, "dora": 1e-3, "prompt": 1e-2},
    "tiny-mistral": {"lora-all": 1e-3},
}
# Kinds that are trained with dropout, too, and how much
WITH_DROPOUT, DROPOUT = ["lora-all", "dora"], 0.25
SITES = ["q", "k", "v", "o", "gate", "up", "down"]
# torch's own, and others where these are named: model -> betas, epsilon
ADAM = ((0.9, 0.999), 1e-8)
OTHER_ADAM = {"tiny-mistral": ((0.8, 0.95), 1e-4)}


def trainable(model):
    """The adapter's parameters under the names peft saves them by, in sorted order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    saved = get_peft_model_state_dict(model)
    if list(saved) == ["prompt_embeddings"]:
        assert len(parameters) == 1 and torch.equal(parameters[0], saved["prompt_embeddings"])
        return {"prompt_embeddings": parameters[0]}
    by_place = {p.data_ptr(): p for p in parameters}
    named = {name: by_place[value.data_ptr()] for name, value in saved.items()}
    assert len(named) == len(parameters)
    return dict(sorted(named.items()))


def mix(*parts):
    """One number out of several: `mix` of crates/train/src/random.rs."""
    state, whole = 0x9E3779B97F4A7C15, 2**64 - 1
    for part in parts:
        z = ((state ^ part) + 0x9E3779B97F4A7C15) & whole
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & whole
        state = z ^ (z >> 31)
    return state


def factors(key, width):
    """What each value of a row is multiplied with: `thin_out` of crates/kernels/src/pointwise.rs."""
    low, high = key & 0xFFFFFFFF, key >> 32
    kept, dropped = np.float32(1 / (1 - DROPOUT)), int(DROPOUT * 0xFFFFFFFF)
    row = []
    for at in range(width):
        h = (at * 0x9E3779B9 & 0xFFFFFFFF) ^ low
        h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) ^ high) * 0xC2B2AE35 & 0xFFFFFFFF
        h ^= h >> 16
        row.append(0.0 if h < dropped else kept)
    return row


class Masked(torch.nn.Module):
    """The dropout of a site in Atelier's first step, seed 0."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, x):
        mask = [
            [factors(mix(0, 3, self.site, example << 32 | position), x.shape[2]) for position in range(x.shape[1])]
            for example in range(x.shape[0])
        ]
        return x * torch.tensor(mask)


def with_masks(model):
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            layer, site = re.search(r"layers\.(\d+)\..*\.(\w+)_proj$", name).groups()
            module.lora_dropout["default"] = Masked(int(layer) * len(SITES) + SITES.index(site))
    return model


def write(model_name, name, rate):
    base = FIXTURES / model_name
    folder = base / f"train-{name}"
    folder.mkdir(exist_ok=True)
    betas, epsilon = OTHER_ADAM.get(model_name, ADAM)

    input_ids = load_file(base / "logits.safetensors")["input_ids"]
    labels = input_ids.clone()
    for row, count in enumerate(MASKED):
        labels[row, :count] = -100

    def loss_of(model):
        return model(input_ids=input_ids, labels=labels, use_cache=False).loss

    def fresh():
        if name != "prompt":
            return load_adapted(base, base / name, is_trainable=True).train()
        # peft refuses to load a prompt for training, so it is made trainable afterwards.
        model = load_adapted(base, base / name).train()
        model.peft_config["default"].inference_mode = False
        model.prompt_encoder.requires_grad_(True)
        return model

    # One step: the loss and every gradient.
    model = fresh()
    loss = loss_of(model)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients.values())
    save_tensors(
        folder / "grads.safetensors",
        {"input_ids": input_ids, "labels": labels, "loss": loss.detach().reshape(1), **gradients},
    )

    # The same with dropout.
    if name in WITH_DROPOUT:
        model = with_masks(fresh())
        masked = loss_of(model)
        masked.backward()
        gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
        assert abs(masked - loss) > 1e-4, (masked, loss)
        save_tensors(folder / "dropout.safetensors", {"loss": masked.detach().reshape(1), **gradients})

    # Fifty steps on the same batch.
    model = fresh()
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=rate, betas=betas, eps=epsilon, weight_decay=DECAY, foreach=False
    )
    warmup = math.ceil(WARMUP_RATIO * STEPS)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, STEPS)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), CLIP, foreach=False)
        losses.append(loss.item())
        norms.append(norm.item())
        optimizer.step()
        schedule.step()
    final = loss_of(model).item()

    if (model_name, name) == ("tiny-llama", "lora-qv"):
        save_tensors(folder / "train.safetensors", {name: parameter.detach() for name, parameter in parameters.items()})
    save_json(
        folder / "train.json",
        {
            "base": model_name,
            "initial_weights": f"{model_name}/{name}",
            "batch": "input_ids and labels of grads.safetensors, the same in every step; loss: mean over labels that are not -100, after the shift by one",
            "optimizer": "torch.optim.AdamW, all parameters in one group",
            "betas": list(betas),
            "epsilon": epsilon,
            "steps": STEPS,
            "learning_rate": rate,
            "weight_decay": DECAY,
            "schedule": "get_linear_schedule_with_warmup; the first step has rate 0",
            "warmup_ratio": WARMUP_RATIO,
            "max_grad_norm": CLIP,
            "dropout": 0.0,
            "losses": losses,
            "gradient_norms_before_clipping": norms,
            "loss_after_last_step": final,
        },
    )
    assert final < losses[0] - 0.02, (losses[0], final)
    print(f"{model_name}/train-{name}: loss {losses[0]:.4f} -> {final:.4f}, gradient norms {min(norms):.2f}..{max(norms):.2f}")


for model_name, runs in RUNS.items():
    for name, rate in runs.items():
        write(model_name, name, rate)
