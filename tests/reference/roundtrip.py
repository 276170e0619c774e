"""Does peft compute what Atelier computed, from an adapter that Atelier saved?

    roundtrip.py MODEL_FOLDER ADAPTER_FOLDER LOGITS_JSON [--expect-mismatch] [--tolerance 1e-4]

LOGITS_JSON holds {"input_ids": [[...]], "logits": [[[...]]]}, the logits of Atelier with that adapter. peft must accept
the folder, use every tensor in it and give the same logits in float32. With --expect-mismatch (the negative control:
logits of another adapter, or of the base) the logits must differ instead; whatever else is wrong still fails.
"""

from common import load_adapted, logits_of

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file


def check(arguments):
    """None, or what is wrong."""
    given = json.loads(Path(arguments.logits).read_text())
    input_ids, logits = torch.tensor(given["input_ids"]), torch.tensor(given["logits"], dtype=torch.float32)

    stored = load_file(Path(arguments.adapter) / "adapter_model.safetensors")
    model = load_adapted(arguments.model, arguments.adapter)
    used = get_peft_model_state_dict(model)
    if stored.keys() != used.keys():
        return f"tensor names differ: only in the file {sorted(stored.keys() - used.keys())}, missing {sorted(used.keys() - stored.keys())}"
    for name, tensor in stored.items():
        if not torch.equal(tensor.float(), used[name].float()):
            return f"{name} did not arrive in peft as stored"

    expected = logits_of(model, input_ids)
    with model.disable_adapter():
        effect = (expected - logits_of(model, input_ids)).abs().max().item()
    print(f"{len(stored)} tensors; the adapter moves the logits by up to {effect:.3g}")
    if effect < 10 * arguments.tolerance:
        return "the adapter does next to nothing, so equal logits would show nothing"
    if logits.shape != expected.shape:
        return f"logits of shape {list(logits.shape)}, peft gives {list(expected.shape)}"
    if not torch.isfinite(logits).all():
        return "logits are not finite"
    difference = (logits - expected).abs().max().item()
    print(f"max abs diff {difference:.3g}, tolerance {arguments.tolerance:g}")
    if arguments.expect_mismatch:
        return None if difference > arguments.tolerance else "the logits agree, and a mismatch was expected"
    return None if difference <= arguments.tolerance else "the logits differ"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of the base in HF layout")
parser.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
parser.add_argument("logits", help="JSON file with input_ids and logits")
parser.add_argument("--expect-mismatch", action="store_true")
parser.add_argument("--tolerance", type=float, default=1e-4)
try:
    problem = check(parser.parse_args())
except Exception as error:  # unreadable files, shapes peft refuses, ...
    problem = f"{type(error).__name__}: {error}"
if problem:
    print(f"FAILED: {problem}")
print("0 passed, 1 failed" if problem else "1 passed, 0 failed")
sys.exit(1 if problem else 0)
