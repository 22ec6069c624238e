"""The `hf/` folder of a checkpoint is served by vLLM as it is, and gives what transformers gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from actors.vllm_settings import environment
from learner import checkpoint
from learner.ranks import Ranks
from tests.learning import model_folder, open_policy, train_step
from tests.rows import random_rows

PROMPT = [5, 9, 13, 20]
NUM_TOKENS = 12
SERVE = f"""
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=32 << 20, max_model_len=64)
    sampling = SamplingParams(temperature=0.0, max_tokens={NUM_TOKENS}, ignore_eos=True)
    answer = model.generate([{{"prompt_token_ids": {PROMPT}}}], sampling)[0].outputs[0]
    print(json.dumps(list(answer.token_ids)))
"""


def test_vllm_serves_a_checkpoints_folder_as_it_is(tmp_path: Path, ranks: Ranks) -> None:
    policy = open_policy(model_folder(tmp_path / "model"), ranks, lora={"rank": 4})  # so that it has to be merged
    train_step(policy, ranks, random_rows(1, 6), learning_rate=1e-2)
    folder = checkpoint.save(tmp_path, 1, policy, {}, 1, ranks) / "hf"
    (tmp_path / "serve.py").write_text(SERVE)
    command = [sys.executable, str(tmp_path / "serve.py"), str(folder)]
    served = subprocess.run(
        command, env=os.environ | environment("cpu"), stdout=subprocess.PIPE, text=True, timeout=100, check=True
    )
    ids = torch.tensor([PROMPT])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], 1)
    assert json.loads(served.stdout.splitlines()[-1]) == ids[0, len(PROMPT) :].tolist()
