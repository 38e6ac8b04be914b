using Grpc.Core;
using Rollout.Client;
using Rollout.V1;
using EngineState = Rollout.V1.EngineState;

namespace Rollout.Server.Tests;

/// <summary>A server for the tests of one class, which find it running on weights that they put there and leave it as healthy.</summary>
public sealed class FaultServer : IAsyncLifetime
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(20);

    private Footprint? _before;

    internal Variants Variants { get; private set; } = null!;

    public ServerProcess Process { get; private set; } = null!;

    /// <summary>The checkpoint it starts with.</summary>
    internal static Content Old => new(false, false);

    /// <summary>What faulty updates would bring.</summary>
    internal static Content New => new(true, true);

    public async ValueTask InitializeAsync()
    {
        Variants = await Variants.SharedAsync();
        Process = await ServerProcess.StartAsync(Variants.Folder(Old), "--kv-cache", "4MiB");
        // What a first update of any kind leaves for good is there before anything is counted.
        await PushAsync(Old, PushTransport.Inline, Client.UpdateMode.InPlace);
        await HealAsync();
        _before = Footprint.Of(Process.Id);
    }

    public ValueTask DisposeAsync() => Process.DisposeAsync();

    /// <summary>Pushes with the client library.</summary>
    internal async Task<PushResult> PushAsync(Content content, PushTransport transport = PushTransport.SharedMemory,
        Client.UpdateMode mode = Client.UpdateMode.Staged)
    {
        await using RolloutClient client = RolloutClient.Connect(Process.Address);
        await using WeightPublisher publisher = new(client);
        return await publisher.PushAsync(Variants.Sources(content), options: new PushOptions { Transport = transport, Mode = mode });
    }

    /// <summary>Waits until nobody updates.</summary>
    public async Task<StatusReply> SettledAsync()
    {
        using CancellationTokenSource patience = new(s_patience);
        while (true)
        {
            StatusReply status = await Process.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline(5));
            if (!status.Updating) return status;
            patience.Token.ThrowIfCancellationRequested();
            await Task.Delay(5);
        }
    }

    /// <summary>It serves exactly these weights.</summary>
    internal async Task ServesAsync(Content content, ulong version)
    {
        StatusReply status = await SettledAsync();
        Assert.True(status.State == EngineState.Running && status.Version == version,
            $"expected RUNNING at version {version}, got {status}");
        V1.SampleChunk sample = Assert.Single(await Process.SamplesAsync(Variants.Probe()));
        Assert.Equal(Variants[content], Variants.Bits(sample));
        Assert.All(sample.Versions, span => Assert.Equal(version, span.Version));
    }

    /// <summary>It serves nothing, and says so.</summary>
    public async Task IsPoisonedAsync(ulong version)
    {
        StatusReply status = await SettledAsync();
        Assert.True(status.State == EngineState.Poisoned && status.Version == version,
            $"expected POISONED at version {version}, got {status}");
        Assert.Contains("half-way", status.Reason, StringComparison.Ordinal);
        RpcException refused = await Calls.FailsAsync(() => Process.SamplesAsync(Variants.Probe()), StatusCode.FailedPrecondition);
        Assert.StartsWith("POISONED", refused.Status.Detail, StringComparison.Ordinal);
    }

    /// <summary>A good push by another trainer: the old weights again, whatever there was. The version.</summary>
    internal async Task<ulong> HealAsync()
    {
        ulong version = (await PushAsync(Old)).Version;
        await ServesAsync(Old, version);
        return version;
    }

    /// <summary>After a push by another trainer, no thread, no open file and nothing in /dev/shm is left of what there was.</summary>
    internal async Task LeavesNothingAsync()
    {
        await HealAsync();
        Assert.True(!Process.Log.Contains("   at ", StringComparison.Ordinal), Process.Log);
        // A connection of a client that has gone may be open a moment longer.
        for (int i = 0; ; i++)
        {
            Footprint now = Footprint.Of(Process.Id);
            bool same = now.Threads.SequenceEqual(_before!.Threads) && now.Files.SequenceEqual(_before.Files);
            if (same) break;
            Assert.True(i < 200, $"threads {string.Join(", ", now.Threads)} and files {string.Join(", ", now.Files)}, "
                + $"before {string.Join(", ", _before.Threads)} and {string.Join(", ", _before.Files)}");
            await Task.Delay(20);
        }
    }
}
