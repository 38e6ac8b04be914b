using Grpc.Core;
using Rollout.Client;
using Rollout.V1;
using EngineState = Rollout.V1.EngineState;

namespace Rollout.Server.Tests;

/// <summary>A server shared by the tests of one class. Each sets its own weights at the start and leaves the server healthy.</summary>
public sealed class FaultServer : IAsyncLifetime
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(20);

    private Footprint? _before;

    internal Variants Variants { get; private set; } = null!;

    public ServerProcess Process { get; private set; } = null!;

    /// <summary>The checkpoint it starts with.</summary>
    internal static Content Old => new(false, false);

    /// <summary>The weights of faulty updates.</summary>
    internal static Content New => new(true, true);

    public async ValueTask InitializeAsync()
    {
        Variants = await Variants.SharedAsync();
        Process = await ServerProcess.StartAsync(Variants.Folder(Old), "--kv-cache", "4MiB");
        // Resources that a first update of each kind allocates permanently exist before anything is counted.
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

    /// <summary>Waits until no update is in progress.</summary>
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

    /// <summary>Checks that it serves exactly these weights.</summary>
    internal async Task ServesAsync(Content content, ulong version)
    {
        StatusReply status = await SettledAsync();
        Assert.True(status.State == EngineState.Running && status.Version == version,
            $"expected RUNNING at version {version}, got {status}");
        V1.SampleChunk sample = Assert.Single(await Process.SamplesAsync(Variants.Probe()));
        Assert.Equal(Variants[content], Variants.Bits(sample));
        Assert.All(sample.Versions, span => Assert.Equal(version, span.Version));
    }

    /// <summary>Checks that it is poisoned and reports it.</summary>
    public async Task IsPoisonedAsync(ulong version)
    {
        StatusReply status = await SettledAsync();
        Assert.True(status.State == EngineState.Poisoned && status.Version == version,
            $"expected POISONED at version {version}, got {status}");
        Assert.Contains("half-way", status.Reason, StringComparison.Ordinal);
        RpcException refused = await Calls.FailsAsync(() => Process.SamplesAsync(Variants.Probe()), StatusCode.FailedPrecondition);
        Assert.StartsWith("POISONED", refused.Status.Detail, StringComparison.Ordinal);
    }

    /// <summary>Another trainer pushes the old weights successfully. Returns the version.</summary>
    internal async Task<ulong> HealAsync()
    {
        ulong version = (await PushAsync(Old)).Version;
        await ServesAsync(Old, version);
        return version;
    }

    /// <summary>After a push by another trainer, checks that no thread, open file or file in /dev/shm is left over.</summary>
    internal async Task LeavesNothingAsync()
    {
        await HealAsync();
        Assert.True(!Process.Log.Contains("   at ", StringComparison.Ordinal), Process.Log);
        // The connection of a client that has ended may stay open a little longer.
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
