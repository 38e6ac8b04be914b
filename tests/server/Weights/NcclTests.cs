using System.Diagnostics;
using Google.Protobuf;
using Rollout.V1;
using EngineState = Rollout.V1.EngineState;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>
/// Weights that another process broadcasts from another simulated device. Whatever becomes of that process, the server serves the old
/// weights, the new ones, or none, and keeps nothing of it.
/// </summary>
public sealed class NcclTests(CudaServer server) : IClassFixture<CudaServer>, IAsyncLifetime
{
    private static readonly Payload s_original = Payload.Of("qwen3", (_, _) => { });
    private static readonly GenerateRequest s_probe = Calls.Sampled(Golden.Cases("qwen3")[1].Prompt, 8, seed: 9, n: 2);

    /// <summary>Of updates from device memory, taken at the first and kept; a bucket is larger.</summary>
    private const ulong WorkingBytes = 128 << 10;

    private ServerProcess Server => server.Process;

    public async ValueTask InitializeAsync()
    {
        await server.StartAsync();
        for (int i = 0; i < 2; i++) await PushAsync(); // both sets are allocated, and hold the original weights
    }

    public ValueTask DisposeAsync() => ValueTask.CompletedTask;

    [Theory]
    [InlineData("ready", "staged")]
    [InlineData("broadcast 0", "staged")]
    [InlineData("broadcast 2", "staged")]
    [InlineData("committed", "staged")]
    [InlineData("broadcast 0", "inplace")]
    [InlineData("broadcast 2", "inplace")]
    public async Task A_killed_trainer_leaves_the_old_weights_or_none_and_no_memory(string step, string mode)
    {
        string original = await BitsAsync();
        StatusReply before = await StatusAsync();
        await using (TrainerProcess trainer = await StartAsync(mode, seconds: 60))
        {
            await trainer.ToAsync(step);
            await trainer.KillAsync();
        }

        StatusReply after = await SettledAsync(before);
        bool committed = step == "committed", poisoned = mode == "inplace";
        Assert.Equal((committed ? before.Version + 1 : before.Version, poisoned), (after.Version, after.State == EngineState.Poisoned));
        if (!committed && !poisoned) Assert.Equal(original, await BitsAsync());
        await PushAsync();
        Assert.Equal(original, await BitsAsync());
        Assert.True(!Server.Log.Contains("   at ", StringComparison.Ordinal), Server.Log);
    }

    [Theory]
    [InlineData("staged")]
    [InlineData("inplace")]
    public async Task A_stopped_trainer_loses_its_seat_at_the_deadline(string mode)
    {
        string original = await BitsAsync();
        StatusReply before = await StatusAsync();
        await using TrainerProcess trainer = await StartAsync(mode, seconds: 3);
        await trainer.ToAsync("broadcast 2");
        trainer.Signal("STOP");
        if (mode == "staged") Assert.Equal(original, await BitsAsync()); // meanwhile
        StatusReply after = await SettledAsync(before);
        Assert.Equal((before.Version, mode == "inplace"), (after.Version, after.State == EngineState.Poisoned));
        trainer.Signal("CONT");
        await trainer.GoOnAsync();
        Assert.StartsWith("failed ", await trainer.EndAsync(), StringComparison.Ordinal);
        await PushAsync();
        Assert.Equal(original, await BitsAsync());
    }

    /// <summary>Steps go on while ranks join, in place too: a group that never comes about poisons nothing.</summary>
    [Theory]
    [InlineData(UpdateMode.Staged)]
    [InlineData(UpdateMode.InPlace)]
    public async Task A_rank_that_never_joins_costs_nothing(UpdateMode mode)
    {
        string original = await BitsAsync();
        StatusReply before = await StatusAsync();
        await using TrainerProcess absent = TrainerProcess.OnDevice(server.Variables, "id");
        ByteString id = ByteString.CopyFrom(Convert.FromHexString(await absent.AskAsync()));
        foreach ((ByteString unique, string reason) in ((ByteString, string)[])
            [(id, "deadline of 1500 ms"), (ByteString.CopyFrom(new byte[128]), "nccl: ncclCommInitRankConfig (rank 1 of 2)")])
        {
            using Update update = await Server.BeginUpdateAsync(s_original.Begin(before.Version, before.Version + 1, begin =>
            {
                begin.Mode = mode;
                begin.DeadlineMilliseconds = 1500;
            }));
            Assert.True((await update.NextAsync()).Ready is { NcclUniqueId.Length: 0 });
            await update.SendAsync(new UpdateRequest
            {
                Nccl = new Nccl
                {
                    UniqueId = unique,
                    DeviceUuid = ByteString.CopyFrom(new byte[16]),
                    WorldSize = 2,
                    Rank = 1,
                    Buckets = { new NcclBucket { Bytes = (ulong)s_original.Bytes.Length } },
                },
            });
            Assert.Equal(original, await BitsAsync()); // meanwhile
            UpdateReply end = await update.NextAsync();
            Assert.Contains(reason, end.Aborted?.Reason ?? end.Failed.Reason, StringComparison.Ordinal);
            Assert.False(end.Aborted?.Poisoned ?? end.Failed.Poisoned);
        }

        Assert.Equal(EngineState.Running, (await SettledAsync(before)).State);
    }

    private async Task<TrainerProcess> StartAsync(string mode, int seconds)
    {
        Variants variants = await Variants.SharedAsync();
        string checkpoint = Path.Combine(variants.Folder(new Content(true, true)), "model.safetensors");
        return TrainerProcess.OnDevice(server.Variables, "ranks", Server.SocketPath, checkpoint, "1", mode, $"{seconds}");
    }

    /// <summary>The status once no update is in progress and the group's memory is free again.</summary>
    private async Task<StatusReply> SettledAsync(StatusReply before)
    {
        for (Stopwatch clock = Stopwatch.StartNew(); ; await Task.Delay(20))
        {
            StatusReply status = await StatusAsync();
            bool isFree = before.Memory.Free - status.Memory.Free <= WorkingBytes || status.Memory.Free >= before.Memory.Free;
            if (!status.Updating && status.Memory.Nccl == 0 && isFree) return status;
            Assert.True(clock.Elapsed.TotalSeconds < 15, $"{status.Memory}; before: {before.Memory}");
        }
    }

    private async Task PushAsync()
    {
        ulong version = (await StatusAsync()).Version;
        await Server.CommitAsync(s_original, version, version + 1, begin => begin.Mode = UpdateMode.Staged);
    }

    private async Task<StatusReply> StatusAsync() => await Server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline());

    private async Task<string> BitsAsync() => string.Join('\n', (await Server.SamplesAsync(s_probe)).Select(Variants.Bits));
}
