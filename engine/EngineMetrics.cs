using System.Diagnostics.Metrics;

namespace Rollout.Engine;

/// <summary>The engine's metrics (System.Diagnostics.Metrics): weight updates, and the staleness of the tokens it returns.</summary>
public sealed class EngineMetrics : IDisposable
{
    public const string MeterName = "Rollout.Engine";

    private readonly Meter _meter;
    private readonly Counter<long> _started;
    private readonly Counter<long> _committed;
    private readonly Counter<long> _failed;
    private readonly Counter<long> _bytes;
    private readonly Histogram<double> _seconds;
    private readonly long[] _tokensByStaleness = new long[9];

    internal EngineMetrics(string model, Func<ulong> version)
    {
        _meter = new Meter(MeterName, null, [new("model", model)]);
        _started = _meter.CreateCounter<long>("rollout.updates.started", description: "Weight updates begun, refused ones included");
        _committed = _meter.CreateCounter<long>("rollout.updates.committed", description: "Weight updates put in service");
        _failed = _meter.CreateCounter<long>("rollout.updates.failed", description: "Weight updates not put in service, by reason");
        _bytes = _meter.CreateCounter<long>("rollout.updates.bytes", "By", "Payload bytes of committed updates");
        _seconds = _meter.CreateHistogram<double>("rollout.updates.seconds", "s", "Seconds of committed updates, by phase",
            tags: null,
            new InstrumentAdvice<double>
            {
                HistogramBucketBoundaries = [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            });
        _meter.CreateObservableGauge("rollout.weights.version", () => (long)version(), description: "Version being served");
        _meter.CreateObservableCounter("rollout.tokens.sampled", ByStaleness,
            description: "Sampled tokens of samples that have ended, by how many versions old they were then");
    }

    /// <summary>
    /// Tokens of ended sequences by how many versions old they were when their sequence ended. The last entry counts all older ones.
    /// </summary>
    internal ReadOnlyMemory<long> TokensByStaleness => _tokensByStaleness;

    /// <summary>Called by the loop when a sequence has ended.</summary>
    /// <param name="versions">The weights version that drew each of its tokens.</param>
    /// <param name="served">The version in service.</param>
    internal void CountTokens(ReadOnlySpan<ulong> versions, ulong served)
    {
        for (int start = 0, end; start < versions.Length; start = end)
        {
            end = versions[start..].IndexOfAnyExcept(versions[start]) is var length and >= 0 ? start + length : versions.Length;
            int staleness = (int)Math.Min(served - versions[start], (ulong)_tokensByStaleness.Length - 1);
            _tokensByStaleness[staleness] += end - start;
        }
    }

    internal void Started() => _started.Add(1);

    internal void Failed(string reason) => _failed.Add(1, new KeyValuePair<string, object?>("reason", reason));

    internal void Committed(CommitResult result, long payloadBytes)
    {
        _committed.Add(1);
        _bytes.Add(payloadBytes);
        Phase("preflight", result.PreflightSeconds);
        Phase("transfer", result.TransferSeconds);
        Phase("apply", result.ApplySeconds);
        Phase("swap", result.SwapSeconds);
        Phase("stall", result.StallSeconds);
    }

    public void Dispose() => _meter.Dispose();

    private void Phase(string phase, double seconds) => _seconds.Record(seconds, new KeyValuePair<string, object?>("phase", phase));

    private IEnumerable<Measurement<long>> ByStaleness()
    {
        for (int staleness = 0; staleness < _tokensByStaleness.Length; staleness++)
        {
            string label = staleness == _tokensByStaleness.Length - 1 ? $"{staleness}+" : $"{staleness}";
            yield return new Measurement<long>(_tokensByStaleness[staleness], new KeyValuePair<string, object?>("staleness", label));
        }
    }
}
