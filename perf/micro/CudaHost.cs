using System.Diagnostics;
using System.Globalization;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Micro;

/// <summary>
/// The host's part of a decode step on a GPU: everything but the device's work. It depends on layers, rows and context, not on widths, so
/// the model is narrow. To be run on the simulated device with ROLLOUT_SIM_IDLE=1, which does no work; on a real device only the first two
/// columns are host time alone.
/// </summary>
internal static class CudaHost
{
    private const string Config = """
        {
          "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
          "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
          "vocab_size": 512, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": true
        }
        """;

    private static readonly (int Batch, int Context, int Shared)[] s_shapes =
        [(1, 128, 0), (64, 800, 0), (256, 800, 0), (256, 800, 640), (256, 4096, 0)];

    private static readonly TimeSpan s_warmUp = TimeSpan.FromSeconds(1);

    /// <param name="steps">Steps to take the median of.</param>
    /// <param name="text">Receives the table.</param>
    public static void Print(int steps, TextWriter text)
    {
        string folder = Directory.CreateTempSubdirectory("rollout-host-").FullName;
        File.WriteAllText(Path.Combine(folder, "config.json"), Config);
        ModelSpec model = ModelSpec.Load(folder);
        Transformer transformer = new(model);
        using CudaBackend backend = new(0);
        using WeightSet weights = WeightSet.Allocate(backend, transformer.Weights);
        text.WriteLine($"{backend.Name}, {model.Layers.Count} layers, medians of {steps}.");
        text.WriteLine();
        text.WriteLine("| batch | context | of it shared | begin, us | operations, us | send, us | finish, us | all, us |");
        text.WriteLine("|--:|--:|--:|--:|--:|--:|--:|--:|");
        foreach ((int batch, int context, int shared) in s_shapes)
        {
            int sharedBlocks = shared / KvCache.BlockTokens, ownBlocks = Workload.BlocksOf(context) - sharedBlocks;
            using KvCache cache = backend.AllocateKvCache(sharedBlocks + (batch * ownBlocks), transformer.Kv);
            using Workspace workspace = transformer.AllocateWorkspace(backend, batch, context);
            StepLayout[] layouts = [Workload.DecodeStep(batch, context, shared), Workload.DecodeStep(batch, context, shared)];
            Queue(layouts[0]); // allocates memory
            backend.FinishStep(layouts[0]);
            foreach (StepLayout rehearsal in backend.Rehearsals(layouts[0])) Queue(rehearsal);

            int turn = 0;
            double[][] seconds = [.. Enumerable.Range(0, 5).Select(_ => new double[steps])];
            long warming = Stopwatch.GetTimestamp(); // until the code is as optimised as in a server after its first second
            for (int i = -1; i < steps; i += Stopwatch.GetElapsedTime(warming) > s_warmUp ? 1 : 0)
            {
                StepLayout step = layouts[turn ^= 1];
                long start = Stopwatch.GetTimestamp();
                backend.BeginStep(step);
                double begun = Stopwatch.GetElapsedTime(start).TotalMicroseconds;
                start = Stopwatch.GetTimestamp();
                transformer.Forward(step, weights, cache, workspace); // begins again
                double forward = Stopwatch.GetElapsedTime(start).TotalMicroseconds - begun;
                long sampled = Stopwatch.GetTimestamp();
                transformer.Sample(step, weights, workspace);
                double sent = Stopwatch.GetElapsedTime(sampled).TotalMicroseconds;
                long last = Stopwatch.GetTimestamp();
                backend.FinishStep(step);
                double finished = Stopwatch.GetElapsedTime(last).TotalMicroseconds;
                if (i < 0) continue;
                double[] parts = [begun, forward, sent, finished, begun + forward + sent + finished];
                for (int part = 0; part < parts.Length; part++) seconds[part][i] = parts[part];
            }

            void Queue(StepLayout step)
            {
                transformer.Forward(step, weights, cache, workspace);
                transformer.Sample(step, weights, workspace);
            }

            string[] medians = [.. seconds.Select(part => part.Order().ElementAt(steps / 2).ToString("F1", CultureInfo.InvariantCulture))];
            text.WriteLine($"| {batch} | {context} | {shared} | {string.Join(" | ", medians)} |");
        }

        Directory.Delete(folder, recursive: true);
    }
}
