#!/usr/bin/env python3
"""Write inverse rotation frequencies as Hugging Face transformers computes them: OUT_FILE, JSON, the bits of each fp32 number.

    python3 make_rope.py rope.json

Needs: torch, transformers (5.x).
"""
import json, sys
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, low_freq_factor=1.0, high_freq_factor=4.0)
CASES = [
    (128, dict(rope_type="default", rope_theta=10000.0)),
    (128, dict(rope_type="default", rope_theta=1000000.0)),
    (32, dict(rope_type="default", rope_theta=1000000.0)),
    (128, dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    (128, dict(**LLAMA3, factor=8.0, original_max_position_embeddings=8192)),
    (64, dict(**LLAMA3, factor=32.0, original_max_position_embeddings=8192)),
    (16, dict(**LLAMA3, factor=8.0, original_max_position_embeddings=64)),
]

cases = []
for head_dim, rope in CASES:
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=dict(rope))
    embedding = LlamaRotaryEmbedding(config)
    assert embedding.attention_scaling == 1.0
    cases.append(dict(head_dim=head_dim, rope_parameters=rope, bits=embedding.inv_freq.view(torch.int32).tolist()))
with open(sys.argv[1], "w") as out:
    out.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
