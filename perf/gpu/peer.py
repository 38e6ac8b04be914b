"""What PyTorch, transformers and vLLM do with the same shapes, random weights and prompts: rows for the tables of perf/gpu."""
import argparse, json, pathlib, random, statistics, time

STAGE = 6
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("what")
parser.add_argument("--out", required=True)
parser.add_argument("--root", required=True)
parser.add_argument("--small", action="store_true", help="on the CPU, tiny: so that every line runs")
arguments = parser.parse_args()
root = pathlib.Path(arguments.root)


def row(table, name, column, **cell):
    with open(pathlib.Path(arguments.out, "rows.jsonl"), "a") as rows:
        rows.write(json.dumps(dict(stage=STAGE, table=table, name=name, column=column, **cell)) + "\n")


def missing(error):
    row("Peers", arguments.what, "result", text=f"not installed: {error}")
    raise SystemExit


try:
    import torch
except ImportError as error:
    missing(error)

device = torch.device("cpu" if arguments.small else "cuda")
if not arguments.small and not torch.cuda.is_available():
    missing("PyTorch sees no GPU")


def seconds(work, rounds=5, calls=1):
    """Of one call, the median of some rounds; the device's work included."""
    taken = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        taken.append((time.perf_counter() - start) / calls)
    return statistics.median(taken[1:])


def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceilings():
    size = 64 if arguments.small else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    flops = 2 * size**3 / seconds(lambda: a @ b, calls=20)
    row("Ceilings", f"torch.matmul of {size} x {size} x {size}, bf16", "TFLOP/s", value=flops / 1e12)
    source = torch.zeros(1 << 20 if arguments.small else 1 << 32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source), calls=5)
    row("Ceilings", "torch's copy on the device", "GB/s, read and written", value=copied / 1e9)
    nccl = torch.cuda.nccl.version() if device.type == "cuda" else "-"
    row("Machine", "torch", "", text=f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}")


def goldens():
    """Log-probabilities of the reference's tokens by transformers on this device, as ours are in stage 2."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        missing(error)
    for family in ("llama", "llama3", "qwen2", "qwen3"):
        folder = root / "tests/golden" / family
        golden = json.loads((folder / "golden.json").read_text())
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            differences = []
            for prompt, continuation in zip(golden["prompts"], golden["continuations"]):
                ids = torch.tensor([prompt + continuation["tokens"]], device=device)
                with torch.no_grad():
                    logprobs = model(ids).logits[0].float().log_softmax(-1)
                for t, (token, expected) in enumerate(zip(continuation["tokens"], continuation["logProbs"])):
                    differences.append(abs(logprobs[len(prompt) - 1 + t, token].item() - expected))
            row("Goldens", family, f"torch, {name}: mean |dlogp|", value=statistics.mean(differences))
            row("Goldens", family, f"torch, {name}: largest", value=max(differences))


def transformers(name):
    """generate() of a batch whose prompts have one length: what a step of decoding costs, and the prompts."""
    try:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        missing(error)
    config = AutoConfig.from_pretrained(root / "tests/golden/qwen2" if arguments.small else root / "gpu/shapes" / name)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = AutoModelForCausalLM.from_config(config).eval()
    context, new = (8, 4) if arguments.small else (128, 32)
    for batch in (1, 2) if arguments.small else (1, 64, 256):
        prompts = torch.randint(8, config.vocab_size, (batch, context), device=device)

        def generate(tokens):
            with torch.no_grad():
                out = model.generate(
                    prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
                    top_k=0, pad_token_id=0, use_cache=True)
            assert out.shape[1] == context + tokens

        first = seconds(lambda: generate(1), rounds=2)
        step = (seconds(lambda: generate(1 + new), rounds=1) - first) / new
        table, cells = f"Decode, {name}", f"{batch} x {context}"
        row(table, cells, f"transformers {transformers.__version__}, ms a step", value=step * 1e3)
        row(table, cells, "transformers, tokens/s", value=batch / step)
        row(f"Prefill, {name}", cells, "transformers, tokens/s", value=batch * context / first)


def vllm(name):
    """nano-vllm's bench: 256 sequences, input and output lengths uniform in 100 to 1024."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        missing(error)
    draw = random.Random(0)
    llm = LLM(str(root / "gpu/shapes" / name), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048)
    prompts = [dict(prompt_token_ids=[draw.randint(8, 10000) for _ in range(draw.randint(100, 1024))]) for _ in range(256)]
    options = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=draw.randint(100, 1024), detokenize=False) for _ in prompts]
    llm.generate(prompts[:1], options[:1], use_tqdm=False)
    start = time.perf_counter()
    llm.generate(prompts, options, use_tqdm=False)
    taken = time.perf_counter() - start
    row("Rollouts", f"{name}, nano-vllm's bench, vLLM", "seconds", value=taken)
    row("Rollouts", f"{name}, nano-vllm's bench, vLLM", "tokens/s", value=sum(option.max_tokens for option in options) / taken)


what, *name = arguments.what.split(" ", 1)
dict(ceilings=ceilings, goldens=goldens, transformers=transformers, vllm=vllm)[what](*name)
