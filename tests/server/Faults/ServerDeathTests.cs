using Rollout.Client;

namespace Rollout.Server.Tests;

/// <summary>
/// The server is killed at each step of a push and started again on the same socket: the client reports what is served, pushes again with
/// the same publisher, and the right version and tokens are served.
/// </summary>
public sealed class ServerDeathTests
{
    public static IEnumerable<TheoryDataRow<string, UpdateMode>> Deaths() =>
        from step in (string[])["before begin", "begun", "copying", "commit on its way", "answer on its way"]
        from mode in (UpdateMode[])[UpdateMode.Staged, UpdateMode.InPlace]
        where step != "before begin" || mode == UpdateMode.Staged // nothing has been said about the mode
        select new TheoryDataRow<string, UpdateMode>(step, mode);

    [Theory, MemberData(nameof(Deaths))]
    public async Task The_server_is_killed_and_started_again(string step, UpdateMode mode)
    {
        Variants variants = await Variants.SharedAsync();
        await using ServerProcess server = await ServerProcess.StartAsync(variants.Folder(FaultServer.Old), "--kv-cache", "4MiB");
        TaskCompletionSource killed = new();
        async Task KillAsync()
        {
            await server.KillAsync();
            killed.SetResult();
        }

        bool onItsWay = step.EndsWith("way", StringComparison.Ordinal);
        byte[] digest = onItsWay ? variants.Send(Scope.Full, FaultServer.New).Digest : Guid.NewGuid().ToByteArray();
        using Relay relay = new(server.SocketPath, digest, inAnswer: step == "answer on its way", KillAsync);
        await using RolloutClient client = RolloutClient.Connect(relay.Address);
        // A ring, of which one half is read while the other is written.
        await using WeightPublisher publisher = new(client) { MaxSharedMemoryBytes = 64 << 10 };
        PushOptions options = new() { Mode = mode };
        int copied = 0;
        int fatal = step switch { "begun" => 1, "copying" => 25, _ => int.MaxValue };
        if (step == "before begin")
        {
            await client.StatusAsync();
            await KillAsync();
            options = options with { BaseVersion = 0 };
        }

        Task<PushResult> push = Task.Run(() => publisher.PushAsync(
            variants.Sources(FaultServer.New, () =>
            {
                if (++copied == fatal) KillAsync().GetAwaiter().GetResult();
            }),
            options: options));
        await killed.Task;
        await server.StartAgainAsync();
        WeightUpdateFailedException failed = await Assert.ThrowsAsync<WeightUpdateFailedException>(() => push);
        // Before the commit, only the server knew whether an update in place had written bytes. After it, the client asks the new server.
        bool unknown = mode == UpdateMode.InPlace && (step is "begun" or "copying");
        Assert.Equal(unknown ? UpdateOutcome.Unknown : UpdateOutcome.NotCommitted, failed.Outcome);
        Assert.Equal(onItsWay, relay.Found);
        await ServesAsync(server, variants, FaultServer.Old, 0);

        Assert.Equal(1ul, (await publisher.PushAsync(variants.Sources(FaultServer.New), options: new PushOptions { Mode = mode })).Version);
        await ServesAsync(server, variants, FaultServer.New, 1);
        Assert.Equal(2ul, (await publisher.PushAsync(variants.Sources(FaultServer.Old), options: new PushOptions { Mode = mode })).Version);
        await ServesAsync(server, variants, FaultServer.Old, 2);
    }

    [Theory, InlineData(UpdateMode.Staged), InlineData(UpdateMode.InPlace)]
    public async Task The_answer_to_a_commit_is_lost_and_the_client_finds_out(UpdateMode mode)
    {
        Variants variants = await Variants.SharedAsync();
        await using ServerProcess server = await ServerProcess.StartAsync(variants.Folder(FaultServer.Old), "--kv-cache", "4MiB");
        byte[] digest = variants.Send(Scope.Full, FaultServer.New).Digest;
        using Relay relay = new(server.SocketPath, digest, inAnswer: true, () => Task.CompletedTask);
        await using RolloutClient client = RolloutClient.Connect(relay.Address);
        await using WeightPublisher publisher = new(client);
        PushResult result = await publisher.PushAsync(variants.Sources(FaultServer.New), options: new PushOptions { Mode = mode });
        Assert.True(relay.Found);
        Assert.Equal((1ul, true), (result.Version, result.ConfirmedByStatus));
        await ServesAsync(server, variants, FaultServer.New, 1);
        Assert.DoesNotContain("the old weights stay", server.Log, StringComparison.Ordinal); // and the log does not contradict it
        Assert.DoesNotContain("poisoned", server.Log, StringComparison.Ordinal);
    }

    private static async Task ServesAsync(ServerProcess server, Variants variants, Content content, ulong version)
    {
        V1.SampleChunk sample = Assert.Single(await server.SamplesAsync(Variants.Probe()));
        Assert.Equal(variants[content], Variants.Bits(sample));
        Assert.All(sample.Versions, span => Assert.Equal(version, span.Version));
        Assert.Equal(version, (await server.Control.StatusAsync(new V1.StatusRequest())).Version);
    }
}
