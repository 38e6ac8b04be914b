using System.Globalization;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Micro;

namespace Rollout.Perf.Tests;

/// <summary>What the engine's loop does between and around the kernels of a decode step, observed from its own thread.</summary>
public sealed class LoopTests
{
    private const int WarmUp = 200;
    private const int Measured = 2000;

    /// <summary>One request of each kind: what every step does, and what only some requests need.</summary>
    private static readonly GroupRequest[] s_requests =
    [
        Request("greedy") with { Temperature = 0 },
        Request("plain") with { N = 3 },
        Request("filters") with { TopK = 40, TopP = 0.9f, MinP = 0.01f },
        Request("alternatives") with { TopLogProbs = 4 },
        Request("biased") with { LogitBias = new Dictionary<int, float> { [7] = 1, [9] = -1 } },
    ];

    /// <summary>
    /// An allocation of a step would show in every window. The runtime itself occasionally allocates a few hundred bytes on any thread:
    /// they may be in one window, not in all.
    /// </summary>
    [Fact]
    public async Task A_decode_step_allocates_nothing()
    {
        const int Windows = 4;
        long[] bytes = new long[Windows + 1];
        await RunAsync(step =>
        {
            // The allocations of the loop's thread: its own, and those of the kernels, of which it runs its share.
            (int window, int rest) = Math.DivRem(step - WarmUp, Measured / Windows);
            if (rest == 0 && window is >= 0 and <= Windows) bytes[window] = GC.GetAllocatedBytesForCurrentThread();
        });
        Assert.All(bytes, read => Assert.NotEqual(0, read));
        long[] windows = [.. bytes.Skip(1).Zip(bytes, (end, start) => end - start)];
        Assert.True(windows.Min() == 0 && windows.Sum() < 512, $"{string.Join(", ", windows)} bytes in {Measured / Windows} steps each");
    }

    /// <summary>
    /// A voluntary context switch is a thread that waits for another. Between the operations of a step none may sleep: if every token had
    /// to wake a thread there would be one or more a step.
    /// </summary>
    [Fact]
    public async Task A_decode_step_waits_for_no_other_thread()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "Context switches are counted in /proc.");
        long first = -1;
        long last = -1;
        await RunAsync(step =>
        {
            if (step == WarmUp) first = VoluntarySwitches();
            if (step == WarmUp + Measured) last = VoluntarySwitches();
        });
        double aStep = (last - first) / (double)Measured;
        Assert.True(first >= 0 && last >= first && aStep < 0.25, $"{aStep:F3} voluntary context switches a step ({first} to {last})");
    }

    private static GroupRequest Request(string id)
        => new() { Id = id, Prompt = [1, 2, 3, 4, 5], Seed = 1, IgnoreEos = true, MaxTokens = WarmUp + Measured + 100 };

    /// <summary>Runs the requests to their end; <paramref name="stepBegins"/> is told on the loop's thread which step begins.</summary>
    private static async Task RunAsync(Action<int> stepBegins)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("rollout-perf-");
        try
        {
            TinyModel.Write(folder.FullName);
            int step = 0;
            RecordingBackend backend = new(new CpuBackend(threads: 2)) { StepBegins = () => stepBegins(step++) };
            await using RolloutEngine engine = RolloutEngine.Load(folder.FullName, backend,
                new EngineOptions { MaxContext = 4096, MaxSequences = 16, MaxBatchTokens = 64, KvCacheBytes = 64 << 20 });
            Group[] groups = [.. s_requests.Select(engine.Submit)];
            foreach (Group group in groups) await group.Completed.WaitAsync(TestContext.Current.CancellationToken);
            Assert.True(step > WarmUp + Measured, $"{step} steps");
            Assert.All(groups.SelectMany(group => group.Sequences), sample => Assert.Equal(FinishReason.Length, sample.FinishReason));
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    /// <summary>Of the calling thread, since it started.</summary>
    private static long VoluntarySwitches()
    {
        const string Field = "voluntary_ctxt_switches:";
        string line = File.ReadLines("/proc/thread-self/status").First(line => line.StartsWith(Field, StringComparison.Ordinal));
        return long.Parse(line[Field.Length..], CultureInfo.InvariantCulture);
    }
}
