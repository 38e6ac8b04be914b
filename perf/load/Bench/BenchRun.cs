using System.Diagnostics;

namespace Rollout.Load.Bench;

/// <summary>A server that draws samples and reports the arrival of tokens.</summary>
internal interface ITarget : IAsyncDisposable
{
    string Name { get; }

    /// <summary>Draws one sample; calls <paramref name="onTokens"/> with the number of tokens each time some arrive.</summary>
    Task DrawAsync(int id, Arrival arrival, Action<int> onTokens, CancellationToken cancellation);
}

/// <summary>Sends arrivals to a target and measures times.</summary>
internal static class BenchRun
{
    public static async Task<BenchResult> PlayAsync(ITarget target, IReadOnlyList<Arrival> arrivals, CancellationToken cancellation)
    {
        TaskCompletionSource[] firstTokens =
            [.. arrivals.Select(_ => new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously))];
        Timeline[] timelines = [.. arrivals.Select(_ => new Timeline())];
        long start = Stopwatch.GetTimestamp();
        await Task.WhenAll(arrivals.Select((arrival, id) => Task.Run(() => DrawAsync(id, arrival), cancellation)));
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;

        for (int id = 0; id < arrivals.Count; id++)
        {
            if (timelines[id].Tokens != arrivals[id].MaxTokens)
            {
                throw new InvalidOperationException(
                    $"{target.Name}: sample {id} has {timelines[id].Tokens} tokens, not {arrivals[id].MaxTokens}");
            }
        }

        double[] firsts = [.. timelines.Select(timeline => timeline.First).Order()];
        double[] gaps = [.. timelines.SelectMany(timeline => timeline.Gaps).Order()];
        return new BenchResult(
            arrivals.Sum(arrival => (double)arrival.MaxTokens) / seconds, At(firsts, 0.5), At(firsts, 0.99),
            At(gaps, 0.5), At(gaps, 0.99), seconds);

        async Task DrawAsync(int id, Arrival arrival)
        {
            try
            {
                TimeSpan wait = TimeSpan.FromSeconds(arrival.At) - Stopwatch.GetElapsedTime(start);
                if (wait > TimeSpan.Zero) await Task.Delay(wait, cancellation);
                if (arrival.After >= 0) await firstTokens[arrival.After].Task.WaitAsync(cancellation);
                timelines[id].Begin();
                await target.DrawAsync(id, arrival, count =>
                {
                    timelines[id].Add(count);
                    firstTokens[id].TrySetResult();
                }, cancellation);
            }
            catch (Exception e)
            {
                firstTokens[id].TrySetException(e); // releases a waiter when the sample fails
                throw;
            }
        }
    }

    public static double At(double[] sorted, double quantile) => sorted.Length == 0 ? 0 : sorted[(int)(quantile * (sorted.Length - 1))];

    /// <summary>Arrival times of one sample's tokens.</summary>
    private sealed class Timeline
    {
        private long _last;

        public int Tokens { get; private set; }

        /// <summary>Seconds to the first token.</summary>
        public double First { get; private set; }

        /// <summary>Seconds between tokens. Tokens that arrive together share the time since the previous ones.</summary>
        public List<double> Gaps { get; } = [];

        public void Begin() => _last = Stopwatch.GetTimestamp();

        public void Add(int count)
        {
            long now = Stopwatch.GetTimestamp();
            double seconds = Stopwatch.GetElapsedTime(_last, now).TotalSeconds;
            int rest = count;
            if (Tokens == 0)
            {
                First = seconds;
                rest--;
            }

            for (int i = 0; i < rest; i++) Gaps.Add(seconds / count);
            Tokens += count;
            _last = now;
        }
    }
}

/// <summary>The result of one run.</summary>
/// <param name="TokensPerSecond">Generated tokens over the whole run, prefill included.</param>
/// <param name="FirstP50">Seconds to the first token.</param>
/// <param name="FirstP99">Seconds to the first token.</param>
/// <param name="GapP50">Seconds between tokens.</param>
/// <param name="GapP99">Seconds between tokens.</param>
/// <param name="Seconds">From the first request to the last token.</param>
internal sealed record BenchResult(double TokensPerSecond, double FirstP50, double FirstP99, double GapP50, double GapP99, double Seconds)
{
    /// <summary>The median of each number.</summary>
    public static BenchResult Median(IReadOnlyList<BenchResult> runs) => new(
        Throughput.MedianOf(runs.Select(run => run.TokensPerSecond)), Throughput.MedianOf(runs.Select(run => run.FirstP50)),
        Throughput.MedianOf(runs.Select(run => run.FirstP99)), Throughput.MedianOf(runs.Select(run => run.GapP50)),
        Throughput.MedianOf(runs.Select(run => run.GapP99)), Throughput.MedianOf(runs.Select(run => run.Seconds)));
}
