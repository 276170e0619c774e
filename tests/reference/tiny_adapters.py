"""Writes tests/fixtures/<model>/lora-*: adapters as peft saves them and the logits peft computes with them."""

import shutil

from common import FIXTURES, load_adapted, load_base, logits_of, normal, rng, save_tensors

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (configuration, standard deviation of B)
ADAPTERS = {
    "lora-qv": (dict(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]), 0.12),
    "lora-all": (dict(r=4, lora_alpha=16, target_modules=SEVEN), 0.04),
    "lora-patterns": (
        dict(
            r=4,
            lora_alpha=8,
            target_modules=r".*\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|down)_proj)",
            # The first key that matches decides. peft sorts the keys when it saves, so they are sorted here too.
            rank_pattern={
                "down_proj": 6,
                "k_proj": 2,
                r"layers\.0\.self_attn\.v_proj": 3,
                "q_proj": 1,
                "v_proj": 5,
            },
            alpha_pattern={"layers.1.mlp.gate_proj": 2, "o_proj": 12, r"self_attn\.[kv]_proj": 5},
        ),
        0.08,
    ),
    "lora-rslora": (dict(r=8, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "o_proj"]), 0.06),
}


def write(number, model_name, name, options, std_b):
    generator = rng(2, number)
    base_folder, folder = FIXTURES / model_name, FIXTURES / model_name / name
    shutil.rmtree(folder, ignore_errors=True)

    model = get_peft_model(load_base(base_folder), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options)).eval()
    for parameter_name, parameter in model.named_parameters():
        if ".lora_A." in parameter_name:
            parameter.data.copy_(normal(generator, parameter.shape, std=parameter.shape[1] ** -0.5))
        elif ".lora_B." in parameter_name:
            parameter.data.copy_(normal(generator, parameter.shape, std=std_b))
    model.peft_config["default"].base_model_name_or_path = model_name  # not a path of this machine
    model.save_pretrained(folder)
    (folder / "README.md").unlink()

    # peft keeps target_modules as a set: give the list an order, and keep peft's layout of the file.
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True))

    reference = load_file(base_folder / "logits.safetensors")
    input_ids = reference["input_ids"]
    logits = logits_of(load_adapted(base_folder, folder), input_ids)  # from the files just written
    assert torch.equal(logits, logits_of(model, input_ids)), "saving and loading changed the adapter"
    save_tensors(folder / "logits.safetensors", {"input_ids": input_ids, "logits": logits})

    effect = (logits - reference["logits"]).abs()
    assert torch.isfinite(logits).all() and effect.mean() > 0.3, effect.mean()
    ranks = sorted({layer.shape[0] for key, layer in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in key})
    print(f"{model_name}/{name}: ranks {ranks}, moves the logits by {effect.mean():.2f} on average, {effect.max():.2f} at most")


for number, model_name in enumerate(["tiny-llama", "tiny-qwen2"]):
    for offset, (name, (options, std_b)) in enumerate(ADAPTERS.items()):
        write(10 * number + offset, model_name, name, options, std_b)
