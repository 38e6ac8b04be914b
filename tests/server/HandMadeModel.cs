using System.Runtime.InteropServices;
using Rollout.Engine;
using Rollout.Kernels;

namespace Rollout.Server.Tests;

/// <summary>A Llama of any size with an untied head, its weights made by the test instead of trained.</summary>
internal sealed class HandMadeModel
{
    /// <summary>bf16 bits.</summary>
    public const ushort One = 0x3F80, Half = 0x3F00;

    private readonly List<(TensorDeclaration Tensor, byte[] Bytes)> _tensors = [];
    private readonly string _config;

    /// <param name="hidden">Width, in heads of 32.</param>
    /// <param name="intermediate">Of the gated MLP.</param>
    /// <param name="layers">Blocks.</param>
    /// <param name="vocabulary">Tokens.</param>
    /// <param name="fill">Gives a tensor its bf16 elements by its name; they are zero before.</param>
    public HandMadeModel(int hidden, int intermediate, int layers, int vocabulary, Action<string, Span<ushort>> fill)
    {
        _config = $$"""
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": {{hidden}},
             "intermediate_size": {{intermediate}}, "num_hidden_layers": {{layers}}, "num_attention_heads": {{hidden / 32}},
             "num_key_value_heads": {{hidden / 32}}, "vocab_size": {{vocabulary}}, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
             "tie_word_embeddings": false}
            """;
        using TemporaryFolder folder = new();
        WriteConfig(folder["config.json"]);
        foreach ((string name, IReadOnlyList<long> shape) in ModelSpec.Load(folder.Path).CheckpointTensors())
        {
            TensorDeclaration tensor = new(name, DType.BFloat16, shape);
            byte[] bytes = new byte[tensor.Bytes];
            fill(name, MemoryMarshal.Cast<byte, ushort>(bytes.AsSpan()));
            _tensors.Add((tensor, bytes));
        }
    }

    /// <summary>Random weights of a size that keeps numbers finite and samples unlike each other.</summary>
    public static HandMadeModel Random(int hidden, int intermediate, int layers, int vocabulary, int seed)
    {
        Random random = new(seed);
        return new HandMadeModel(hidden, intermediate, layers, vocabulary, (name, elements) =>
        {
            if (name.EndsWith("norm.weight", StringComparison.Ordinal))
            {
                elements.Fill(One);
                return;
            }

            // Any sign and mantissa, exponents of 1/64 to 1/8.
            random.NextBytes(MemoryMarshal.AsBytes(elements));
            for (int i = 0; i < elements.Length; i++) elements[i] = (ushort)(0x3C80 + (elements[i] & 0x817F));
        });
    }

    public IReadOnlyList<(TensorDeclaration Tensor, byte[] Bytes)> Tensors => _tensors;

    /// <summary>The elements of a tensor, to be changed between two updates.</summary>
    public Span<ushort> this[string name]
        => MemoryMarshal.Cast<byte, ushort>(_tensors.Single(entry => entry.Tensor.Name == name).Bytes.AsSpan());

    /// <summary>As a folder that can be loaded.</summary>
    public void Write(string folder)
    {
        WriteConfig(Path.Combine(folder, "config.json"));
        SafetensorsWriter.Write(Path.Combine(folder, "model.safetensors"), _tensors);
    }

    public void WriteConfig(string path) => File.WriteAllText(path, _config);
}
