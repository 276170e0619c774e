"""What the reference scripts share. Import this before torch: it fixes the arithmetic."""

import os

# The same code path on every x86-64 processor and one thread, so that the files come out bit for bit the same.
os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ["MKL_CBWR"] = "COMPATIBLE"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Nothing here needs the network, and set order must not depend on the process.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"

import json
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
torch.backends.mkldnn.enabled = False
torch.use_deterministic_algorithms(True)

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def rng(*seed):
    """A numpy generator: its streams, unlike torch's, do not depend on vector instructions."""
    return np.random.default_rng([0xA7E11E5, *seed])


def normal(generator, shape, mean=0.0, std=1.0):
    return torch.from_numpy((mean + std * generator.standard_normal(tuple(shape))).astype(np.float32))


def load_base(folder, **overrides):
    """A model in float32 with eager attention, from a folder in HF layout."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **overrides
    ).eval()


def load_adapted(base_folder, adapter_folder, **options):
    return PeftModel.from_pretrained(load_base(base_folder), adapter_folder, **options).eval()


def logits_of(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.contiguous()


def save_tensors(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def save_json(path, value):
    """Indented, with lists of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    assert json.loads(text) == value
    Path(path).write_text(text + "\n", encoding="utf-8")
