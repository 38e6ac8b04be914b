using System.Diagnostics;
using Rollout.Engine;
using Rollout.Kernels.Cuda;

namespace Rollout.Gpu;

/// <summary>Stage 4, the engine in this process: nano-vllm's bench, a GRPO rollout, many long samples.</summary>
internal static class Rollouts
{
    public const string Table = "Rollouts";

    /// <summary>
    /// 256 sequences, input and output lengths uniform in 100 to 1024, of token ids; they do not end early. As nano-vllm's bench.py.
    /// </summary>
    public static async Task NanoAsync(Stage stage, string name)
    {
        double? target = name switch { Shapes.Qwen25 => 90_000, Shapes.Qwen3 => 28_000, _ => null };
        await using RolloutEngine engine = Start(stage, name, 256, stage.IsSmall ? 64 : 2048);
        for (int run = 1; run <= 2; run++)
        {
            Random random = new(run);
            int Length() => stage.IsSmall ? random.Next(2, 9) : random.Next(100, 1025);
            GroupRequest[] requests = [.. Enumerable.Range(0, stage.IsSmall ? 4 : 256).Select(i => new GroupRequest
            {
                Id = $"{run}.{i}",
                Prompt = Tokens(random, Length(), engine.Model),
                MaxTokens = Length(),
                IgnoreEos = true,
                Temperature = 0.6f,
                Seed = (ulong)i,
            })];
            await MeasureAsync(stage, engine, $"{name}, nano-vllm's bench, run {run}", requests, target);
        }
    }

    /// <summary>64 prompts of 150 tokens, 16 samples each, of 270 tokens on average and 1024 at most.</summary>
    public static async Task GrpoAsync(Stage stage, string name)
    {
        await using RolloutEngine engine = Start(stage, name, 1024, stage.IsSmall ? 64 : 1280);
        for (int run = 1; run <= (name == Shapes.Qwen38B ? 1 : 2); run++)
        {
            await MeasureAsync(stage, engine, $"{name}, GRPO 64 x 16, run {run}", Grpo(stage.IsSmall, run, engine.Model), target: null,
                seconds: name switch { Shapes.Qwen25 => 1.6, Shapes.Qwen38B => 13, _ => null });
        }
    }

    /// <summary>256 prompts of 128 tokens, 1024 tokens each.</summary>
    public static async Task LongAsync(Stage stage, string name)
    {
        await using RolloutEngine engine = Start(stage, name, 256, stage.IsSmall ? 64 : 1280);
        Random random = new(1);
        GroupRequest[] requests = [.. Enumerable.Range(0, stage.IsSmall ? 3 : 256).Select(i => new GroupRequest
        {
            Id = $"{i}",
            Prompt = Tokens(random, stage.IsSmall ? 8 : 128, engine.Model),
            MaxTokens = stage.IsSmall ? 6 : 1024,
            IgnoreEos = true,
            Seed = (ulong)i,
        })];
        await MeasureAsync(stage, engine, $"{name}, 256 x 128 in, 1024 out", requests, name == Shapes.Qwen38B ? 18_000 : null);
    }

    /// <summary>
    /// The requests of a GRPO rollout. A model of random weights draws all tokens about equally often, so a stop token whose probability is
    /// raised to 1/270 gives lengths of that mean (geometric, cut at 1024).
    /// </summary>
    public static GroupRequest[] Grpo(bool isSmall, int seed, ModelSpec model)
    {
        Random random = new(seed);
        const int Stop = 7;
        return [.. Enumerable.Range(0, isSmall ? 2 : 64).Select(i => new GroupRequest
        {
            Id = $"{seed}.{i}",
            Prompt = Tokens(random, isSmall ? 10 : 150, model),
            N = isSmall ? 3 : 16,
            MaxTokens = isSmall ? 6 : 1024,
            StopTokenIds = [Stop],
            LogitBias = new Dictionary<int, float> { [Stop] = MathF.Log(model.VocabSize / 270f) },
            IgnoreEos = true,
            Seed = (ulong)i,
        })];
    }

    private static RolloutEngine Start(Stage stage, string name, int sequences, int context)
    {
        ModelSpec model = Shapes.Load(name, stage.IsSmall);
        CudaBackend backend = new();
        EngineOptions options = new()
        {
            MaxContext = context,
            MaxSequences = sequences,
            MaxBatchTokens = stage.IsSmall ? 64 : 0,
            KvCacheFraction = model.HiddenSize >= 4096 ? 0.8 : 0, // nothing else uses the device; small models need less
        };
        return RolloutEngine.Start(name, model, backend, options, RandomWeights.Of(backend, model, stage.IsSmall));
    }

    private static int[] Tokens(Random random, int count, ModelSpec model)
        => [.. Enumerable.Range(0, count).Select(_ => random.Next(8, Math.Min(model.VocabSize, 100_000)))];

    private static async Task MeasureAsync(
        Stage stage, RolloutEngine engine, string row, GroupRequest[] requests, double? target, double? seconds = null)
    {
        await WarmAsync(engine, requests[0], row);
        long steps = engine.Status.Steps, start = Stopwatch.GetTimestamp();
        Group[] groups = [.. requests.Select(engine.Submit)];
        await Task.WhenAll(groups.Select(group => group.Completed));
        double taken = Stopwatch.GetElapsedTime(start).TotalSeconds;
        Sequence[] samples = [.. groups.SelectMany(group => group.Sequences)];
        if (samples.FirstOrDefault(sample => sample.FinishReason is FinishReason.Error or FinishReason.Abort) is { } failed)
            throw new InvalidOperationException($"a sample ended with {failed.FinishReason}: {failed.Error}");
        steps = engine.Status.Steps - steps;
        double tokens = samples.Sum(sample => (double)sample.Published);
        stage.Write(Table, row, "seconds", taken, seconds);
        stage.Write(Table, row, "tokens/s", tokens / taken, target, atLeast: true);
        stage.Write(Table, row, "mean length", tokens / samples.Length);
        stage.Write(Table, row, "steps", steps);
        stage.Write(Table, row, "ms a step", taken / steps * 1e3);
    }

    private static async Task WarmAsync(RolloutEngine engine, GroupRequest request, string salt)
        => await engine.Submit(request with { Id = "warm", MaxTokens = 4, CacheSalt = salt }).Completed;
}
