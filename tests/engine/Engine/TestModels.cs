using System.Text.Json;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The reference models and their outputs in tests/golden.</summary>
internal static class TestModels
{
    public static readonly string[] Families = ["llama", "llama3", "olmo2", "qwen2", "qwen3"];

    public static string Folder(string family) => Path.Combine(AppContext.BaseDirectory, "golden", family);

    public static Golden ReadGolden(string family)
    {
        using FileStream file = File.OpenRead(Path.Combine(Folder(family), "golden.json"));
        JsonSerializerOptions options = new(JsonSerializerDefaults.Web);
        return JsonSerializer.Deserialize<Golden>(file, options)!;
    }

    public static RolloutEngine Load(string family, EngineOptions? options = null, int threads = 1, int vectorBits = 0,
        Tokenizer? tokenizer = null)
        => RolloutEngine.Load(Folder(family), new CpuBackend(threads, vectorBits), options ?? new EngineOptions(), tokenizer);

    public static RolloutEngine Load(string family, ScriptedBackend backend)
        => RolloutEngine.Load(Folder(family), backend, new EngineOptions());

    /// <summary>
    /// Submits a group, and returns with the loop held when every sample has this many tokens: commands posted before the loop is
    /// released apply at that point, however busy the machine is. The engine must be idle and compute the group's prompt in one step.
    /// </summary>
    public static Group SubmitAndHold(this RolloutEngine engine, ScriptedBackend backend, GroupRequest request, int tokens)
    {
        backend.HoldAfter(tokens + backend.StepsInFlight - 1);
        Group group = engine.Submit(request);
        backend.WaitUntilHeld();
        Assert.All(group.Sequences, sample => Assert.Equal(tokens, sample.Published));
        return group;
    }

    /// <summary>Waits until the group has ended and returns its samples.</summary>
    public static async Task<IReadOnlyList<Sequence>> RunAsync(this RolloutEngine engine, GroupRequest request)
    {
        Group group = engine.Submit(request);
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(60), TestContext.Current.CancellationToken);
        return group.Sequences;
    }

    /// <summary>Tokens and both log-probabilities as bits: equal strings mean equal bits.</summary>
    public static string Bits(this Sequence sample)
    {
        int n = sample.Published;
        return string.Join(' ', Enumerable.Range(0, n).Select(i =>
            $"{sample.Tokens(i, i + 1)[0]}:{BitConverter.SingleToInt32Bits(sample.LogProbs(i, i + 1)[0]):x}:"
            + $"{BitConverter.SingleToInt32Bits(sample.SamplingLogProbs(i, i + 1)[0]):x}")) + " " + sample.FinishReason;
    }

    internal sealed record Golden(int[][] Prompts, Continuation[] Continuations);

    internal sealed record Continuation(int[] Tokens, float[] LogProbs);
}
