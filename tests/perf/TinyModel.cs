using System.Runtime.InteropServices;
using System.Text;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Micro;

namespace Rollout.Perf.Tests;

/// <summary>A Qwen2 of given sizes with random weights.</summary>
internal static class TinyModel
{
    public static byte[] Config(int layers, int hidden, int intermediate, int heads, int kvHeads, int vocabulary)
        => Encoding.UTF8.GetBytes($$"""
        {
          "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
          "hidden_size": {{hidden}}, "intermediate_size": {{intermediate}}, "num_hidden_layers": {{layers}},
          "num_attention_heads": {{heads}}, "num_key_value_heads": {{kvHeads}}, "vocab_size": {{vocabulary}},
          "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": true
        }
        """);

    /// <summary>A checkpoint whose step takes some tens of microseconds, so that the engine's overhead is visible.</summary>
    public static void Write(string folder)
    {
        byte[] config = Config(layers: 2, hidden: 64, intermediate: 128, heads: 4, kvHeads: 2, vocabulary: 512);
        File.WriteAllBytes(Path.Combine(folder, "config.json"), config);
        SafetensorsWriter.Write(Path.Combine(folder, "model.safetensors"), ModelSpec.Parse(config).CheckpointTensors().Select(tensor =>
        {
            TensorDeclaration declaration = new(tensor.Name, DType.BFloat16, tensor.Shape);
            return (declaration, MemoryMarshal.AsBytes<ushort>(Workload.RandomBFloat16(declaration.Bytes / 2)).ToArray());
        }));
    }
}
