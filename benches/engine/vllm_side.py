"""Sixteen users in vLLM on CPU: one line of prompts in, tokens per second out. Arguments: the number
format, the model, then the adapters."""

import json
import os
import sys
import time

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    dtype, model, *folders = sys.argv[1:]
    # Whatever else is printed goes to standard error, by its processes too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    adapters = [LoRARequest(f"user-{i}", i + 1, folder) for i, folder in enumerate(folders)]
    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=len(folders),
        enable_lora=True,
        max_loras=len(folders),
        max_lora_rank=8,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    for line in sys.stdin:
        prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in json.loads(line)]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps(tokens / (time.perf_counter() - start)), file=answers, flush=True)
