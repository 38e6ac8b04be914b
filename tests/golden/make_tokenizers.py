#!/usr/bin/env python3
"""Train small byte-level BPE tokenizers of three makes and write what Hugging Face tokenizers does with hard strings.

    python3 make_tokenizers.py OUT_DIR

For each make (gpt2, qwen2, llama3) one folder OUT_DIR/NAME with
  tokenizer.json   as the library saves it
  cases.json       [{text, ids, special, decoded}]: ids without and with special tokens, and decode(ids) with special tokens skipped;
                   and {"decode": [{ids, decoded}]} for ids that no text gives
Needs: tokenizers.
"""
import json, os, random, sys
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN2 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
LLAMA3 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

WORDS = """the of and to in is that it was for on are as with his they at be this have from or one had by word but not what all were we
when your can said there use an each which she do how their if will up other about out many then them these so some her would make like
him into time has look two more write go see number no way could people my than first water been call who oil its now find long down day
did get come made may part return def class import self print while else true false null int string public static void namespace
straße naïve café résumé façade über größer ñandú élève привет мир как дела слово время 你好 世界 中文 分词 模型 日本語 こんにちは カタカナ 한국어
안녕하세요 שלום مرحبا हिन्दी ภาษาไทย Ελληνικά 🙂 🚀 👍🏽 👩‍👩‍👧 1 2 10 42 100 2024 31415 3.14 0x1F""".split()

CASES = [
    "", " ", "  ", "   a", "a   ", "\n", "\n\n\n", " \n \n", "\t\tx\ty", "a\r\nb\r\n\r\nc", "hello world", "Hello, World!",
    " hello", "hello ", "it's we're I'VE they'LL don't 'S 'd 'x ''s", "it\u017f IT'\u017f 'K \u212a",
    "3.14159 1234567890 12 1 ²³ ½ Ⅷ ٣٤٥ १२३", "x = y + 1; // c++ <= >= != && ||",
    "def f(x):\n    if x:\n        return x ** 2\n\n\nclass A:\n\tpass\n", "        indented",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg", "naïve café straße",
    "nai\u0308ve cafe\u0301 \u1112\u1161\u11ab \u0344 a\u0327\u0301 a\u0301\u0327 \u212b \u2126 \u0958 \ufb1d \U0001d15e",
    "привет мир, как дела?", "你好，世界！中文分词", "日本語とカタカナ、こんにちは。", "안녕하세요 한국어", "שלום مرحبا", "हिन्दी ภาษาไทย", "Ελληνικά ΣΊΣΥΦΟΣ",
    "🙂🚀👍🏽 👩‍👩‍👧 flags 🇩🇪🇫🇷 1️⃣", "𠮷野家 𝐇𝐞𝐥𝐥𝐨 𝟙𝟚𝟛 𐍈 𝒳1 a𝒳 𝒳a 𐒠𐒡 𞤀𞤢𞥐", "\U0001f9ff\U000e0067\U0010ffff\ue000\ufffd\ufffe",
    "zero\x00byte \x01\x1f\x7f\x80\x9f", "a\u0300\u0301\u0302\u0303\u0304", "\u0301start", "e\u0301\u0301",
    "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!!!!!!????????........", "http://example.com/a?b=c&d=e#f", "<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> ",
    "<|endoftext|><|endoftext|>", "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|im_start", "<|im_start|",
    "<||>", "<|im_start|><|im_start|>x<|im_end|", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "<tool_call><tool_caller>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "x caf\u00e9<tok> y", "x cafe\u0301<tok> y",
    "two words<tok>", "ttthe thethe", "ab  cd   ef    gh", "a \n b  \n  c", "tail \n", "tail\n ", "mixed\t \n\t tabs", "'", "''",
    "'re", "RE'RE", "don’t “quoted” — dash…", "1,234,567.89", "return return returned returning", "The THE tHe",
    "_under_score__ __init__", "a_b_c 1_000", "ﬁ ﬂ ligature ½", "\ufeffbom", "x\u0378y", "[]{}()\\|/`~@#$%^&*",
]


def train(name):
    split = {"gpt2": None, "qwen2": QWEN2, "llama3": LLAMA3}[name]
    tok = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if name == "qwen2":
        tok.normalizer = normalizers.NFC()
    if split is None:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    rng = random.Random(7)
    text = [" ".join(rng.choices(WORDS, k=12)) + rng.choice(["\n", ".\n", "  \n\n", "!"]) for _ in range(3000)]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(text, trainer)
    special = lambda s: AddedToken(s, special=True, normalized=False)
    if name == "gpt2":
        tok.post_processor = processors.ByteLevel(trim_offsets=True)
        tok.add_special_tokens([special("<|endoftext|>")])
        tok.add_tokens([AddedToken("two words<tok>", normalized=True)])
    elif name == "qwen2":
        tok.post_processor = processors.ByteLevel(trim_offsets=False)
        tok.add_special_tokens([special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>")])
        tok.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<tool_call><tool", normalized=False),
                        AddedToken("cafe\u0301<tok>", normalized=True)])
    else:
        tok.add_special_tokens([special(f"<|{s}|>") for s in
                                ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")])
        bos = tok.token_to_id("<|begin_of_text|>")
        tok.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                                          special_tokens=[("<|begin_of_text|>", bos)])])
    return tok


def mutate(name, path):
    """Makes the two merge layouts and what training does not give: a whole word that no merge reaches (ignore_merges)."""
    with open(path) as f:
        data = json.load(f)
    if name == "gpt2":
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    if name == "llama3":
        size = len(data["model"]["vocab"])
        data["model"]["vocab"] |= {"Ġwhole": size, "supercalifragilistic": size + 1}
        for token in data["added_tokens"]:
            token["id"] += 2
        for token in data["post_processor"]["processors"][1]["special_tokens"].values():
            token["ids"] = [id + 2 for id in token["ids"]]
    with open(path, "w") as f:
        json.dump(data, f, ensure_ascii=False, separators=(",", ":"))


for name in ("gpt2", "qwen2", "llama3"):
    folder = os.path.join(sys.argv[1], name)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "tokenizer.json")
    train(name).save(path)
    mutate(name, path)
    tok = Tokenizer.from_file(path)
    rng = random.Random(11)
    texts = CASES + ["supercalifragilistic whole wholes"]
    pool = "".join(CASES) + " \n\t'" * 20
    texts += ["".join(rng.choice(pool) for _ in range(rng.randint(1, 40))) for _ in range(120)]
    cases = [dict(text=t, ids=tok.encode(t, add_special_tokens=False).ids, special=tok.encode(t).ids,
                  decoded=tok.decode(tok.encode(t, add_special_tokens=False).ids)) for t in texts]
    size = tok.get_vocab_size()
    streams = [[rng.randrange(size + 20) for _ in range(rng.randint(1, 12))] for _ in range(60)]
    decode = [dict(ids=ids, decoded=tok.decode(ids)) for ids in streams]
    with open(os.path.join(folder, "cases.json"), "w") as f:
        f.write('{"cases":[\n' + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n],\"decode\":[\n"
                + ",\n".join(json.dumps(c, separators=(",", ":")) for c in decode) + "\n]}\n")
    print(name, size, sum(len(c["ids"]) for c in cases))
