using System.Globalization;
using Google.Protobuf;
using Rollout.V1;
using EngineState = Rollout.V1.EngineState;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>
/// Weights that another process has in the memory of the server's device, a simulated one: what is served equals an update through the host
/// to the bit, what that cost, and that no fault of the other process is served or leaves anything behind.
/// </summary>
public sealed class CudaIpcTests(CudaServer server) : IClassFixture<CudaServer>, IAsyncLifetime
{
    private static readonly Payload s_original = Payload.Of("qwen3", (_, _) => { });
    private static readonly Payload s_reversed = Payload.Reversed("qwen3");
    private static readonly GenerateRequest s_probe = Calls.Sampled(Golden.Cases("qwen3")[1].Prompt, 8, seed: 9, n: 2);

    private ServerProcess Server => server.Process;

    public async ValueTask InitializeAsync()
    {
        await server.StartAsync();
        // Whatever the test before has left: the original weights are served, both sets are allocated, and nothing is open.
        for (int i = 0; i < 2; i++) await PushAsync(s_original, UpdateMode.Staged);
        await Server.Weights.ReleaseMemoryAsync(new ReleaseMemoryRequest());
    }

    public ValueTask DisposeAsync() => ValueTask.CompletedTask;

    [Theory, InlineData(UpdateMode.Staged), InlineData(UpdateMode.InPlace)]
    public async Task What_is_served_equals_an_update_through_the_host(UpdateMode mode)
    {
        string original = await BitsAsync();
        await PushAsync(s_reversed, mode);
        string reversed = await BitsAsync();
        Assert.NotEqual(original, reversed);
        DescribeReply described = await Server.Weights.DescribeAsync(new DescribeRequest());
        await PushAsync(s_original, mode);

        await using Holder holder = await Holder.StartAsync(server, s_reversed);
        await holder.WriteAsync(s_reversed); // not waited for: the event says when
        Committed committed = await CommitAsync(s_reversed, [holder.All(s_reversed)], mode);
        Assert.Equal(s_reversed.Digest, committed.Digest.ToByteArray());
        Assert.Equal(reversed, await BitsAsync());
        DescribeReply now = await Server.Weights.DescribeAsync(new DescribeRequest());
        Assert.Equal(described.Tensors, now.Tensors);
    }

    [Theory, InlineData(UpdateMode.Staged), InlineData(UpdateMode.InPlace)]
    public async Task An_update_opens_nothing_again_and_reads_each_byte_once_in_one_launch(UpdateMode mode)
    {
        ulong bytes = s_original.Manifest.Aggregate(0ul, (sum, tensor) => sum + End(tensor) - tensor.Offset);
        await using Holder holder = await Holder.StartAsync(server, s_original);
        for (int i = 0; i < 4; i++)
        {
            Payload payload = i % 2 == 0 ? s_reversed : s_original;
            await holder.WriteAsync(payload);
            UpdateCounts counts = (await CommitAsync(payload, [holder.All(payload)], mode)).Counts;
            Assert.Equal((i == 0 ? 1ul : 0ul, 1ul, bytes, 0ul),
                (counts.HandlesOpened, counts.Launches, counts.DeviceBytes, counts.HostBytes));
            if (i > 0) Assert.Equal((0ul, 0ul), (counts.DeviceAllocations, counts.GraphsCaptured));
        }

        Assert.Equal(1u, (await Server.Weights.ReleaseMemoryAsync(new ReleaseMemoryRequest())).Closed);
        Assert.Equal(0u, (await Server.Weights.ReleaseMemoryAsync(new ReleaseMemoryRequest())).Closed);
        await holder.WriteAsync(s_reversed);
        Assert.Equal(1ul, (await CommitAsync(s_reversed, [holder.All(s_reversed)], mode)).Counts.HandlesOpened);
    }

    /// <summary>One buffer is written and read again and again, as where a trainer has little memory. Gaps are left out.</summary>
    [Fact]
    public async Task A_buffer_smaller_than_the_payload_is_a_ring()
    {
        string original = await BitsAsync();
        await PushAsync(s_reversed, UpdateMode.Staged);
        string reversed = await BitsAsync();
        await PushAsync(s_original, UpdateMode.Staged);
        Assert.NotEqual(original, reversed);

        ManifestTensor[][] buckets = [.. s_reversed.Manifest.Chunk(5)];
        int most = buckets.Max(bucket => (int)(End(bucket[^1]) - bucket[0].Offset));
        await using Holder holder = await Holder.StartAsync(server, new byte[most]);
        using Update update = await BeginAsync(s_reversed, UpdateMode.Staged);
        foreach (ManifestTensor[] bucket in buckets)
        {
            ulong start = bucket[0].Offset;
            await holder.WriteAsync(s_reversed.Bytes.AsMemory((int)start, (int)(End(bucket[^1]) - start)));
            await update.SendAsync(holder.Ranges(
                [.. bucket.Select(tensor => (tensor.Offset - start, tensor.Offset, End(tensor) - tensor.Offset))]));
            Assert.Equal(End(bucket[^1]), (await update.NextAsync()).Progress.PayloadBytes);
        }

        await update.SendAsync(s_reversed.Commit());
        Committed committed = (await update.NextAsync()).Committed;
        Assert.Equal((ulong)buckets.Length, committed.Counts.Launches);
        Assert.Equal(reversed, await BitsAsync());
    }

    /// <summary>
    /// Tensors of several pieces, cut where a piece of their digest ends, between messages and between allocations of two processes.
    /// </summary>
    [Fact]
    public async Task Tensors_may_be_cut_where_a_piece_of_the_digest_ends()
    {
        const int Piece = 131_072;
        using TemporaryFolder folder = new();
        HandMadeModel.Random(hidden: 64, intermediate: 96, layers: 1, vocabulary: 8_000, seed: 1).Write(folder.Path);
        Payload payload = Payload.Of(HandMadeModel.Random(hidden: 64, intermediate: 96, layers: 1, vocabulary: 8_000, seed: 2));
        await using ServerProcess large = await ServerProcess.StartAsync(
            folder.Path, server.Variables, "--device", "cuda", "--max-sequences", "1", "--kv-cache", "4MiB");
        await using Holder even = await Holder.StartAsync(server, payload), odd = await Holder.StartAsync(server, payload);
        await even.WriteAsync(payload);
        await odd.WriteAsync(payload);
        await odd.WaitAsync(); // a message has one event: the other's
        await large.CommitAsync(payload, 0, 1);
        DescribeReply expected = await large.Weights.DescribeAsync(new DescribeRequest());

        Random random = new(7);
        List<(ulong Start, ulong Bytes)> ranges = [];
        foreach (ManifestTensor tensor in payload.Manifest)
        {
            for (ulong at = tensor.Offset, end = End(tensor), bytes; at < end; at += bytes)
                ranges.Add((at, bytes = Math.Min(end - at, (ulong)random.Next(1, 4) * Piece)));
        }

        using Update update = await large.BeginUpdateAsync(payload.Begin(1, 2));
        await update.NextAsync();
        foreach ((ulong Start, ulong Bytes)[] some in ranges.Chunk(5))
        {
            UpdateRequest message = even.Ranges([.. some.Select(range => (range.Start, range.Start, range.Bytes))]);
            message.CudaIpc.Allocations.Add(odd.Handles.Allocations);
            for (int i = 1; i < some.Length; i += 2) message.CudaIpc.Ranges[i].Allocation = 1;
            await update.SendAsync(message);
            Assert.Equal(some[^1].Start + some[^1].Bytes, (await update.NextAsync()).Progress.PayloadBytes);
        }

        await update.SendAsync(payload.Commit());
        Committed committed = (await update.NextAsync()).Committed;
        Assert.Equal((2ul, 0ul), (committed.Counts.HandlesOpened, committed.Counts.HostBytes));
        DescribeReply now = await large.Weights.DescribeAsync(new DescribeRequest());
        Assert.Equal(expected.Tensors, now.Tensors);
    }

    /// <summary>A part of the tensors, of some of them a few elements: those go through the host.</summary>
    [Fact]
    public async Task Partial_and_sparse_updates_may_stand_in_device_memory()
    {
        static bool IsSparse(string name) => name.Contains("mlp", StringComparison.Ordinal);
        Payload part = s_reversed.Part(
            name => name.Contains("layers.1", StringComparison.Ordinal), name => IsSparse(name) ? [1, 5, 64, 65, 300] : null);
        ulong version = await VersionAsync();
        Assert.Equal(version + 1, (await Server.CommitAsync(part, version, version + 1, begin => begin.Partial = true)).Version);
        string expected = await BitsAsync();
        await PushAsync(s_original, UpdateMode.Staged);

        await using Holder holder = await Holder.StartAsync(server, part);
        await holder.WriteAsync(part);
        Committed committed = await CommitAsync(part, [holder.All(part)], UpdateMode.Staged, begin => begin.Partial = true);
        Assert.Equal(expected, await BitsAsync());
        Assert.Equal((ulong)part.Manifest.Count(tensor => IsSparse(tensor.Name)) * 5 * 6, committed.Counts.HostBytes);
        Assert.True(committed.Counts.DeviceBytes > committed.Counts.HostBytes);
    }

    // ---- Faults.

    [Fact]
    public async Task Wrong_messages_are_refused_by_name_and_the_old_weights_stay()
    {
        string original = await BitsAsync();
        await using Holder holder = await Holder.StartAsync(server, s_reversed), freed = await Holder.StartAsync(server, s_reversed),
            other = await Holder.StartAsync(server, s_reversed, device: 1);
        foreach (Holder one in (Holder[])[holder, other]) await one.WriteAsync(s_reversed);
        await freed.FreeAsync();
        ulong all = (ulong)s_reversed.Bytes.Length, first = End(s_reversed.Manifest[0]), second = s_reversed.Manifest[1].Offset;
        UpdateRequest half = s_reversed.Chunks(100).First();
        UpdateRequest garbage = holder.All(s_reversed), late = holder.All(s_reversed);
        garbage.CudaIpc.Allocations[0].Handle = ByteString.CopyFrom(new byte[64]);
        late.CudaIpc.ReadyEvent = ByteString.CopyFrom(new byte[64]);
        (string Reason, UpdateRequest[] Parts)[] wrong =
        [
            ($"ranges[0] has {all} bytes at offset 513 of allocation 0, which has {all + 512}", [holder.Ranges((1, 0, all))]),
            ($"bytes at offset {ulong.MaxValue} of allocation 0", [holder.Ranges((ulong.MaxValue - 512, 0, all))]),
            ("allocations[0] cannot be opened, as it is when its memory has been freed", [freed.All(s_reversed)]),
            ("allocations[0] cannot be opened", [garbage]),
            ("the event that says when the memory is written", [late]),
            ($"a range ends inside tensor '{s_reversed.Manifest[0].Name}', at its byte 100", [holder.Ranges((0, 0, 100))]),
            ($"payload byte {second}, in tensor '{s_reversed.Manifest[1].Name}', is in none of the ranges",
                [holder.Ranges((0, 0, first), (End(s_reversed.Manifest[1]), End(s_reversed.Manifest[1]), 2))]),
            ("expected payload byte 100 next, got 0", [half, holder.All(s_reversed)]),
            ($"the first bytes of tensor '{s_reversed.Manifest[0].Name}' came another way", [half, holder.Ranges((100, 100, all - 100))]),
            ($"{all + 1} bytes received of a payload of {all}", [holder.Ranges((0, 0, all - 1), (0, all, 1))]),
        ];
        foreach ((string reason, UpdateRequest[] parts) in wrong) await FailsAsync(reason, parts);

        string here = Uuid(holder), there = Uuid(other);
        Assert.NotEqual(here, there);
        await FailsAsync($"allocations[0] is on device {there}, and this server runs on {here}, cuda:0", [other.All(s_reversed)]);

        Nccl nccl = new()
        {
            UniqueId = ByteString.CopyFrom(new byte[128]),
            DeviceUuid = holder.Handles.Allocations[0].DeviceUuid,
            WorldSize = 2,
            Rank = 1,
            Buckets = { new NcclBucket { Bytes = all } },
        };
        await FailsAsync("two ranks on one device, and the sender is on this server's: send cuda_ipc", [new UpdateRequest { Nccl = nccl }]);

        byte[] flipped = [.. s_reversed.Bytes];
        flipped[s_reversed.Manifest[3].Offset] ^= 1;
        await holder.WriteAsync(flipped);
        await FailsAsync("the digest of what arrived is", [holder.All(s_reversed), s_reversed.Commit()]);
        Assert.Equal(original, await BitsAsync());

        static string Uuid(Holder holder)
        {
            Guid uuid = new(holder.Handles.Allocations[0].DeviceUuid.Span, bigEndian: true);
            return $"GPU-{uuid.ToString("D", CultureInfo.InvariantCulture)}";
        }
    }

    /// <summary>The device never reaches the event: the trainer was stopped before its work was done.</summary>
    [Theory, InlineData(UpdateMode.Staged), InlineData(UpdateMode.InPlace)]
    public async Task A_stopped_trainer_loses_its_seat_at_the_deadline(UpdateMode mode)
    {
        string original = await BitsAsync();
        await using Holder holder = await Holder.StartAsync(server, s_reversed);
        await holder.StopAsync(s_reversed);
        using Update update = await BeginAsync(s_reversed, mode, begin => begin.DeadlineMilliseconds = 1500);
        await update.SendAsync(holder.All(s_reversed));
        if (mode == UpdateMode.Staged) Assert.Equal(original, await BitsAsync()); // meanwhile
        Aborted aborted = (await update.NextAsync()).Aborted;
        Assert.Contains("deadline of 1500 ms", aborted.Reason, StringComparison.Ordinal);
        Assert.False(aborted.Poisoned); // nothing was read
        Assert.Equal(original, await BitsAsync());
        await PushAsync(s_original, mode);
        Assert.Equal(original, await BitsAsync());
    }

    [Theory]
    [InlineData("begun", "staged")]
    [InlineData("sent 0", "staged")]
    [InlineData("sent 1", "staged")]
    [InlineData("committed", "staged")]
    [InlineData("begun", "inplace")]
    [InlineData("sent 0", "inplace")]
    public async Task A_killed_trainer_leaves_the_old_weights_or_none_and_nothing_open(string step, string mode)
    {
        string original = await BitsAsync();
        ulong version = await VersionAsync();
        int open = server.Mappings();
        Variants variants = await Variants.SharedAsync();
        string changed = variants.Folder(new Content(true, true));
        await using (TrainerProcess trainer = TrainerProcess.Start(Server, "push", changed, "ipc", mode, 2, variables: server.Variables))
        {
            await trainer.ToAsync(step);
            if (step != "begun") Assert.Equal(open + 1, server.Mappings());
            await trainer.KillAsync();
        }

        StatusReply status = await Server.StatusAsync(status => !status.Updating);
        bool committed = step == "committed", poisoned = mode == "inplace" && step != "begun";
        Assert.Equal((committed ? version + 1 : version, poisoned), (status.Version, status.State == EngineState.Poisoned));
        if (!committed && !poisoned) Assert.Equal(original, await BitsAsync());
        for (int i = 0; server.Mappings() != open; i++)
        {
            Assert.True(i < 500, $"{server.Mappings()} mappings, {open} before");
            await Task.Delay(10);
        }

        await PushAsync(s_original, UpdateMode.Staged);
        Assert.Equal(original, await BitsAsync());
        Assert.True(!Server.Log.Contains("   at ", StringComparison.Ordinal), Server.Log);
    }

    // ---- Steps.

    private static ulong End(ManifestTensor tensor)
        => tensor.Offset + tensor.Shape.Aggregate(2ul, (product, length) => product * length);

    private async Task FailsAsync(string reason, UpdateRequest[] parts)
    {
        ulong version = await VersionAsync();
        UpdateReply last = (await Server.UpdateAsync([s_reversed.Begin(version, version + 1), .. parts]))[^1];
        Assert.True(last.Failed is { Poisoned: false } failed && failed.Reason.Contains(reason, StringComparison.Ordinal),
            $"expected '{reason}', got {last}");
        Assert.Equal((version, EngineState.Running), ((await StatusAsync()).Version, (await StatusAsync()).State));
    }

    private async Task<Update> BeginAsync(Payload payload, UpdateMode mode, Action<BeginUpdate>? change = null)
    {
        ulong version = await VersionAsync();
        Update update = await Server.BeginUpdateAsync(payload.Begin(version, version + 1, begin =>
        {
            begin.Mode = mode;
            change?.Invoke(begin);
        }));
        Assert.Equal(16, (await update.NextAsync()).Ready.DeviceUuid.Length);
        return update;
    }

    private async Task<Committed> CommitAsync(
        Payload payload, UpdateRequest[] parts, UpdateMode mode, Action<BeginUpdate>? change = null)
    {
        using Update update = await BeginAsync(payload, mode, change);
        foreach (UpdateRequest part in parts)
        {
            await update.SendAsync(part);
            UpdateReply landed = await update.NextAsync();
            Assert.True(landed.Progress is not null, landed.ToString());
        }

        await update.SendAsync(payload.Commit());
        UpdateReply end = await update.NextAsync();
        Assert.True(end.Committed is not null, end.ToString());
        return end.Committed;
    }

    private async Task PushAsync(Payload payload, UpdateMode mode)
    {
        ulong version = await VersionAsync();
        await Server.CommitAsync(payload, version, version + 1, begin => begin.Mode = mode);
    }

    private async Task<StatusReply> StatusAsync() => await Server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline());

    private async Task<ulong> VersionAsync() => (await StatusAsync()).Version;

    private async Task<string> BitsAsync() => string.Join('\n', (await Server.SamplesAsync(s_probe)).Select(Variants.Bits));
}
