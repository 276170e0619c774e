"""Does peft compute what Atelier computed, from an adapter that Atelier saved?

    roundtrip.py MODEL_FOLDER ADAPTER_FOLDER LOGITS_JSON [--expect-mismatch] [--tolerance 1e-5]
    roundtrip.py MODEL_FOLDER FOLDER_OF_ADAPTER_FOLDERS

LOGITS_JSON holds {"input_ids": [[...]], "logits": [[[...]]]}, the logits of Atelier with that adapter. peft must accept
the folder, use every tensor in it and give the same logits in float32; those of virtual tokens do not count. Without
LOGITS_JSON every adapter folder holds its own logits.json, and all of them are checked. With --expect-mismatch (the negative control:
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


def check(arguments, adapter, logits_path):
    """None, or what is wrong."""
    given = json.loads(Path(logits_path).read_text())
    input_ids, logits = torch.tensor(given["input_ids"]), torch.tensor(given["logits"], dtype=torch.float32)

    stored = load_file(Path(adapter) / "adapter_model.safetensors")
    model = load_adapted(arguments.model, adapter)
    used = get_peft_model_state_dict(model)
    if stored.keys() != used.keys():
        return f"tensor names differ: only in the file {sorted(stored.keys() - used.keys())}, missing {sorted(used.keys() - stored.keys())}"
    for name, tensor in stored.items():
        if not torch.equal(tensor.float(), used[name].float()):
            return f"{name} did not arrive in peft as stored"

    expected = logits_of(model, input_ids)[:, -input_ids.shape[1] :]
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
parser.add_argument("logits", nargs="?", help="JSON file with input_ids and logits")
parser.add_argument("--expect-mismatch", action="store_true")
parser.add_argument("--tolerance", type=float, default=1e-5)
arguments = parser.parse_args()
if arguments.logits:
    pairs = [(Path(arguments.adapter), arguments.logits)]
else:
    pairs = [(folder, folder / "logits.json") for folder in sorted(Path(arguments.adapter).iterdir())]
failed = 0
for adapter, logits in pairs:
    print(f"{adapter}:")
    try:
        problem = check(arguments, adapter, logits)
    except Exception as error:  # unreadable files, shapes peft refuses, ...
        problem = f"{type(error).__name__}: {error}"
    if problem:
        print(f"FAILED: {problem}")
        failed += 1
print(f"{len(pairs) - failed} passed, {failed} failed")
sys.exit(1 if failed or not pairs else 0)
