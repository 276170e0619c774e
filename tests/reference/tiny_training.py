"""Writes tests/fixtures/<model>/train-*: for adapters of every kind one backward pass and fifty AdamW steps from their weights."""

import math

from common import FIXTURES, load_adapted, save_json, save_tensors

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
