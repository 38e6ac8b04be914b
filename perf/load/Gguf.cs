using System.Runtime.InteropServices;
using System.Text;
using Rollout.Engine;

namespace Rollout.Load;

/// <summary>
/// Shape S as a GGUF file (version 3, github.com/ggml-org/ggml, docs/gguf.md), so that llama.cpp and its relatives can run the same
/// weights: architecture qwen2, matrices as BF16 or Q8_0, vectors as F32, and a vocabulary of made-up words, since prompts are token ids.
/// </summary>
internal static class Gguf
{
    private const int Alignment = 32;
    private const int Q8Block = 32; // values that share a scale

    /// <summary>Value types of the header.</summary>
    private enum Field : uint
    {
        UInt32 = 4,
        Int32 = 5,
        Float32 = 6,
        String = 8,
        Array = 9,
    }

    /// <summary>Tensor types.</summary>
    private enum Type : uint
    {
        F32 = 0,
        Q8_0 = 8,
        BF16 = 30,
    }

    /// <summary>
    /// The file of a model folder in this format, written once, next to the model. <paramref name="format"/>: bf16 or q8_0.
    /// </summary>
    public static string Of(string folder, string format)
    {
        string path = Path.Combine(folder, $"model-{format}.gguf");
        if (File.Exists(path)) return path;
        string partial = path + ".partial";
        using (FileStream file = File.Create(partial)) Write(file, folder, format == "q8_0" ? Type.Q8_0 : Type.BF16);
        File.Move(partial, path, overwrite: true);
        return path;
    }

    private static void Write(FileStream file, string folder, Type matrices)
    {
        ModelSpec spec = ModelSpec.Load(folder);
        using Checkpoint checkpoint = Checkpoint.Open(folder);
        (string Name, CheckpointTensor Source, Type Type, long Bytes)[] tensors = [.. checkpoint.Tensors.Select(entry =>
        {
            Type type = entry.Value.Info.Shape.Count == 2 ? matrices : Type.F32;
            return (NameOf(entry.Key), entry.Value, type, BytesOf(entry.Value.Info.Elements, type));
        })];

        using BinaryWriter writer = new(file, Encoding.UTF8, leaveOpen: true);
        Action<BinaryWriter>[] fields =
        [
            w => Text(w, "general.architecture", "qwen2"),
            w => Text(w, "general.name", "shape-s"),
            w => Number(w, "qwen2.block_count", spec.Layers.Count),
            w => Number(w, "qwen2.context_length", spec.MaxPositions),
            w => Number(w, "qwen2.embedding_length", spec.HiddenSize),
            w => Number(w, "qwen2.feed_forward_length", spec.Layers[0].FeedForward.Width),
            w => Number(w, "qwen2.attention.head_count", spec.Layers[0].Attention.Heads),
            w => Number(w, "qwen2.attention.head_count_kv", spec.Layers[0].Attention.KvHeads),
            w => Real(w, "qwen2.attention.layer_norm_rms_epsilon", 1e-6f),
            w => Real(w, "qwen2.rope.freq_base", 1000000f),
            w => Text(w, "tokenizer.ggml.model", "gpt2"),
            w => Text(w, "tokenizer.ggml.pre", "qwen2"),
            w => Texts(w, "tokenizer.ggml.tokens", [.. Enumerable.Range(0, spec.VocabSize).Select(Word)]),
            w => Ints(w, "tokenizer.ggml.token_type", [.. Enumerable.Repeat(1, spec.VocabSize)]),
            w => Texts(w, "tokenizer.ggml.merges", ["t 2"]),
            w => Number(w, "tokenizer.ggml.eos_token_id", 2),
        ];
        writer.Write("GGUF"u8);
        writer.Write(3u);
        writer.Write((ulong)tensors.Length);
        writer.Write((ulong)fields.Length);
        foreach (Action<BinaryWriter> field in fields) field(writer);
        long offset = 0;
        foreach ((string name, CheckpointTensor source, Type type, long bytes) in tensors)
        {
            String(writer, name);
            writer.Write((uint)source.Info.Shape.Count);
            foreach (long dimension in source.Info.Shape.Reverse()) writer.Write((ulong)dimension); // innermost first
            writer.Write((uint)type);
            writer.Write((ulong)offset);
            offset += Aligned(bytes);
        }

        Pad(writer);
        foreach ((_, CheckpointTensor source, Type type, _) in tensors)
        {
            byte[] bf16 = new byte[source.Info.Bytes];
            source.Read(0, bf16);
            writer.Write(Convert(MemoryMarshal.Cast<byte, ushort>(bf16), type));
            Pad(writer);
        }
    }

    private static string NameOf(string tensor)
    {
        string[] parts = tensor.Split('.');
        return tensor switch
        {
            "model.embed_tokens.weight" => "token_embd.weight",
            "model.norm.weight" => "output_norm.weight",
            _ => $"blk.{parts[2]}.{Part(parts[^2])}.{parts[^1]}",
        };

        static string Part(string name) => name switch
        {
            "input_layernorm" => "attn_norm",
            "post_attention_layernorm" => "ffn_norm",
            "q_proj" => "attn_q",
            "k_proj" => "attn_k",
            "v_proj" => "attn_v",
            "o_proj" => "attn_output",
            "gate_proj" => "ffn_gate",
            "up_proj" => "ffn_up",
            "down_proj" => "ffn_down",
            _ => throw new InvalidOperationException($"no GGUF name for '{name}'"),
        };
    }

    private static long BytesOf(long elements, Type type) => type switch
    {
        Type.F32 => elements * 4,
        Type.BF16 => elements * 2,
        _ => elements / Q8Block * (Q8Block + 2),
    };

    private static byte[] Convert(ReadOnlySpan<ushort> bf16, Type type)
    {
        byte[] bytes = new byte[BytesOf(bf16.Length, type)];
        if (type == Type.BF16)
        {
            MemoryMarshal.AsBytes(bf16).CopyTo(bytes);
            return bytes;
        }

        if (type == Type.F32)
        {
            Span<float> floats = MemoryMarshal.Cast<byte, float>(bytes.AsSpan());
            for (int i = 0; i < bf16.Length; i++) floats[i] = ToSingle(bf16[i]);
            return bytes;
        }

        for (int block = 0; block < bf16.Length / Q8Block; block++)
        {
            ReadOnlySpan<ushort> values = bf16.Slice(block * Q8Block, Q8Block);
            Span<byte> into = bytes.AsSpan(block * (Q8Block + 2), Q8Block + 2);
            float largest = 0;
            foreach (ushort value in values) largest = MathF.Max(largest, MathF.Abs(ToSingle(value)));
            float scale = largest / 127;
            MemoryMarshal.Write(into, (Half)scale);
            for (int i = 0; i < Q8Block; i++) into[2 + i] = (byte)(sbyte)(scale == 0 ? 0 : MathF.Round(ToSingle(values[i]) / scale));
        }

        return bytes;
    }

    private static float ToSingle(ushort bf16) => BitConverter.UInt32BitsToSingle((uint)bf16 << 16);

    /// <summary>
    /// Printable characters, newline and space in the alphabet of byte-level vocabularies, then made-up words. All of it is valid text: a
    /// server that parses its output would fail on invalid bytes.
    /// </summary>
    private static string Word(int id) => id switch
    {
        < '~' - '!' + 1 => $"{(char)('!' + id)}",
        '~' - '!' + 1 => "\u010a",
        '~' - '!' + 2 => "\u0120",
        _ => $"t{id}",
    };

    private static long Aligned(long bytes) => (bytes + Alignment - 1) / Alignment * Alignment;

    private static void Pad(BinaryWriter writer)
    {
        writer.Flush();
        writer.Write(new byte[Aligned(writer.BaseStream.Position) - writer.BaseStream.Position]);
    }

    private static void String(BinaryWriter writer, string value)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(value);
        writer.Write((ulong)bytes.Length);
        writer.Write(bytes);
    }

    private static void Key(BinaryWriter writer, string key, Field type)
    {
        String(writer, key);
        writer.Write((uint)type);
    }

    private static void Text(BinaryWriter writer, string key, string value)
    {
        Key(writer, key, Field.String);
        String(writer, value);
    }

    private static void Number(BinaryWriter writer, string key, int value)
    {
        Key(writer, key, Field.UInt32);
        writer.Write((uint)value);
    }

    private static void Real(BinaryWriter writer, string key, float value)
    {
        Key(writer, key, Field.Float32);
        writer.Write(value);
    }

    private static void Texts(BinaryWriter writer, string key, string[] values)
    {
        Key(writer, key, Field.Array);
        writer.Write((uint)Field.String);
        writer.Write((ulong)values.Length);
        foreach (string value in values) String(writer, value);
    }

    private static void Ints(BinaryWriter writer, string key, int[] values)
    {
        Key(writer, key, Field.Array);
        writer.Write((uint)Field.Int32);
        writer.Write((ulong)values.Length);
        foreach (int value in values) writer.Write(value);
    }
}
