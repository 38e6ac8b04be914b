using System.Buffers.Binary;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>A tensor's bytes, and its type.</summary>
internal sealed record PlainTensor(DType Type, byte[] Bytes)
{
    public int Elements => Bytes.Length / Type.Size();

    /// <summary>The value of an element, in fp32, which holds every value of the three types.</summary>
    public float this[int element] => Type switch
    {
        DType.Float32 => BinaryPrimitives.ReadSingleLittleEndian(Bytes.AsSpan(element * 4)),
        DType.Float16 => (float)BinaryPrimitives.ReadHalfLittleEndian(Bytes.AsSpan(element * 2)),
        _ => BitConverter.Int32BitsToSingle(BinaryPrimitives.ReadUInt16LittleEndian(Bytes.AsSpan(element * 2)) << 16),
    };

    public byte[] Digest() => TensorDigest.Of(Bytes);

    /// <summary>The tensor with other values of the same type at some elements.</summary>
    public PlainTensor With(uint[] indices, PlainTensor values)
    {
        (byte[] bytes, int size) = ([.. Bytes], Type.Size());
        for (int i = 0; i < indices.Length; i++) values.Bytes.AsSpan(i * size, size).CopyTo(bytes.AsSpan((int)indices[i] * size));
        return new PlainTensor(Type, bytes);
    }

    /// <summary>Values that convert badly among any bits: ties between two bf16, subnormals, infinities, NaN of every kind.</summary>
    public static PlainTensor Random(Random random, int elements, DType? given = null)
    {
        DType type = given ?? ((DType[])[DType.BFloat16, DType.Float16, DType.Float32])[random.Next(3)];
        byte[] bytes = new byte[elements * type.Size()];
        random.NextBytes(bytes);
        for (int i = 0; i < elements; i += random.Next(1, 4))
        {
            if (type == DType.Float32)
            {
                uint high = (uint)random.Next(1 << 16);
                if (random.Next(4) == 0) high = (high & 0x8000) | ((uint[])[0, 0x0080, 0x7F7F, 0x7F80, 0x7FFF])[random.Next(5)];
                uint low = ((uint[])[0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])[random.Next(6)];
                BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(i * 4), (high << 16) | low);
            }
            else
            {
                ushort sign = (ushort)(random.Next(2) << 15);
                ushort bits = ((ushort[])[0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7F80, 0x7FFF])[random.Next(10)];
                BinaryPrimitives.WriteUInt16LittleEndian(bytes.AsSpan(i * 2), (ushort)(sign | bits));
            }
        }

        return new PlainTensor(type, bytes);
    }
}

/// <summary>A model of some shape, and the expected content of its weights, from Hugging Face's names and not from the load plan.</summary>
internal sealed class PlainModel
{
    public PlainModel(string config)
    {
        Config = config;
        Spec = ModelSpec.Parse(System.Text.Encoding.UTF8.GetBytes(config));
        Plan = LoadPlan.Compile(Spec);
        Shapes = Spec.CheckpointTensors().ToDictionary(tensor => tensor.Name, tensor => tensor.Shape);
    }

    public string Config { get; }

    public ModelSpec Spec { get; }

    public LoadPlan Plan { get; }

    /// <summary>Of the tensors a checkpoint has.</summary>
    public Dictionary<string, IReadOnlyList<long>> Shapes { get; }

    public static PlainModel Of(string family, int layers, int heads, int kvHeads, int headDim, int hidden, int intermediate,
        int vocabulary, bool bias = false, bool tied = false) => new($$"""
        {"model_type": "{{family}}", "vocab_size": {{vocabulary}}, "hidden_size": {{hidden}}, "intermediate_size": {{intermediate}},
         "num_hidden_layers": {{layers}}, "num_attention_heads": {{heads}}, "num_key_value_heads": {{kvHeads}}, "head_dim": {{headDim}},
         "max_position_embeddings": 64, "attention_bias": {{(bias ? "true" : "false")}}, "mlp_bias": {{(bias ? "true" : "false")}},
         "tie_word_embeddings": {{(tied ? "true" : "false")}}}
        """);

    /// <summary>Shapes that are no multiple of any backend's tiles.</summary>
    public static PlainModel Random(Random random)
    {
        int kvHeads = random.Next(1, 4);
        return Of(((string[])["llama", "qwen2", "qwen3"])[random.Next(3)], random.Next(1, 3), kvHeads * random.Next(1, 4), kvHeads,
            2 * random.Next(1, 20), random.Next(2, 70), random.Next(2, 70), random.Next(2, 70), random.Next(2) == 0, random.Next(2) == 0);
    }

    public int Elements(string tensor) => checked((int)Shapes[tensor].Aggregate(1L, (product, length) => product * length));

    public Dictionary<string, PlainTensor> RandomTensors(Random random, DType? type = null)
        => Shapes.Keys.ToDictionary(name => name, name => PlainTensor.Random(random, Elements(name), type));

    /// <summary>Writes the folder that holds these tensors, in some order.</summary>
    public void Save(TemporaryFolder folder, Dictionary<string, PlainTensor> tensors, Random random)
    {
        folder.Write("config.json", Config);
        KeyValuePair<string, PlainTensor>[] all = [.. tensors];
        random.Shuffle(all);
        SafetensorsWriter.Write(folder["model.safetensors"],
            all.Select(tensor => (new TensorDeclaration(tensor.Key, tensor.Value.Type, Shapes[tensor.Key]), tensor.Value.Bytes)));
    }

    /// <summary>Checks that every element of every weight equals that of the checkpoint's tensor.</summary>
    /// <param name="values">Values by tensor, as sent.</param>
    /// <param name="weights">The set to check.</param>
    /// <param name="backend">The backend of the set.</param>
    public void AssertHolds(Dictionary<string, float[]> values, WeightSet weights, Backend backend)
    {
        foreach ((PlannedWeight weight, WeightSlot slot) in Plan.Weights.Select((weight, i) => (weight, new WeightSlot(i))))
        {
            float[] held = new float[weight.Outputs * weight.Inputs];
            backend.ReadWeight(weights[slot], 0, held);
            float[][] sources = [.. SourcesOf(weight.Name).Select(name => values[name])];
            float[] expected = sources is [var only] ? only : [.. sources.SelectMany(source => source)];
            Assert.Equal(expected.Length, held.Length);
            for (int i = 0; i < held.Length; i++)
            {
                float value = weight.IsVector ? expected[i] : Rounded(expected[i]);
                bool equal = BitConverter.SingleToInt32Bits(value) == BitConverter.SingleToInt32Bits(held[i]);
                if (!equal && !(float.IsNaN(value) && float.IsNaN(held[i])))
                    Assert.Fail($"{weight.Name} element {i} of {held.Length} is {held[i]}, sent was {expected[i]}");
            }
        }
    }

    public static float[] Values(PlainTensor tensor)
    {
        float[] values = new float[tensor.Elements];
        for (int i = 0; i < values.Length; i++) values[i] = tensor[i];
        return values;
    }

    /// <summary>To the nearer of two bf16, to the even one between them; NaN stays NaN.</summary>
    public static float Rounded(float value)
    {
        if (float.IsNaN(value)) return value;
        uint bits = BitConverter.SingleToUInt32Bits(value);
        uint rest = bits & 0xFFFF, below = bits - rest;
        bool up = rest > 0x8000 || (rest == 0x8000 && (below & 0x10000) != 0);
        return BitConverter.UInt32BitsToSingle(up ? below + 0x10000 : below);
    }

    /// <summary>The tensors that a weight is made of, in order, from the engine's name for it.</summary>
    private static string[] SourcesOf(string weight)
    {
        (string layer, string kind) = (weight[..(weight.LastIndexOf('.') + 1)], weight[(weight.LastIndexOf('.') + 1)..]);
        string attention = layer + "self_attn.", mlp = layer + "mlp.";
        return kind switch
        {
            "embedding" => ["model.embed_tokens.weight"],
            "final_norm" => ["model.norm.weight"],
            "head" => ["lm_head.weight"],
            "attention_norm" => [layer + "input_layernorm.weight"],
            "qkv" => [attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"],
            "qkv_bias" => [attention + "q_proj.bias", attention + "k_proj.bias", attention + "v_proj.bias"],
            "query_norm" => [attention + "q_norm.weight"],
            "key_norm" => [attention + "k_norm.weight"],
            "attention_output" => [attention + "o_proj.weight"],
            "attention_output_bias" => [attention + "o_proj.bias"],
            "mlp_norm" => [layer + "post_attention_layernorm.weight"],
            "gate_up" => [mlp + "gate_proj.weight", mlp + "up_proj.weight"],
            "gate_up_bias" => [mlp + "gate_proj.bias", mlp + "up_proj.bias"],
            "down" => [mlp + "down_proj.weight"],
            "down_bias" => [mlp + "down_proj.bias"],
            _ => throw new ArgumentOutOfRangeException(nameof(weight), weight, null),
        };
    }
}
