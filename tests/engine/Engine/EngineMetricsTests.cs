using System.Diagnostics.Metrics;
using Microsoft.Win32.SafeHandles;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Metrics of updates: each update is counted once, under its outcome.</summary>
public sealed class EngineMetricsTests
{
    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Fact]
    public async Task Every_update_is_counted_once_by_outcome_and_a_commits_seconds_by_phase()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        // The model's name distinguishes its metrics from those of other tests.
        await using RolloutEngine engine = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        Dictionary<string, long> counts = [];
        Dictionary<string, List<double>> seconds = [];
        using MeterListener listener = new();
        listener.InstrumentPublished = (instrument, self) =>
        {
            if (instrument.Meter.Name == EngineMetrics.MeterName && instrument.Meter.Tags!.Any(tag => Equals(tag.Value, engine.ModelName)))
                self.EnableMeasurementEvents(instrument);
        };
        listener.SetMeasurementEventCallback<long>((instrument, value, tags, _) =>
        {
            string key = tags.Length == 0 ? instrument.Name : $"{instrument.Name} {tags[0].Value}";
            counts[key] = instrument.IsObservable ? value : counts.GetValueOrDefault(key) + value;
        });
        listener.SetMeasurementEventCallback<double>((instrument, value, tags, _) =>
        {
            Assert.Equal(("rollout.updates.seconds", "phase"), (instrument.Name, tags[0].Key));
            string phase = (string)tags[0].Value!;
            if (!seconds.TryGetValue(phase, out List<double>? all)) seconds[phase] = all = [];
            all.Add(value);
        });
        listener.Start();

        List<CommitResult> results = [];
        foreach ((ulong from, ulong to) in ((ulong, ulong)[])[(0, 1), (1, 5)])
        {
            using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(from, to));
            update.Write(0, payload.Bytes);
            results.Add(await update.CommitAsync(payload.Digest, Cancelled));
        }

        UpdateManifest manifest = payload.Manifest(5, 6);
        for (int i = 0; i < 2; i++) Assert.Throws<UpdateRejectedException>(() => engine.BeginUpdate(payload.Manifest(4, 6)));
        using (engine.BeginUpdate(manifest)) // which its sender ends
            Assert.Throws<EngineStateException>(() => engine.BeginUpdate(manifest));
        using (WeightUpdate update = await engine.OpenUpdateAsync(manifest))
        {
            update.Write(0, payload.Bytes);
            await Assert.ThrowsAsync<UpdateFailedException>(() => update.CommitAsync(new byte[16], Cancelled));
            await Assert.ThrowsAsync<UpdateFailedException>(() => update.CommitAsync(payload.Digest, Cancelled)); // still one update
        }

        using (WeightUpdate update = await engine.OpenUpdateAsync(manifest))
            await Assert.ThrowsAsync<UpdateFailedException>(() => update.CommitAsync(default, Cancelled));
        using (WeightUpdate update = await engine.OpenUpdateAsync(manifest))
        using (SafeFileHandle empty = File.OpenHandle(Path.Combine(payload.Folder, "empty"), FileMode.Create, FileAccess.ReadWrite))
            Assert.Throws<UpdateFailedException>(() => update.ReadFrom(empty, 0, 0, payload.Bytes.Length, Cancelled));
        using (WeightUpdate update = await engine.OpenUpdateAsync(manifest)) update.End(UpdateFailure.Deadline);
        listener.RecordObservableInstruments();

        string[] failed = ["rejected", "refused", "sender", "digest", "protocol", "source", "deadline"];
        Dictionary<string, long> expected = failed.ToDictionary(reason => $"rollout.updates.failed {reason}", _ => 1L);
        expected["rollout.updates.failed rejected"] = 2;
        expected["rollout.updates.started"] = 2 + expected.Values.Sum();
        expected["rollout.updates.committed"] = 2;
        expected["rollout.updates.bytes"] = 2 * payload.Bytes.Length;
        expected["rollout.weights.version"] = 5;
        foreach (string key in counts.Keys.Where(key => key.StartsWith("rollout.tokens", StringComparison.Ordinal))) counts.Remove(key);
        static string Line(KeyValuePair<string, long> count) => $"{count.Key}: {count.Value}";
        Assert.Equal(expected.Select(Line).Order(), counts.Select(Line).Order());
        Assert.Equal(["apply", "preflight", "stall", "swap", "transfer"], seconds.Keys.Order());
        Assert.Equal(results.Select(result => result.PreflightSeconds), seconds["preflight"]);
        Assert.Equal(results.Select(result => result.TransferSeconds), seconds["transfer"]);
        Assert.Equal(results.Select(result => result.ApplySeconds), seconds["apply"]);
        Assert.Equal(results.Select(result => result.SwapSeconds), seconds["swap"]);
        Assert.Equal(results.Select(result => result.StallSeconds), seconds["stall"]);
        Assert.All(results, result => Assert.True(result.StallSeconds <= result.SwapSeconds)); // a part of it, where the update is staged
    }
}
