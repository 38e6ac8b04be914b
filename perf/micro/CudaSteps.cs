using System.Diagnostics;
using System.Globalization;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Micro;

/// <summary>
/// What a decode step costs on a GPU, beside reading its weights, keys and values once; alone, and with the next step queued before the answers
/// of the one before are waited for, as the engine does. Steps are the same every time, so from the second on each is one graph.
/// </summary>
internal static class CudaSteps
{
    private const int Copies = 20;

    private static readonly (int Batch, int Context, int Shared)[] s_shapes =
        [(1, 128, 0), (8, 128, 0), (32, 128, 0), (64, 128, 0), (256, 128, 0), (8, 4096, 0), (64, 1024, 0), (64, 1024, 896)];

    /// <param name="device">Which GPU.</param>
    /// <param name="steps">To take the median of.</param>
    /// <param name="folder">Has the model's config.json; weights are random.</param>
    /// <param name="text">Gets the table.</param>
    public static void Print(int device, int steps, string folder, TextWriter text)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(steps, 1);
        ModelSpec model = ModelSpec.Load(folder);
        LoadPlan plan = LoadPlan.Compile(model);
        using CudaBackend backend = new(device);
        using WeightSet weights = WeightSet.Allocate(backend, plan, model.Layers);
        foreach (WeightShape shape in plan.Weights) Workload.Fill(backend, weights[shape.Slot]);
        double bytesPerSecond = CopyRate(backend, weights.Embedding);
        long weightBytes = weights.Bytes - (ReferenceEquals(weights.Head, weights.Embedding) ? 0 : weights.Embedding.Bytes); // a step reads few rows of that
        text.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"{backend.Name}. Copying on the device moves {bytesPerSecond / 1e9:F0} GB/s, read and written. Weights {weightBytes / 1e9:F3} GB. Medians of {steps}."));
        text.WriteLine();
        text.WriteLine("| batch | context | of it shared | ms a step, alone | ms a step, one ahead | tokens/s | floor, ms | of the floor |");
        text.WriteLine("|--:|--:|--:|--:|--:|--:|--:|--:|");
        foreach ((int batch, int context, int shared) in s_shapes)
        {
            int sharedBlocks = shared / KvCache.BlockTokens, ownBlocks = Workload.BlocksOf(context) - sharedBlocks;
            using KvCache cache = backend.AllocateKvCache(model.Layers, sharedBlocks + (batch * ownBlocks), model.KvHeads, model.HeadDim);
            using Transformer transformer = new(model, backend, batch, context);
            StepLayout[] layouts = [Workload.DecodeStep(batch, context, shared), Workload.DecodeStep(batch, context, shared)];
            double alone = Median(steps, ahead: false), oneAhead = Median(steps, ahead: true);
            double kvBytes = 2.0 * model.Layers * model.KvHeads * model.HeadDim * backend.KvElementBytes * (shared + ((double)batch * (context - shared)));
            double floor = (weightBytes + kvBytes) / bytesPerSecond;
            text.WriteLine(string.Create(CultureInfo.InvariantCulture,
                $"| {batch} | {context} | {shared} | {alone * 1e3:F3} | {oneAhead * 1e3:F3} | {batch / oneAhead:F0} | {floor * 1e3:F3} | {floor / oneAhead:P0} |"));

            double Median(int count, bool ahead)
            {
                double[] seconds = new double[count];
                int warm = Math.Min(count, 5), next = 0;
                Queue(next);
                if (!ahead) backend.FinishStep(layouts[0]);
                for (int i = -warm; i < count; i++)
                {
                    long start = Stopwatch.GetTimestamp();
                    next ^= 1;
                    Queue(next);
                    backend.FinishStep(layouts[ahead ? next ^ 1 : next]);
                    if (i >= 0) seconds[i] = Stopwatch.GetElapsedTime(start).TotalSeconds;
                }

                if (ahead) backend.FinishStep(layouts[next]);
                Array.Sort(seconds);
                return seconds[count / 2];
            }

            void Queue(int layout)
            {
                transformer.Forward(layouts[layout], weights, cache);
                transformer.Sample(layouts[layout], weights);
            }
        }
    }

    /// <summary>Bytes read and written a second, by the best of some copies of the largest matrix.</summary>
    private static double CopyRate(CudaBackend backend, Weight source)
    {
        using Weight destination = backend.AllocateWeight(source.Outputs, source.Inputs);
        TimeSpan best = TimeSpan.MaxValue;
        for (int i = 0; i < Copies; i++)
        {
            long start = Stopwatch.GetTimestamp();
            backend.CopyWeight(source, destination);
            TimeSpan taken = Stopwatch.GetElapsedTime(start);
            best = taken < best ? taken : best;
        }

        return 2.0 * source.Bytes / best.TotalSeconds;
    }
}
