using Google.Protobuf;
using Grpc.Core;
using Rollout.V1;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>Modes, partial and sparse updates, and all transports over the wire. Tests follow the version the server has.</summary>
public sealed class ModeTests : IAsyncLifetime
{
    private const uint Tokens = 490;

    private static readonly Golden.Case s_golden = Golden.Cases("qwen3")[1];
    private static readonly Payload s_original = Payload.Of("qwen3", (_, _) => { });
    private static readonly Payload s_reversed = Payload.Reversed("qwen3");
    private static readonly GenerateRequest s_probe = Calls.Sampled(s_golden.Prompt, 32, seed: 9, n: 2);

    private ServerProcess _server = null!;

    public async ValueTask InitializeAsync() => _server = await ServerProcess.StartAsync("qwen3", "--max-sequences", "4");

    public ValueTask DisposeAsync() => _server.DisposeAsync();

    [Fact]
    public async Task Ready_reports_the_mode_and_in_place_no_step_runs_meanwhile()
    {
        using (Update staged = await _server.BeginUpdateAsync(s_reversed.Begin(0, 1)))
        {
            Ready ready = (await staged.NextAsync()).Ready;
            Assert.Equal(UpdateMode.Staged, ready.Mode); // there is memory for a second set of so small a model
            Assert.InRange(ready.StagingBytes, (ulong)s_reversed.Bytes.Length, (ulong)s_reversed.Bytes.Length * 2);
            Assert.Equal(EngineState.Running, (await StatusAsync()).State);
            await staged.SendAsync(new UpdateRequest { Abort = new AbortUpdate { Reason = "only asking" } });
            Assert.False((await staged.NextAsync()).Aborted.Poisoned);
        }

        using Update update = await _server.BeginUpdateAsync(s_reversed.Begin(0, 1,
            begin => (begin.Mode, begin.Owner) = (UpdateMode.InPlace, "trainer-7")));
        Ready inPlace = (await update.NextAsync()).Ready;
        Assert.Equal((UpdateMode.InPlace, 0ul), (inPlace.Mode, inPlace.StagingBytes));
        Assert.Equal(EngineState.Running, (await StatusAsync()).State); // until the first payload message
        UpdateRequest[] chunks = [.. s_reversed.Chunks(100_000)];
        await update.SendAsync(chunks[0]);
        StatusReply status = await StatusAsync(status => status.State == EngineState.Updating);
        Assert.Equal(("trainer-7", "trainer-7", true, 0ul), (status.Reason, status.UpdateOwner, status.Updating, status.Version));
        Task<List<SampleChunk>> waits = _server.SamplesAsync(s_probe); // taken, and drawn once the update has ended
        for (int i = 0; i < 20; i++) Assert.Equal(status.Steps, (await StatusAsync()).Steps);
        Assert.False(waits.IsCompleted);
        foreach (UpdateRequest chunk in chunks[1..]) await update.SendAsync(chunk);
        await update.SendAsync(s_reversed.Commit());
        UpdateReply last = await update.NextAsync();
        while (last.Progress is not null) last = await update.NextAsync();
        Assert.Equal(1u, last.Committed.Version);
        Assert.True(last.Committed.Timings.StallSeconds >= last.Committed.Timings.SwapSeconds, last.ToString());
        Assert.All((await waits).SelectMany(sample => sample.Versions), span => Assert.Equal(1u, span.Version));
        Assert.Equal(EngineState.Running, (await StatusAsync()).State);
    }

    /// <summary>For every way an update can end half-way, and with a full update of either mode afterwards.</summary>
    [Fact]
    public async Task An_update_in_place_that_ends_half_way_poisons_until_a_full_update()
    {
        Bits original = await BitsAsync();
        UpdateRequest[] chunks = [.. s_reversed.Chunks(100_000)];
        UpdateRequest abort = new() { Abort = new AbortUpdate { Reason = "changed my mind" } };
        (string Name, UpdateRequest[] End)[] ends =
        [
            ("closed", []),
            ("aborted", [abort]),
            ("gap", [chunks[^1]]),
            ("too early", [s_reversed.Commit()]),
            ("device", [new UpdateRequest { Nccl = Ranks(new NcclBucket { Bytes = 16 }) }]),
        ];
        ulong version = 0;
        foreach ((string name, UpdateRequest[] end) in ends)
        {
            using AsyncServerStreamingCall<GenerateReply> begun = await BeginLongAsync();
            UpdateRequest begin = s_reversed.Begin(version, version + 1,
                begin => (begin.Mode, begin.Owner) = (UpdateMode.InPlace, "clumsy"));
            if (name == "device")
            {
                RpcException unimplemented = await Calls.FailsAsync(
                    () => _server.UpdateAsync([begin, chunks[0], .. end]), StatusCode.Unimplemented);
                Assert.DoesNotContain("old weights stay", unimplemented.Status.Detail, StringComparison.Ordinal);
            }
            else
            {
                UpdateReply last = (await _server.UpdateAsync([begin, chunks[0], .. end]))[^1];
                Assert.True(last.Failed?.Poisoned ?? last.Aborted.Poisoned, $"{name}: {last}");
            }

            StatusReply status = await StatusAsync();
            Assert.Equal((EngineState.Poisoned, version), (status.State, status.Version));
            Assert.Contains("clumsy", status.Reason, StringComparison.Ordinal);
            List<SampleChunk> cut = Calls.Join(await begun.ResponseStream.ReadAllAsync().ToListAsync());
            Assert.All(cut, sample => Assert.True(sample.FinishReason == FinishReason.Abort || sample.Ids.Count == Tokens));
            Assert.Contains(cut, sample => sample.FinishReason == FinishReason.Abort && sample.Ids.Count > 0);
            Assert.DoesNotContain(cut.SelectMany(sample => sample.Versions), span => span.Version != version);
            RpcException refused = await Calls.FailsAsync(() => _server.SamplesAsync(s_probe), StatusCode.FailedPrecondition);
            Assert.StartsWith("POISONED: ", refused.Status.Detail, StringComparison.Ordinal);
            Assert.Contains("clumsy", refused.Status.Detail, StringComparison.Ordinal);

            // Neither a partial update nor a full one that does not commit ends this; then a full update of either mode does.
            UpdateRequest partial = s_reversed.Begin(version, version + 1, begin => begin.Partial = true);
            Rejected rejected = (await _server.UpdateAsync([partial]))[^1].Rejected;
            Assert.Contains(rejected.Problems, problem => problem.Message.Contains("only a full update", StringComparison.Ordinal));
            UpdateRequest[] givenUp = [s_original.Begin(version, version + 1), s_original.Chunks(1000).First(), abort];
            Assert.False((await _server.UpdateAsync(givenUp))[^1].Aborted.Poisoned);
            Assert.Equal(EngineState.Poisoned, (await StatusAsync()).State);
            UpdateMode healer = version % 2 == 0 ? UpdateMode.Staged : UpdateMode.InPlace;
            await _server.CommitAsync(s_original, version, ++version, begin => begin.Mode = healer);
            Assert.Equal(EngineState.Running, (await StatusAsync()).State);
            Assert.Equal(original, await BitsAsync());
        }
    }

    [Fact]
    public async Task Partial_and_sparse_updates_by_every_transport_and_mode_make_what_a_file_holds()
    {
        // One third of the tensors are sent whole, one third in some elements, the rest not at all. As a file all are sent whole.
        int Kind(string name) => s_original.Manifest.FindIndex(tensor => tensor.Name == name) % 3;
        uint[]? Indices(string name) => Kind(name) == 1 ? [0, 5, 6, 31] : null;
        void Change(string name, Span<ushort> elements)
        {
            if (Kind(name) == 0) elements.Reverse();
            foreach (uint index in Indices(name) ?? []) elements[(int)index] ^= 0x8003;
        }

        Payload changed = Payload.Of("qwen3", Change);
        Payload part = changed.Part(name => Kind(name) < 2, Indices);
        Payload whole = Payload.Of("qwen3", Change, alignment: 1).Part(name => Kind(name) < 2, _ => null);
        using TemporaryFolder folder = new();
        changed.WriteModel(folder.Path);
        Bits expected;
        DescribeReply loaded;
        await using (ServerProcess fresh = await ServerProcess.StartAsync(folder.Path))
        {
            expected = await BitsAsync(fresh);
            loaded = await fresh.Weights.DescribeAsync(new DescribeRequest());
        }

        // A ring of two windows, smaller than the payload, written over as Progress says.
        const int Window = 20_001; // no multiple of an element, a row or a tensor
        Assert.True(part.Bytes.Length > 3 * Window);
        using TemporaryFolder shm = new("/dev/shm/rollout-test-");
        await File.WriteAllBytesAsync(shm["ring"], new byte[2 * Window]);
        // Two files, the second behind the first.
        int half = whole.Manifest.Count / 2;
        whole.WriteFile(folder["first.safetensors"], ..half);
        whole.WriteFile(folder["second.safetensors"], half..);

        Bits original = await BitsAsync();
        Assert.NotEqual(original, expected);
        ulong version = 0;
        foreach (UpdateMode mode in (UpdateMode[])[UpdateMode.Staged, UpdateMode.InPlace])
        {
            foreach (string transport in (string[])["inline", "ring", "files"])
            {
                Payload sent = transport == "files" ? whole : part;
                UpdateRequest begin = sent.Begin(version, ++version, begin => (begin.Partial, begin.Mode) = (true, mode));
                using Update update = await _server.BeginUpdateAsync(begin);
                Assert.Equal(mode, (await update.NextAsync()).Ready.Mode);
                switch (transport)
                {
                    case "inline":
                        foreach (UpdateRequest chunk in sent.Chunks(33_333)) await update.SendAsync(chunk);
                        await ReceivedAsync(update, sent.Bytes.Length);
                        break;

                    case "ring":
                        using (FileStream ring = File.Open(shm["ring"], FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
                        {
                            for (int at = 0; at < sent.Bytes.Length; at += Window)
                            {
                                int bytes = Math.Min(Window, sent.Bytes.Length - at);
                                int place = at / Window % 2 * Window;
                                ring.Position = place;
                                await ring.WriteAsync(sent.Bytes.AsMemory(at, bytes));
                                await ring.FlushAsync();
                                await update.SendAsync(Updates.Window(ring.Name, (ulong)place, (ulong)at, (ulong)bytes));
                                await ReceivedAsync(update, at + bytes);
                            }
                        }

                        break;

                    default:
                        ulong second = sent.Manifest[half].Offset;
                        await update.SendAsync(Updates.FileOf(folder["first.safetensors"], 0));
                        await ReceivedAsync(update, (long)second);
                        await update.SendAsync(Updates.FileOf(folder["second.safetensors"], second));
                        await ReceivedAsync(update, sent.Bytes.Length);
                        break;
                }

                await update.SendAsync(sent.Commit());
                Committed committed = (await update.NextAsync()).Committed;
                Assert.Equal((version, ByteString.CopyFrom(sent.Digest)), (committed.Version, committed.Digest));
                Assert.True(expected == await BitsAsync(), $"{transport}, {mode}");
                Dictionary<string, ByteString> digests = loaded.Tensors.ToDictionary(tensor => tensor.Name, tensor => tensor.Digest);
                foreach (DescribedTensor tensor in (await _server.Weights.DescribeAsync(new DescribeRequest())).Tensors)
                    Assert.Equal(digests[tensor.Name], tensor.Digest);

                await _server.CommitAsync(s_original, version, ++version);
                Assert.Equal(original, await BitsAsync());
            }
        }
    }

    /// <summary>A message without faults, but for the buckets given.</summary>
    private static Nccl Ranks(params NcclBucket[] buckets) => new()
    {
        UniqueId = ByteString.CopyFrom(new byte[128]),
        DeviceUuid = ByteString.CopyFrom(new byte[16]),
        WorldSize = 2,
        Rank = 1,
        Buckets = { buckets },
    };

    [Fact]
    public async Task Device_transports_are_refused_with_what_is_missing_or_malformed()
    {
        static ByteString Zeros(int count) => ByteString.CopyFrom(new byte[count]);
        CudaAllocation allocation = new() { Kind = CudaHandleKind.Legacy, Handle = Zeros(64), DeviceUuid = Zeros(16) };
        CudaRange range = new() { Bytes = 16 };
        Nccl ranks = Ranks(new NcclBucket { Bytes = 16 });
        (string Reason, UpdateRequest Request)[] sound =
        [
            ("cuda_ipc needs a CUDA device", new() { CudaIpc = new CudaIpc { Allocations = { allocation }, Ranges = { range } } }),
            ("nccl needs a CUDA device", new() { Nccl = Ranks(new NcclBucket { Bytes = 16 }) }),
        ];
        foreach ((string reason, UpdateRequest request) in sound)
        {
            RpcException refused = await Calls.FailsAsync(
                () => _server.UpdateAsync([s_reversed.Begin(0, 1), request]), StatusCode.Unimplemented);
            Assert.Contains(reason, refused.Status.Detail, StringComparison.Ordinal);
            Assert.Contains("cpu", refused.Status.Detail, StringComparison.Ordinal);
        }

        (string Reason, UpdateRequest Request)[] malformed =
        [
            ("allocations[1]: handle has 63 bytes", Ipc([allocation, new(allocation) { Handle = Zeros(63) }], [range])),
            ("allocations[0]: device_uuid has 1 bytes", Ipc([new(allocation) { DeviceUuid = Zeros(1) }], [range])),
            ("allocations[0]: kind must be LEGACY", Ipc([new(allocation) { Kind = CudaHandleKind.Unspecified }], [range])),
            ("names no ranges", Ipc([allocation], [])),
            ("ranges[1] is in allocation 1 of 1", Ipc([allocation], [range, new() { Allocation = 1, PayloadOffset = 16, Bytes = 1 }])),
            ("ranges[0] has 0 bytes", Ipc([allocation], [new()])),
            ("past any payload", Ipc([allocation], [new() { PayloadOffset = 1, Bytes = long.MaxValue }])),
            ("ranges[1] begins at payload byte 15, the one before it ends at 16",
                Ipc([allocation], [range, new() { PayloadOffset = 15, Bytes = 1 }])),
            ("ready_event has 3 bytes", new() { CudaIpc = new(Ipc([allocation], [range]).CudaIpc) { ReadyEvent = Zeros(3) } }),
            ("unique_id has 0 bytes", new() { Nccl = new Nccl(ranks) { UniqueId = ByteString.Empty } }),
            ("device_uuid has 17 bytes", new() { Nccl = new Nccl(ranks) { DeviceUuid = Zeros(17) } }),
            ("world_size must be between 2 and 4096, it is 1", new() { Nccl = new Nccl(ranks) { WorldSize = 1 } }),
            ("rank 2 is not one of 2", new() { Nccl = new Nccl(ranks) { Rank = 2 } }),
            ("root 7 is not one of 2", new() { Nccl = new Nccl(ranks) { Root = 7 } }),
            ("root and rank are both 1", new() { Nccl = new Nccl(ranks) { Root = 1 } }),
            ("names no buckets", new() { Nccl = Ranks() }),
            ("buckets[0] has 0 bytes", new() { Nccl = Ranks(new NcclBucket()) }),
            ("buckets[0] has 1073741825 bytes", new() { Nccl = Ranks(new NcclBucket { Bytes = (1 << 30) + 1 }) }),
            ("buckets[1] begins at payload byte 7", new()
            {
                Nccl = Ranks(new NcclBucket { Bytes = 8 }, new NcclBucket { PayloadOffset = 7, Bytes = 8 }),
            }),
        ];
        foreach ((string reason, UpdateRequest request) in malformed)
        {
            UpdateReply last = (await _server.UpdateAsync([s_reversed.Begin(0, 1), request]))[^1];
            Assert.Contains(reason, last.Failed.Reason, StringComparison.Ordinal);
        }

        static UpdateRequest Ipc(CudaAllocation[] allocations, CudaRange[] ranges)
            => new() { CudaIpc = new CudaIpc { Allocations = { allocations }, Ranges = { ranges } } };

        StatusReply status = await StatusAsync();
        Assert.Equal((EngineState.Running, false), (status.State, status.Updating));
    }

    [Theory]
    [InlineData(UpdateMode.Staged, UpdatePolicy.Recompute)]
    [InlineData(UpdateMode.Staged, UpdatePolicy.Keep)]
    [InlineData(UpdateMode.InPlace, UpdatePolicy.Recompute)]
    [InlineData(UpdateMode.InPlace, UpdatePolicy.Keep)]
    public async Task Recompute_continues_as_the_new_model_would_and_keep_with_old_keys_and_values(UpdateMode mode, UpdatePolicy policy)
    {
        // Paused, so that samples are partly drawn when the weights change, however slow this process is.
        using AsyncServerStreamingCall<GenerateReply> call = await BeginLongAsync();
        await _server.Control.PauseAsync(new PauseRequest { Mode = PauseMode.Keep, LeaseMilliseconds = 60_000 });
        await _server.CommitAsync(s_reversed, 0, 1, begin => (begin.Mode, begin.Policy) = (mode, policy));
        await _server.Control.ResumeAsync(new ResumeRequest());
        List<SampleChunk> samples = Calls.Join(await call.ResponseStream.ReadAllAsync().ToListAsync());
        Assert.All(samples, sample => Assert.Equal(((int)Tokens, FinishReason.Length), (sample.Ids.Count, sample.FinishReason)));
        SampleChunk[] both = [.. samples.Where(sample => sample.Versions[0].Version == 0 && sample.Versions[^1].Version == 1)];
        Assert.All(both, sample => Assert.Equal(policy == UpdatePolicy.Keep ? 0ul : 1ul, sample.OldestKvVersion));
        SampleChunk first = both[0];
        int swap = (int)first.Versions.First(span => span.Version == 1).Start;

        // The server has the new weights now: a fresh run on prompt and prefix, drawn with the same noise.
        uint[] prompt = [.. s_golden.Prompt, .. first.Ids.Take(swap)];
        SampleChunk fresh = (await _server.SamplesAsync(Calls.Sampled(prompt, Tokens - (uint)swap, seed: 2, n: first.Index + 1)))[^1];
        if (policy == UpdatePolicy.Recompute)
        {
            Assert.Equal(fresh.Ids, first.Ids.Skip(swap));
            Assert.Equal(fresh.Logprobs, first.Logprobs.Skip(swap));
        }
        else
        {
            Assert.NotEqual(fresh.Logprobs[0], first.Logprobs[swap]); // keys and values of the old weights
        }
    }

    [Fact]
    public async Task Unreadable_bytes_are_refused_without_waiting_for_groups_that_began()
    {
        using AsyncServerStreamingCall<GenerateReply> begun = await BeginLongAsync();
        await _server.Control.PauseAsync(new PauseRequest { Mode = PauseMode.Keep, LeaseMilliseconds = 60_000 }); // so that it cannot end
        UpdateRequest begin = s_reversed.Begin(0, 1, begin => (begin.Mode, begin.Policy) = (UpdateMode.InPlace, UpdatePolicy.Drain));
        UpdateRequest[] unreadable = [Updates.FileOf("/nowhere", 0), Updates.Window("/dev/shm/rollout-nowhere", 0, 0, 1)];
        foreach (UpdateRequest nowhere in unreadable)
        {
            UpdateFailed failed = (await _server.UpdateAsync([begin, nowhere]))[^1].Failed;
            Assert.Contains("refused: there is no such file", failed.Reason, StringComparison.Ordinal);
            Assert.False(failed.Poisoned);
        }

        Assert.Equal(EngineState.Paused, (await StatusAsync()).State); // the lease has not ended
        await _server.Control.ResumeAsync(new ResumeRequest());
        List<SampleChunk> samples = Calls.Join(await begun.ResponseStream.ReadAllAsync().ToListAsync());
        Assert.All(samples, sample => Assert.Equal(((int)Tokens, FinishReason.Length), (sample.Ids.Count, sample.FinishReason)));
    }

    [Fact]
    public async Task Under_drain_in_place_what_began_ends_first_and_the_rest_waits_for_new_weights()
    {
        using AsyncServerStreamingCall<GenerateReply> begun = await BeginLongAsync();
        using Update update = await _server.BeginUpdateAsync(s_reversed.Begin(0, 1,
            begin => (begin.Mode, begin.Policy) = (UpdateMode.InPlace, UpdatePolicy.Drain)));
        Assert.NotNull((await update.NextAsync()).Ready);
        foreach (UpdateRequest chunk in s_reversed.Chunks(1 << 20)) await update.SendAsync(chunk);
        List<SampleChunk> old = Calls.Join(await begun.ResponseStream.ReadAllAsync().ToListAsync());
        Task<List<SampleChunk>> waits = _server.SamplesAsync(s_probe);
        Assert.NotNull((await update.NextAsync()).Progress);
        await update.SendAsync(s_reversed.Commit());
        Assert.Equal(1u, (await update.NextAsync()).Committed.Version);
        Assert.All(old, sample => Assert.Equal(((int)Tokens, FinishReason.Length), (sample.Ids.Count, sample.FinishReason)));
        Assert.All(old.SelectMany(sample => sample.Versions), span => Assert.Equal(0u, span.Version));
        Assert.All((await waits).SelectMany(sample => sample.Versions), span => Assert.Equal(1u, span.Version));
    }

    /// <summary>Both samples' tokens and log-probabilities: equal strings are equal bits.</summary>
    private sealed record Bits(string Text);

    private Task<Bits> BitsAsync() => BitsAsync(_server);

    private static async Task<Bits> BitsAsync(ServerProcess server)
    {
        List<SampleChunk> samples = await server.SamplesAsync(s_probe);
        return new Bits(string.Join('\n', samples.Select(sample => string.Join(' ',
            sample.Ids.Zip(sample.Logprobs, (id, logprob) => $"{id}:{BitConverter.SingleToInt32Bits(logprob):x}")))));
    }

    /// <summary>A group that has begun, with seconds to go: it has far more samples than there are seats.</summary>
    private async Task<AsyncServerStreamingCall<GenerateReply>> BeginLongAsync()
    {
        GenerateRequest request = Calls.Sampled(s_golden.Prompt, Tokens, seed: 2, n: 64);
        AsyncServerStreamingCall<GenerateReply> call = _server.Rollout.Generate(request, deadline: Calls.Deadline());
        ulong before = (await StatusAsync()).GeneratedTokens;
        await StatusAsync(status => status.GeneratedTokens > before);
        return call;
    }

    private async Task<StatusReply> StatusAsync() => await _server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline(5));

    private async Task<StatusReply> StatusAsync(Func<StatusReply, bool> wanted)
    {
        for (DateTime until = Calls.Deadline(10); DateTime.UtcNow < until;)
        {
            StatusReply status = await StatusAsync();
            if (wanted(status)) return status;
        }

        throw new TimeoutException($"the server did not come to the wanted state: {await StatusAsync()}");
    }

    private static async Task ReceivedAsync(Update update, long bytes)
    {
        UpdateReply reply = await update.NextAsync();
        Assert.True(reply.Progress is not null, reply.ToString());
        Assert.Equal((ulong)bytes, reply.Progress.PayloadBytes);
    }
}
