"""Writes tests/fixtures/<model>/<adapter>: adapters of every kind as peft saves them, and the logits peft computes with them."""

import copy
import shutil

from common import FIXTURES, load_adapted, load_base, logits_of, normal, rng, save_tensors

import json

import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (configuration of LoRA, standard deviation of B)
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
    "lora-all-linear": (dict(r=2, lora_alpha=4, target_modules="all-linear", exclude_modules=r".*\.1\..*|.*gate_proj"), 0.12),
    "lora-layers": (
        dict(
            r=3,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=[1],
            layers_pattern="layers",
            exclude_modules=["self_attn.q_proj"],
        ),
        0.2,
    ),
    "lora-bias": (dict(r=3, lora_alpha=6, lora_bias=True, target_modules=["q_proj", "v_proj", "o_proj"]), 0.1),
    "dora": (dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]), 0.1),
}
# The kinds beside LoRA, with peft's own choice of modules for each architecture.
OTHERS = {
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}
# These came later and show their logits for one sequence only.
SHORT = ["lora-all-linear", "lora-layers", "lora-bias", "dora", "ia3", "prompt"]


def randomise(model, generator, std_b):
    """Values at which every part of the adapter matters."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            value = normal(generator, parameter.shape, std=parameter.shape[1] ** -0.5)
        elif ".lora_B." in name:
            value = normal(generator, parameter.shape, std=std_b if name.endswith("weight") else 0.3)
        elif ".lora_magnitude_vector." in name:
            value = parameter.data * normal(generator, parameter.shape, mean=1.0, std=0.3)
        elif ".ia3_l." in name:
            value = normal(generator, parameter.shape, mean=1.0, std=0.5)
        elif "prompt_encoder" in name:
            value = normal(generator, parameter.shape, std=1.0)
        else:
            continue
        parameter.data.copy_(value)


def write(number, model_name, name, config, std_b):
    generator = rng(2, number)
    base_folder, folder = FIXTURES / model_name, FIXTURES / model_name / name
    shutil.rmtree(folder, ignore_errors=True)

    model = get_peft_model(load_base(base_folder), config).eval()
    randomise(model, generator, std_b)
    model.peft_config["default"].base_model_name_or_path = model_name  # not a path of this machine
    model.save_pretrained(folder)
    (folder / "README.md").unlink()

    # peft keeps target_modules as a set: give the list an order, and keep peft's layout of the file.
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text())
    for field, value in config.items():
        if isinstance(value, list) and field.endswith("_modules"):
            value.sort()
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True))

    reference = load_file(base_folder / "logits.safetensors")
    sequences = 1 if name in SHORT else 2
    input_ids = reference["input_ids"][:sequences]
    logits = logits_of(load_adapted(base_folder, folder), input_ids)  # from the files just written
    assert torch.equal(logits, logits_of(model, input_ids)), "saving and loading changed the adapter"
    logits = logits[:, -input_ids.shape[1] :]  # without those of virtual tokens
    save_tensors(folder / "logits.safetensors", {"input_ids": input_ids, "logits": logits})

    effect = (logits - reference["logits"][:sequences]).abs()
    assert torch.isfinite(logits).all() and effect.mean() > 0.3, effect.mean()
    shapes = sorted({tuple(tensor.shape) for tensor in load_file(folder / "adapter_model.safetensors").values()})
    print(f"{model_name}/{name}: shapes {shapes}, moves the logits by {effect.mean():.2f} on average, {effect.max():.2f} at most")


# model -> its adapters
KINDS = [*ADAPTERS, *OTHERS]
MODELS = {
    "tiny-llama": KINDS,
    "tiny-qwen2": KINDS,
    "tiny-qwen3": ["lora-all", "dora", "prompt"],
    "tiny-mistral": ["lora-all"],
}

for number, (model_name, names) in enumerate(MODELS.items()):
    for offset, name in enumerate(KINDS):
        if name not in names:
            continue
        if name in OTHERS:
            config, std_b = copy.deepcopy(OTHERS[name]), 0.0
        else:
            options, std_b = ADAPTERS[name]
            config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options)
        write(10 * number + offset, model_name, name, config, std_b)
