using System.Runtime.InteropServices;
using Rollout.Engine;
using Rollout.Kernels;

namespace Rollout.Load;

/// <summary>
/// Shape S: Qwen2 architecture, 24 layers, hidden 896, MLP 4864, 14 query and 2 key-value heads, vocabulary 32768, tied head, random bf16
/// weights (387 M parameters, 0.77 GB). llama.cpp's batched-bench runs use the same shape and prompts.
/// </summary>
internal static class ShapeS
{
    public const string WeightsFile = "model.safetensors";

    public const int Vocabulary = 32768;

    private const string Config = """
        {
          "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
          "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
          "vocab_size": 32768, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
          "tie_word_embeddings": true, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2
        }
        """;

    /// <summary>Writes the model once; later runs find it.</summary>
    public static string Folder()
    {
        string folder = Path.Combine(Path.GetTempPath(), "rollout-shape-s-1");
        if (!File.Exists(Path.Combine(folder, WeightsFile))) Write(folder);
        return folder;
    }

    /// <summary>
    /// Writes the model: config.json, then the tensors of <see cref="ModelSpec.CheckpointTensors"/> in one file, in order.
    /// </summary>
    public static void Write(string folder)
    {
        string weights = Path.Combine(folder, WeightsFile);
        Directory.CreateDirectory(folder);
        File.WriteAllText(Path.Combine(folder, "config.json"), Config);
        ModelSpec spec = ModelSpec.Load(folder);
        TensorDeclaration[] tensors = [.. spec.CheckpointTensors().Select(t => new TensorDeclaration(t.Name, DType.BFloat16, t.Shape))];
        string partial = weights + ".partial";
        using (SafetensorsWriter writer = new(partial, tensors))
        {
            Random random = new(20261122);
            foreach (TensorDeclaration tensor in tensors)
            {
                bool norm = tensor.Name.EndsWith("norm.weight", StringComparison.Ordinal);
                ushort[] values = new ushort[tensor.Bytes / 2];
                for (int i = 0; i < values.Length; i++)
                {
                    float value = norm ? 1 : 0.035f * (random.NextSingle() * 2 - 1); // uniform, standard deviation 0.02
                    values[i] = (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16);
                }

                writer.Write(MemoryMarshal.AsBytes(values.AsSpan()));
            }

            writer.Complete();
        }

        File.Move(partial, weights);
    }
}
