"""GRPO in PyTorch on samples from a Rollout sidecar: a small Qwen3 learns to add from its own attempts, in about two minutes on two cores.
    dotnet build -c Release sidecar/server && pip install torch ./sidecar/client.python && python examples/python/grpo.py
"""
import argparse, pathlib, random, tempfile, time

import rollout, torch
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the trainer's
PROGRAM = pathlib.Path(__file__).resolve().parents[2] / "sidecar/server/bin/Release/net10.0/rollout.dll"
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM, EOS = 192, 384, 3, 6, 2, 32, 256  # a token is a byte; one more ends a text
CONFIG = dict(
    model_type="qwen3", vocab_size=EOS + 1, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, head_dim=DIM,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64, eos_token_id=EOS)

# The task: the answer to "47+85=" is "231", the sum with its units first, then the end token. One pair in twelve is held out, in either order.
def problem(a, b): return list(f"{a}+{b}=".encode()), [*str(a + b)[::-1].encode(), EOS]
pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
held_out = [problem(a, b) for a, b in pairs if a * b % 11 == 5]
training = [problem(a, b) for a, b in pairs if a * b % 11 != 5]

# The bf16 weights that the sidecar computes with, so that trainer and sidecar agree; the gradient goes to the fp32 weight.
def bf16(weight): return weight + (weight.bfloat16() - weight).detach()

class Linear(nn.Linear):
    def __init__(self, inputs, outputs): super().__init__(inputs, outputs, bias=False)
    def forward(self, x): return nn.functional.linear(x, bf16(self.weight))

class Norm(nn.Module):
    def __init__(self, size): super().__init__(); self.weight = nn.Parameter(torch.ones(size))
    def forward(self, x): return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * bf16(self.weight)

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(HIDDEN), Norm(HIDDEN)
        self.self_attn = nn.ModuleDict(dict(
            q_proj=Linear(HIDDEN, HEADS * DIM), k_proj=Linear(HIDDEN, KV_HEADS * DIM), v_proj=Linear(HIDDEN, KV_HEADS * DIM),
            o_proj=Linear(HEADS * DIM, HIDDEN), q_norm=Norm(DIM), k_norm=Norm(DIM)))
        self.mlp = nn.ModuleDict(dict(gate_proj=Linear(HIDDEN, INNER), up_proj=Linear(HIDDEN, INNER), down_proj=Linear(INNER, HIDDEN)))
    def forward(self, x, cos, sin, causal):
        def heads(y): return y.view(*y.shape[:2], -1, DIM).transpose(1, 2)
        def rotated(y): return y * cos + torch.cat([-y[..., DIM // 2 :], y[..., : DIM // 2]], -1) * sin
        at, y = self.self_attn, self.input_layernorm(x)
        q, k, v = rotated(at.q_norm(heads(at.q_proj(y)))), rotated(at.k_norm(heads(at.k_proj(y)))), heads(at.v_proj(y))
        k, v = (shared.repeat_interleave(HEADS // KV_HEADS, 1) for shared in (k, v))
        mixed = (q @ k.transpose(-1, -2) * DIM**-0.5 + causal).softmax(-1) @ v
        x = x + at.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(nn.functional.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))

class Policy(nn.Module):  # parameters have the names of the Hugging Face checkpoint, so what is pushed needs no renaming
    def __init__(self):
        super().__init__()
        layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.model = nn.ModuleDict(dict(embed_tokens=nn.Embedding(EOS + 1, HIDDEN), layers=layers, norm=Norm(HIDDEN)))
        self.lm_head = Linear(HIDDEN, EOS + 1)
    def logprobs(self, prompts, completions):
        """Of the completions' tokens [rows, longest], and 1 where there is one, 0 behind the end. The prompts have one length."""
        longest, start = max(map(len, completions)), len(prompts[0])
        mask = torch.tensor([[1.0] * len(c) + [0.0] * (longest - len(c)) for c in completions], device=DEVICE)
        tokens = torch.tensor([[*p, *c, *[EOS] * (longest - len(c))] for p, c in zip(prompts, completions)], device=DEVICE)
        length = tokens.shape[1] - 1
        angles = torch.outer(torch.arange(length), 1e4 ** (torch.arange(0, DIM, 2) / -DIM)).repeat(1, 2).to(DEVICE)
        x = nn.functional.embedding(tokens[:, :-1], bf16(self.model.embed_tokens.weight))
        for layer in self.model.layers:
            x = layer(x, angles.cos(), angles.sin(), torch.full((length, length), -torch.inf, device=DEVICE).triu(1))
        logprobs = self.lm_head(self.model.norm(x[:, start - 1 :])).log_softmax(-1)
        return logprobs.gather(-1, tokens[:, start:, None]).squeeze(-1), mask

def main(steps, warm_steps, prompts, seed, sidecar_device, n=16):
    torch.manual_seed(seed)
    draw, policy = random.Random(seed), Policy().to(DEVICE)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0)
    def learn(loss, rate):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    for step in range(1, warm_steps + 1):  # supervised, until it is right sometimes: GRPO learns from the difference
        logprobs, mask = policy.logprobs(*zip(*draw.choices(training, k=64)))
        if (logprobs * mask).sum(1).exp().mean() > 0.18: break
        learn(-(logprobs * mask).sum() / mask.sum(), 3e-3 * min(1, step / 20))
    with (tempfile.TemporaryDirectory() as folder,
          rollout.Sidecar.start(rollout.checkpoint.save(folder, policy, CONFIG), program=PROGRAM,
                                arguments=["--device", sidecar_device]) as sidecar, sidecar.connect() as client):
        print(f"training on {DEVICE}{'' if torch.cuda.is_available() else ', without a GPU'}; sampling on {client.status().backend}")
        for step in range(1, steps + 1):
            started = time.perf_counter()
            problems, answers = zip(*draw.choices(training, k=prompts))
            groups = client.generate(problems, n=n, max_tokens=4, seed=(seed << 40) + (step << 16))
            samples = [sample for group in groups for sample in group]
            assert all(sample.versions[-1].version == step - 1 for sample in samples), "sampled from other weights"
            rewards = torch.tensor([[float(s.ids.tolist() == answer) for s in group] for group, answer in zip(groups, answers)])
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, unbiased=False, keepdim=True) + 1e-4)
            # Identical samples have the same gradient: computing it once for all of them costs less. Soon most are identical.
            keys = [(tuple(problem), tuple(s.ids.tolist())) for problem, group in zip(problems, groups) for s in group]
            rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
            logprobs, mask = (values[[rows[key] for key in keys]] for values in policy.logprobs(*zip(*rows)))
            sampled = nn.utils.rnn.pad_sequence([torch.from_numpy(s.logprobs) for s in samples], batch_first=True).to(DEVICE)
            difference, advantage = (logprobs - sampled) * mask, advantages.view(-1, 1).to(DEVICE)
            gain = torch.min(difference.exp() * advantage, difference.exp().clamp(0.8, 1.28) * advantage)
            learn(-(gain * mask).sum() / mask.sum(), 5e-4 * min(1, step / 10))
            pushed = client.push_weights(policy, version=step)
            if step == 1: print(f"weights go by {pushed.transport}: {pushed.reason}")
            print(f"step {step:3d}  reward {rewards.mean():.3f}  |dlogp| {difference.abs().max():.1e}  version {pushed.version}  "
                  f"push {pushed.timings.total * 1e3:.0f} ms  {time.perf_counter() - started:.2f} s", flush=True)
        asked, answers = zip(*draw.sample(held_out, min(len(held_out), 20 * prompts)))
        right = [sample.ids.tolist() == answer for [sample], answer in zip(client.generate(asked, max_tokens=4, temperature=0), answers)]
        print(f"held out, greedy: {sum(right) / len(right):.1%} right")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="GRPO steps (%(default)s)")
    parser.add_argument("--warm-steps", type=int, default=600, help="at most this many supervised steps before them (%(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="problems a step, each tried sixteen times (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights, the problems and the samples (%(default)s)")
    parser.add_argument("--sidecar-device", default="auto", help="cpu, cuda, cuda:1, auto: what the machine has (%(default)s)")
    main(**vars(parser.parse_args()))
