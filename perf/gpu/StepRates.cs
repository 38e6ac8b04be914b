using System.Diagnostics;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Micro;
using Rollout.Native;

namespace Rollout.Gpu;

/// <summary>
/// Stage 4, steps alone: decoding by batch and context, each step one graph, with the next step queued before the previous one's answers
/// are waited for, as the engine does; prompts; and the device's time by kernel, measured per launch.
/// </summary>
internal static class StepRates
{
    private const int Warm = 5;

    private static readonly (int Batch, int Context, int Shared)[] s_decode =
    [
        (1, 128, 0), (8, 128, 0), (32, 128, 0), (64, 128, 0), (128, 512, 0), (256, 512, 0), (256, 1024, 0),
        (1, 4096, 0), (8, 4096, 0), (1, 32_000, 0), (8, 32_000, 0), (64, 1024, 0), (64, 1024, 896), (512, 512, 128),
    ];

    private static readonly (int Sequences, int Tokens)[] s_prefill = [(1, 512), (1, 2048), (4, 2048), (64, 128)];

    /// <summary>Target of a model at batch 1, in milliseconds a token.</summary>
    private static readonly Dictionary<string, double> s_alone = new() { [Shapes.Llama] = 4.1, [Shapes.Qwen25] = 0.55 };

    public static Task Run(Stage stage, string name)
    {
        ModelSpec model = Shapes.Load(name, stage.IsSmall);
        using CudaBackend backend = new();
        using WeightSet weights = RandomWeights.Of(backend, model, stage.IsSmall);
        double copy = DeviceClock.CopyRate(backend.Device, stage.IsSmall ? 1 << 20 : 1L << 30);
        // A step reads few rows of an embedding that is not the head.
        Transformer transformer = new(model);
        WeightSlot embedding = transformer.Weights["model.embed_tokens.weight"].Pieces[0].Slot;
        long read = weights.Bytes - (model.TiedHead ? 0 : weights[embedding].Bytes);
        double tokenBytes = transformer.Kv.Sum(layer => layer.BlockElements) / KvCache.BlockTokens * backend.KvElementBytes;
        foreach ((int batch, int context, int shared) in stage.IsSmall ? [(1, 20, 0), (5, 40, 16)] : s_decode)
        {
            string row = $"{batch} x {context}{(shared > 0 ? $", {shared} of it shared" : "")}";
            stage.Try($"Decode, {name}", row, () => Decode(batch, context, shared, row));
        }

        foreach ((int sequences, int tokens) in stage.IsSmall ? [(2, 20)] : s_prefill)
        {
            string row = $"{sequences} x {tokens}";
            stage.Try($"Prefill, {name}", row, () => Prefill(sequences, tokens, row));
        }

        return Task.CompletedTask;

        void Decode(int batch, int context, int shared, string row)
        {
            string table = $"Decode, {name}";
            using Work work = new(backend, model, weights, batch, context, shared);
            int steps = stage.IsSmall ? 3 : context > 10_000 ? 30 : 60;
            long graphs = backend.GraphLaunches;
            (double seconds, double host) = work.OneAhead(steps);
            double kv = tokenBytes * (shared + ((double)batch * (context - shared)));
            double? target = (batch, context) == (1, 128) && s_alone.TryGetValue(name, out double most) ? most : null;
            stage.Write(table, row, "ms a step", seconds * 1e3, target);
            stage.Write(table, row, "tokens/s", batch / seconds);
            stage.Write(table, row, "floor, ms", (read + kv) / copy * 1e3);
            stage.Write(table, row, "of the floor", (read + kv) / copy / seconds);
            stage.Write(table, row, "host, us", host * 1e6, batch == 256 ? 100 : null);
            stage.Write(table, row, "graphs a step", (backend.GraphLaunches - graphs) / (steps + Warm + 1.0));
            if ((batch, context) is (1, 128) or (256, 512) or (8, 32_000) || stage.IsSmall) Kernels(work, $"decode {row}");
        }

        void Prefill(int sequences, int tokens, string row)
        {
            string table = $"Prefill, {name}";
            using Work work = new(backend, model, weights, sequences, tokens);
            (double seconds, _) = work.OneAhead(stage.IsSmall ? 2 : 10);
            double? target = (name, sequences) == (Shapes.Llama, 4) ? 42_000 : null;
            stage.Write(table, row, "ms a step", seconds * 1e3);
            stage.Write(table, row, "tokens/s", sequences * tokens / seconds, target, atLeast: true);
            AttentionSpec attention = model.Layers[0].Attention;
            double layer = model.HiddenSize
                * (2.0 * (attention.QueryWidth + attention.KvWidth) + (3.0 * model.Layers[0].FeedForward.Width));
            double flops = 2 * layer * model.Layers.Count * sequences * tokens;
            stage.Write(table, row, "TFLOP/s, matmuls of the layers", flops / seconds / 1e12);
            if ((sequences, tokens) == (4, 2048) || stage.IsSmall) Kernels(work, $"prefill {row}");
        }

        void Kernels(Work work, string what)
        {
            string table = $"Time by kernel, {name}";
            stage.Try(table, what, () =>
            {
                foreach ((string kernel, int launches, double seconds) in work.ByKernel(stage.IsSmall ? 1 : 4))
                    stage.Write(table, kernel, $"{what}: us (launches)", $"{seconds * 1e6:F1} ({launches})");
            });
        }
    }

    /// <summary>One kind of step of a model, and its memory.</summary>
    private sealed class Work : IDisposable
    {
        private const long AheadBytes = 512L << 20;

        private readonly CudaBackend _backend;
        private readonly WeightSet _weights;
        private readonly KvCache _cache;
        private readonly Transformer _transformer;
        private readonly Workspace _workspace;
        private readonly StepLayout[] _layouts;

        /// <summary>Decoding.</summary>
        public Work(CudaBackend backend, ModelSpec model, WeightSet weights, int batch, int context, int shared)
            : this(backend, model, weights, batch, context,
                (shared / KvCache.BlockTokens) + (batch * (Workload.BlocksOf(context) - (shared / KvCache.BlockTokens))),
                () => Workload.DecodeStep(batch, context, shared))
        {
        }

        /// <summary>Prompts, whole.</summary>
        public Work(CudaBackend backend, ModelSpec model, WeightSet weights, int sequences, int tokens)
            : this(backend, model, weights, sequences * tokens, tokens, sequences * Workload.BlocksOf(tokens),
                () => Prompts(sequences, tokens))
        {
        }

        private Work(CudaBackend backend, ModelSpec model, WeightSet weights, int rows, int context, int blocks, Func<StepLayout> layout)
        {
            _backend = backend;
            _weights = weights;
            _transformer = new Transformer(model);
            _cache = backend.AllocateKvCache(blocks, _transformer.Kv);
            _workspace = _transformer.AllocateWorkspace(backend, rows, context);
            _layouts = [layout(), layout()];

            // As an engine does at its start: a first step allocates memory, and then graphs are captured with its addresses.
            Queue(_layouts[0]);
            backend.FinishStep(_layouts[0]);
            foreach (StepLayout rehearsal in backend.Rehearsals(_layouts[0])) Queue(rehearsal);
        }

        /// <summary>Medians of a step's seconds, and of the host's part of it, while the device works on the step before.</summary>
        public (double Seconds, double Host) OneAhead(int count)
        {
            double[] seconds = new double[count], host = new double[count];
            int next = 0;
            Queue(_layouts[next]);
            for (int i = -Warm; i < count; i++)
            {
                long start = Stopwatch.GetTimestamp();
                next ^= 1;
                Queue(_layouts[next]);
                double queued = Stopwatch.GetElapsedTime(start).TotalSeconds;
                _backend.FinishStep(_layouts[next ^ 1]);
                if (i >= 0) (seconds[i], host[i]) = (Stopwatch.GetElapsedTime(start).TotalSeconds, queued);
            }

            _backend.FinishStep(_layouts[next]);
            Array.Sort(seconds);
            Array.Sort(host);
            return (seconds[count / 2], host[count / 2]);
        }

        /// <summary>
        /// Launches and seconds by kernel, of one step: the mean of several. Copies queued before it keep the device busy until the whole
        /// step is queued.
        /// </summary>
        public IEnumerable<(string Kernel, int Launches, double Seconds)> ByKernel(int steps)
        {
            CudaDevice device = _backend.Device;
            bool isSmall = device.FreeBytes < 8 * AheadBytes;
            using DeviceBuffer ahead = device.AllocateZeroed(isSmall ? 1 << 10 : AheadBytes), other = device.Allocate(ahead.Bytes);
            using CudaLaunchTimes times = new(device);
            device.Times = times;
            try
            {
                for (int i = 0; i < steps; i++)
                {
                    for (int c = 0; c < (isSmall ? 1 : 60); c++) DeviceClock.Copy(device, ahead, other);
                    Queue(_layouts[0]);
                    _backend.FinishStep(_layouts[0]);
                }

                return [.. times.Take().OrderByDescending(kernel => kernel.Seconds)
                    .Select(kernel => (kernel.Name, kernel.Launches / steps, kernel.Seconds / steps))];
            }
            finally
            {
                device.Times = null;
            }
        }

        public void Dispose()
        {
            _workspace.Dispose();
            _cache.Dispose();
        }

        private void Queue(StepLayout step)
        {
            _transformer.Forward(step, _weights, _cache, _workspace);
            _transformer.Sample(step, _weights, _workspace);
        }

        private static StepLayout Prompts(int sequences, int tokens)
        {
            int blocks = Workload.BlocksOf(tokens);
            StepLayout step = new(sequences * tokens, sequences, blocks, sequences, maxAlternatives: 0, maxBiases: 0)
            {
                SequenceCount = sequences,
                OutputCount = sequences,
                QueryCount = sequences,
            };
            for (int s = 0; s < sequences; s++)
            {
                step.RowStart[s + 1] = (s + 1) * tokens;
                step.OutputRows[s] = ((s + 1) * tokens) - 1;
                step.Queries[s] = new SampleQuery
                {
                    OutputIndex = s,
                    Target = -1,
                    Temperature = 1,
                    TopP = 1,
                    Position = tokens,
                    SampleIndex = (uint)s,
                };
                for (int t = 0; t < tokens; t++) (step.TokenIds[(s * tokens) + t], step.Positions[(s * tokens) + t]) = ((s + t) % 256, t);
                for (int b = 0; b < blocks; b++) step.BlockTables[(s * blocks) + b] = (s * blocks) + b;
            }

            return step;
        }
    }
}
