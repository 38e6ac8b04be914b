using System.Buffers.Binary;
using System.Text.Json;
using System.Text.Json.Nodes;
using Rollout.Client.Torch;

namespace Rollout.Examples.Grpo;

/// <summary>Writes a policy as a folder that Hugging Face transformers and the sidecar can load.</summary>
public static class HuggingFaceFolder
{
    public const string EndOfText = "<|endoftext|>";

    public static void Write(string folder, Policy policy)
    {
        Directory.CreateDirectory(folder);
        WriteJson(Path.Combine(folder, "config.json"), Config(policy.Config));
        WriteJson(Path.Combine(folder, "tokenizer.json"), Tokenizer());
        WriteJson(Path.Combine(folder, "tokenizer_config.json"), new JsonObject
        {
            ["tokenizer_class"] = "PreTrainedTokenizerFast",
            ["eos_token"] = EndOfText,
            ["pad_token"] = EndOfText,
            ["clean_up_tokenization_spaces"] = false,
            ["model_max_length"] = policy.Config.MaxPositionEmbeddings,
        });
        WriteSafetensors(Path.Combine(folder, "model.safetensors"), TorchStateDict.Of(policy, PublishedType.BFloat16));
    }

    private static JsonObject Config(PolicyConfig config) => new()
    {
        ["architectures"] = new JsonArray("Qwen3ForCausalLM"),
        ["model_type"] = "qwen3",
        ["dtype"] = "bfloat16",
        ["vocab_size"] = config.VocabSize,
        ["hidden_size"] = config.HiddenSize,
        ["intermediate_size"] = config.IntermediateSize,
        ["num_hidden_layers"] = config.NumHiddenLayers,
        ["layer_types"] = new JsonArray([.. Enumerable.Range(0, config.NumHiddenLayers).Select(_ => (JsonNode)"full_attention")]),
        ["num_attention_heads"] = config.NumAttentionHeads,
        ["num_key_value_heads"] = config.NumKeyValueHeads,
        ["head_dim"] = config.HeadDim,
        ["hidden_act"] = "silu",
        ["attention_bias"] = false,
        ["attention_dropout"] = 0.0,
        ["initializer_range"] = 0.02,
        ["max_position_embeddings"] = config.MaxPositionEmbeddings,
        ["max_window_layers"] = config.NumHiddenLayers,
        ["rms_norm_eps"] = config.RmsNormEps,
        ["rope_parameters"] = new JsonObject { ["rope_type"] = "default", ["rope_theta"] = config.RopeTheta },
        ["sliding_window"] = null,
        ["use_sliding_window"] = false,
        ["use_cache"] = true,
        ["tie_word_embeddings"] = config.TieWordEmbeddings,
        ["bos_token_id"] = null,
        ["eos_token_id"] = ArithmeticTask.EndOfText,
        ["pad_token_id"] = ArithmeticTask.EndOfText,
    };

    /// <summary>Byte-level BPE without a single merge: token n is byte n, and one special token ends a text.</summary>
    private static JsonObject Tokenizer()
    {
        JsonObject vocabulary = new();
        int unprintable = 0;
        for (int b = 0; b < 256; b++)
        {
            // GPT-2's alphabet: printable Latin-1 characters represent themselves, code points from 256 on the other bytes.
            bool printable = b is (>= '!' and <= '~') or (>= 0xa1 and <= 0xac) or >= 0xae;
            vocabulary[((char)(printable ? b : 256 + unprintable++)).ToString()] = b;
        }

        JsonObject ByteLevel() => new()
        {
            ["type"] = "ByteLevel",
            ["add_prefix_space"] = false,
            ["trim_offsets"] = true,
            ["use_regex"] = false,
        };
        return new()
        {
            ["version"] = "1.0",
            ["truncation"] = null,
            ["padding"] = null,
            ["added_tokens"] = new JsonArray(new JsonObject
            {
                ["id"] = ArithmeticTask.EndOfText,
                ["content"] = EndOfText,
                ["single_word"] = false,
                ["lstrip"] = false,
                ["rstrip"] = false,
                ["normalized"] = false,
                ["special"] = true,
            }),
            ["normalizer"] = null,
            ["pre_tokenizer"] = ByteLevel(),
            ["post_processor"] = ByteLevel(),
            ["decoder"] = ByteLevel(),
            ["model"] = new JsonObject
            {
                ["type"] = "BPE",
                ["dropout"] = null,
                ["unk_token"] = null,
                ["continuing_subword_prefix"] = null,
                ["end_of_word_suffix"] = null,
                ["fuse_unk"] = false,
                ["byte_fallback"] = false,
                ["vocab"] = vocabulary,
                ["merges"] = new JsonArray(),
            },
        };
    }

    private static void WriteSafetensors(string path, IReadOnlyList<TorchTensor> tensors)
    {
        JsonObject header = new() { ["__metadata__"] = new JsonObject { ["format"] = "pt" } };
        long offset = 0;
        foreach (TorchTensor tensor in tensors)
        {
            header[tensor.Name] = new JsonObject
            {
                ["dtype"] = tensor.DType,
                ["shape"] = new JsonArray([.. tensor.Shape.Select(size => (JsonNode)size)]),
                ["data_offsets"] = new JsonArray(offset, offset + tensor.ByteLength),
            };
            offset += tensor.ByteLength;
        }

        // Spaces after the header put the data on an 8-byte boundary.
        byte[] json = JsonSerializer.SerializeToUtf8Bytes(header);
        int length = (json.Length + 7) / 8 * 8;
        byte[] start = new byte[8 + length];
        start.AsSpan().Fill((byte)' ');
        BinaryPrimitives.WriteInt64LittleEndian(start, length);
        json.CopyTo(start, 8);

        using FileStream file = File.Create(path);
        file.Write(start);
        foreach (TorchTensor tensor in tensors)
        {
            byte[] bytes = new byte[tensor.ByteLength];
            tensor.CopyTo(bytes);
            file.Write(bytes);
        }
    }

    private static void WriteJson(string path, JsonNode json) =>
        File.WriteAllText(path, json.ToJsonString(new() { WriteIndented = true }) + "\n");
}
