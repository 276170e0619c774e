"""Writes tests/fixtures/tiny-llama/train-lora-qv: one backward pass and twenty AdamW steps from the weights of lora-qv."""

import math

from common import FIXTURES, load_adapted, save_json, save_tensors

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

BASE, ADAPTER, FOLDER = FIXTURES / "tiny-llama", FIXTURES / "tiny-llama/lora-qv", FIXTURES / "tiny-llama/train-lora-qv"
STEPS, RATE, DECAY, CLIP, WARMUP_RATIO = 20, 1e-3, 1e-2, 0.3, 0.1
MASKED = [8, 14]  # tokens at the start of each sequence that take no part in the loss

input_ids = load_file(BASE / "logits.safetensors")["input_ids"]
labels = input_ids.clone()
for row, count in enumerate(MASKED):
    labels[row, :count] = -100


def fresh():
    return load_adapted(BASE, ADAPTER, is_trainable=True).train()


def loss_of(model):
    return model(input_ids=input_ids, labels=labels, use_cache=False).loss


def trainable(model):
    """The adapter's parameters under the names peft saves them by, in sorted order."""
    named = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == get_peft_model_state_dict(model).keys()
    return dict(sorted(named.items()))


FOLDER.mkdir(exist_ok=True)

# One step: the loss and every gradient.
model = fresh()
loss = loss_of(model)
loss.backward()
gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
save_tensors(
    FOLDER / "grads.safetensors", {"input_ids": input_ids, "labels": labels, "loss": loss.detach().reshape(1), **gradients}
)

# Twenty steps on the same batch.
model = fresh()
parameters = trainable(model)
optimizer = torch.optim.AdamW(list(parameters.values()), lr=RATE, weight_decay=DECAY, eps=1e-8, foreach=False)
warmup = math.ceil(WARMUP_RATIO * STEPS)
schedule = get_linear_schedule_with_warmup(optimizer, warmup, STEPS)
losses, rates, norms = [], [], []
for _ in range(STEPS):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), CLIP, foreach=False)
    losses.append(loss.item())
    norms.append(norm.item())
    rates.append(schedule.get_last_lr()[0])
    optimizer.step()
    schedule.step()
final = loss_of(model).item()

save_tensors(
    FOLDER / "train.safetensors",
    {
        "losses": torch.tensor(losses),
        "learning_rates": torch.tensor(rates),
        "gradient_norms": torch.tensor(norms),
        **{name: parameter.detach() for name, parameter in parameters.items()},
    },
)
save_json(
    FOLDER / "train.json",
    {
        "base": "tiny-llama",
        "initial_weights": "tiny-llama/lora-qv",
        "batch": "input_ids and labels of grads.safetensors, the same in every step; loss: mean over labels that are not -100, after the shift by one",
        "optimizer": "AdamW",
        "steps": STEPS,
        "learning_rate": RATE,
        "betas": list(optimizer.defaults["betas"]),
        "eps": optimizer.defaults["eps"],
        "weight_decay": DECAY,
        "weight_decay_applies_to": "every A and B",
        "schedule": "linear: rate * step / warmup_steps below warmup_steps, then rate * (steps - step) / (steps - warmup_steps); step counts from 0, so the first step has rate 0",
        "warmup_ratio": WARMUP_RATIO,
        "warmup_steps": warmup,
        "max_grad_norm": CLIP,
        "clipping": "gradients times min(1, max_grad_norm / (norm + 1e-6)), norm over all A and B together",
        "dropout": 0.0,
        "counted_labels": int((labels[:, 1:] != -100).sum()),
        "losses": losses,
        "learning_rates": rates,
        "gradient_norms_before_clipping": norms,
        "loss_after_last_step": final,
    },
)
assert final < losses[0] - 0.02, (losses[0], final)
print(f"tiny-llama/train-lora-qv: loss {losses[0]:.4f} -> {final:.4f}, gradient norms {min(norms):.2f}..{max(norms):.2f}")
