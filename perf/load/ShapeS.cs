using System.Diagnostics;
using System.Runtime.InteropServices;
using Rollout.Engine;
using Rollout.Kernels;

namespace Rollout.Load;

/// <summary>
/// Shape S of performance.md: Qwen2 architecture, 24 layers, hidden 896, MLP 4864, 14 query and 2 key-value heads, vocabulary 32768, tied
/// head, random bf16 weights (387 M parameters, 0.77 GB). Same shape and prompts as llama.cpp's batched-bench runs beside it.
/// </summary>
internal static class ShapeS
{
    public const string WeightsFile = "model.safetensors";

    private const int PromptTokens = 128;
    private const int DecodeSteps = 32;
    private const int PrefillTokens = 256;
    private const int Vocabulary = 32768;

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

    /// <summary>Writes the model: config.json, then the tensors of <see cref="ModelSpec.CheckpointTensors"/> in one file, in order.</summary>
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

    public static async Task<ShapeSResult> MeasureAsync(IReadOnlyList<int> batches, int threads, int repetitions, IProgress<string> progress)
    {
        string folder = Folder();
        progress.Report("machine limits");
        double gflops = MachineLimits.MeasureFmaGflops(threads);
        double gbps = MachineLimits.MeasureReadGBps(threads);

        progress.Report("loading");
        await using RolloutEngine engine = RolloutEngine.Load(folder, new CpuBackend(threads),
            new EngineOptions { MaxContext = 1024, MaxSequences = 64, MaxBatchTokens = 512 });

        int run = 0;
        double prefill = await MedianAsync(repetitions, async () =>
        {
            progress.Report("prefill");
            double seconds = await TimeAsync(engine, 1, PrefillTokens, maxTokens: 1, salt: $"{run++}");
            return PrefillTokens / seconds;
        });

        SortedDictionary<int, double> decode = [];
        foreach (int batch in batches)
        {
            // With the prompts cached, a run is one short step and then decode steps; the difference of two lengths is decode alone.
            await TimeAsync(engine, batch, PromptTokens, maxTokens: 1, salt: "decode");
            decode[batch] = await MedianAsync(repetitions, async () =>
            {
                progress.Report($"decode, batch {batch}");
                double one = await TimeAsync(engine, batch, PromptTokens, maxTokens: 1, salt: "decode");
                double all = await TimeAsync(engine, batch, PromptTokens, maxTokens: 1 + DecodeSteps, salt: "decode");
                return batch * DecodeSteps / (all - one);
            });
        }

        return new ShapeSResult(engine.Backend.Name, prefill, decode, gflops, gbps);
    }

    /// <summary>Seconds until all of <paramref name="groups"/> different prompts have their tokens.</summary>
    private static async Task<double> TimeAsync(RolloutEngine engine, int groups, int promptTokens, int maxTokens, string salt)
    {
        long started = Stopwatch.GetTimestamp();
        Group[] all = new Group[groups];
        for (int i = 0; i < groups; i++)
        {
            Random random = new(i);
            all[i] = engine.Submit(new GroupRequest
            {
                Id = $"{i}",
                Prompt = [.. Enumerable.Range(0, promptTokens).Select(_ => random.Next(Vocabulary))],
                MaxTokens = maxTokens,
                Seed = (ulong)i,
                IgnoreEos = true,
                CacheSalt = salt,
            });
        }

        foreach (Group group in all) await group.Completed;
        double seconds = Stopwatch.GetElapsedTime(started).TotalSeconds;
        Sequence? failed = all.SelectMany(group => group.Samples).FirstOrDefault(sample => sample.Published != maxTokens);
        return failed is null ? seconds : throw new InvalidOperationException($"a sample ended early: {failed.FinishReason} {failed.Error}");
    }

    private static async Task<double> MedianAsync(int repetitions, Func<Task<double>> measure)
    {
        await measure(); // the first pays for compilation
        double[] results = new double[repetitions];
        for (int i = 0; i < repetitions; i++) results[i] = await measure();
        Array.Sort(results);
        return results[repetitions / 2];
    }
}

/// <summary>Tokens per second, medians; the machine's own limits from the same run.</summary>
internal sealed record ShapeSResult(string Backend, double Prefill256, SortedDictionary<int, double> Decode, double FmaGflops, double ReadGBps);
