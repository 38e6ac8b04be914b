using System.Diagnostics;
using Google.Protobuf;
using Grpc.Core;
using Rollout.V1;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>The weight transaction over the wire. Each test finds and leaves the version it names.</summary>
public sealed class UpdateTests : IAsyncLifetime
{
    private static readonly Payload s_payload = Payload.Reversed("qwen3");
    private static readonly Golden.Case s_golden = Golden.Cases("qwen3")[1];

    private ServerProcess _server = null!;

    // Few seats, so that a group with many samples takes seconds on any machine.
    public async ValueTask InitializeAsync() => _server = await ServerProcess.StartAsync("qwen3", "--max-sequences", "4");

    public ValueTask DisposeAsync() => _server.DisposeAsync();

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task After_a_commit_the_output_is_that_of_a_fresh_engine_with_these_weights(bool sharedMemory)
    {
        using TemporaryFolder folder = new();
        s_payload.WriteModel(folder.Path);
        await using ServerProcess fresh = await ServerProcess.StartAsync(folder.Path);
        List<SampleChunk> expected = await fresh.SamplesAsync(Calls.Sampled(s_golden.Prompt, 24, seed: 9, n: 2));

        List<SampleChunk> before = await _server.SamplesAsync(Calls.Sampled(s_golden.Prompt, 24, seed: 9, n: 2));
        using TemporaryFolder shm = new("/dev/shm/rollout-test-");
        Committed committed;
        using (Update update = await BeginAsync(s_payload.Begin(0, 5)))
        {
            Assert.True((await NextAsync(update)).Ready.StagingBytes > 0);
            if (sharedMemory)
            {
                const int Offset = 100;
                await File.WriteAllBytesAsync(shm["weights"], [.. new byte[Offset], .. s_payload.Bytes, .. new byte[50]]);
                await SendAsync(update, new UpdateRequest { SharedMemory = new SharedMemory { Path = shm["weights"], Offset = Offset } });
            }
            else
            {
                foreach (UpdateRequest chunk in s_payload.Chunks(33_333)) await SendAsync(update, chunk); // elements split in the middle
            }

            Assert.Equal((ulong)s_payload.Bytes.Length, (await NextAsync(update)).Progress.PayloadBytes);
            Assert.Equal(before.Select(sample => sample.Ids),
                (await _server.SamplesAsync(Calls.Sampled(s_golden.Prompt, 24, seed: 9, n: 2))).Select(sample => sample.Ids)); // not yet
            await SendAsync(update, s_payload.Commit());
            committed = (await NextAsync(update)).Committed;
            Assert.False(await update.ResponseStream.MoveNext(default));
        }

        Assert.Equal(5u, committed.Version);
        Assert.Equal(s_payload.Digest, committed.Digest.ToByteArray());
        Assert.True(committed.Timings.SwapSeconds >= committed.Timings.StallSeconds);
        List<SampleChunk> after = await _server.SamplesAsync(Calls.Sampled(s_golden.Prompt, 24, seed: 9, n: 2));
        Assert.Equal(expected.Select(sample => sample.Ids), after.Select(sample => sample.Ids));
        Assert.Equal(expected.Select(sample => sample.Logprobs), after.Select(sample => sample.Logprobs));
        Assert.All(after.SelectMany(sample => sample.Versions), span => Assert.Equal(5u, span.Version));
        Assert.All(after, sample => Assert.Equal(5u, sample.OldestKvVersion));

        DescribeReply described = await _server.Weights.DescribeAsync(new DescribeRequest());
        Assert.Equal((5u, "xxh3-128-tree-131072"), (described.Version, described.DigestAlgorithm));
        DescribeReply loaded = await fresh.Weights.DescribeAsync(new DescribeRequest());
        Assert.Equal(loaded.Tensors.ToDictionary(t => t.Name, t => t.Digest), described.Tensors.ToDictionary(t => t.Name, t => t.Digest));
    }

    [Fact]
    public async Task Samples_in_flight_say_which_version_drew_which_token()
    {
        GenerateRequest request = Calls.Sampled(s_golden.Prompt, 490, seed: 2, n: 64, change: r => r.Stream = true);
        using AsyncServerStreamingCall<GenerateReply> call = _server.Rollout.Generate(request, deadline: Calls.Deadline());
        Assert.True(await call.ResponseStream.MoveNext(default));
        GenerateReply first = call.ResponseStream.Current;
        await CommitAsync(0, 3, begin => begin.Policy = UpdatePolicy.Keep);
        List<SampleChunk> samples = Calls.Join([first, .. await call.ResponseStream.ReadAllAsync().ToListAsync()]);
        ulong[][] versions = [.. samples.Select(Versions)];
        Assert.All(versions, sample => Assert.Equal(490, sample.Length));
        Assert.All(versions, sample => Assert.Equal(sample.Order(), sample));
        Assert.Contains(versions, sample => sample[0] == 0 && sample[^1] == 3);
        Assert.Equal([0UL, 3UL], versions.SelectMany(sample => sample).Distinct().Order());
    }

    /// <summary>The spans spread out; they must follow each other without a gap.</summary>
    private static ulong[] Versions(SampleChunk sample)
    {
        uint end = 0;
        foreach (VersionSpan span in sample.Versions)
        {
            Assert.Equal(end, span.Start);
            end = span.End;
        }

        return [.. sample.Versions.SelectMany(span => Enumerable.Repeat(span.Version, (int)(span.End - span.Start)))];
    }

    [Fact]
    public async Task A_manifest_that_does_not_fit_is_rejected_with_every_problem()
    {
        await RejectedAsync(begin =>
        {
            begin.BaseVersion = 7;
            begin.Manifest[0].Name = "no.such.tensor";
            begin.Manifest[1].Shape[0]++;
        }, "base_version", "no.such.tensor", s_payload.Manifest[0].Name, s_payload.Manifest[1].Name);
        await RejectedAsync(begin => begin.NewVersion = 0, "new_version");
        await RejectedAsync(begin => begin.Manifest[3].Name = begin.Manifest[2].Name, s_payload.Manifest[2].Name);
        await RejectedAsync(begin => begin.Manifest[3].Offset = begin.Manifest[2].Offset, s_payload.Manifest[3].Name);
        await RejectedAsync(begin => begin.PayloadBytes = 1000, s_payload.Manifest[0].Name, "and ", " more");
        await RejectedAsync(begin => begin.PayloadBytes *= 1000, "payload_bytes");
        await RejectedAsync(begin =>
        {
            begin.Manifest[0].Dtype = TensorDType.Unspecified;
            begin.Manifest[1].Dtype = (TensorDType)77;
            begin.Manifest[2].Offset = ulong.MaxValue;
            begin.Manifest[3].Shape[0] = ulong.MaxValue;
            begin.Policy = (UpdatePolicy)9;
            begin.PayloadBytes = ulong.MaxValue;
        }, [.. s_payload.Manifest.Take(4).Select(tensor => tensor.Name), "policy", "payload_bytes"]);
        await RejectedAsync(begin => begin.Manifest.Clear(), "manifest");
        await UnchangedAsync();
    }

    [Fact]
    public async Task Protocol_violations_fail_and_the_old_weights_stay()
    {
        UpdateRequest Chunk(ulong offset, int length)
            => new() { Chunk = new Chunk { Offset = offset, Data = ByteString.CopyFrom(s_payload.Bytes.AsSpan(0, length)) } };
        UpdateRequest wrongDigest = new() { Commit = new Commit { Digest = ByteString.CopyFrom(new byte[16]) } };
        UpdateRequest shortDigest = new() { Commit = new Commit { Digest = ByteString.CopyFrom(new byte[3]) } };
        UpdateRequest begin = s_payload.Begin(0, 1);
        UpdateRequest[] all = [.. s_payload.Chunks(1 << 20)];

        // As large as a client is told it may be, and refused only for what it is.
        UpdateRequest large = new() { Chunk = new Chunk { Data = ByteString.CopyFrom(new byte[64 << 20]) } };
        Assert.Contains("67108864 bytes", (await EndsAsync([begin, large])).Failed.Reason, StringComparison.Ordinal);

        (string Reason, UpdateRequest[] Requests)[] broken =
        [
            ("begin", [Chunk(0, 8)]),
            ("closed its side", []),
            ("got begin", [begin, begin]),
            ("does not know", [begin, new UpdateRequest()]),
            ("payload byte 0", [begin, Chunk(8, 8)]),
            ("payload byte 8", [begin, Chunk(0, 8), Chunk(0, 8)]),
            ("payload of", [begin, .. all, Chunk((ulong)s_payload.Bytes.Length, 8)]),
            ("bytes of tensor", [begin, Chunk(0, 8), s_payload.Commit()]),
            ("digest", [begin, .. all, wrongDigest]),
            ("16 bytes", [begin, .. all, shortDigest]),
        ];
        foreach ((string reason, UpdateRequest[] requests) in broken)
            Assert.Contains(reason, (await EndsAsync(requests)).Failed.Reason, StringComparison.Ordinal);
        Assert.Contains("changed my mind",
            (await EndsAsync([begin, .. all, new UpdateRequest { Abort = new AbortUpdate { Reason = "changed my mind" } }])).Aborted.Reason,
            StringComparison.Ordinal);
        Assert.Contains("closed its side", (await EndsAsync([begin, .. all])).Aborted.Reason, StringComparison.Ordinal);
        await UnchangedAsync();
    }

    [Fact]
    public async Task A_second_updater_is_refused_until_the_first_has_gone_and_status_names_the_first()
    {
        Update first = await BeginAsync(s_payload.Begin(0, 1, begin => begin.Owner = "trainer-7"));
        Assert.NotNull((await NextAsync(first)).Ready);
        await SendAsync(first, s_payload.Chunks(1000).First());
        StatusReply status = await _server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline(5));
        Assert.True(status.Updating);
        Assert.Equal("trainer-7", status.UpdateOwner);
        using (Update second = await BeginAsync(s_payload.Begin(0, 1)))
        {
            RpcException refused = await Calls.FailsAsync(() => second.ResponseStream.MoveNext(default), StatusCode.FailedPrecondition);
            Assert.Contains("trainer-7", refused.Status.Detail, StringComparison.Ordinal);
        }

        first.Dispose(); // a trainer that ends: the stream breaks
        for (int i = 0; (await _server.Control.StatusAsync(new StatusRequest())).Updating; i++)
        {
            Assert.True(i < 200, "the seat of a broken update was not given back");
            await Task.Delay(20);
        }

        await UnchangedAsync();
        await CommitAsync(0, 2);
        await CommitAsync(2, 4); // and again: the spare set is used over and over
        Assert.Equal(4u, (await _server.Control.StatusAsync(new StatusRequest())).Version);
    }

    [Fact]
    public async Task Shared_memory_means_a_regular_file_in_dev_shm()
    {
        using TemporaryFolder shm = new("/dev/shm/rollout-test-");
        using TemporaryFolder elsewhere = new();
        await File.WriteAllBytesAsync(elsewhere["weights"], s_payload.Bytes);
        await File.WriteAllBytesAsync(shm["short"], s_payload.Bytes.AsMemory(0, s_payload.Bytes.Length - 1));
        File.CreateSymbolicLink(shm["link"], elsewhere["weights"]);
        Directory.CreateSymbolicLink(shm["folder"], elsewhere.Path);
        using (Process fifo = Process.Start("mkfifo", [shm["pipe"]])) await fifo.WaitForExitAsync();

        (string Path, ulong Offset, string Reason)[] attacks =
        [
            ("", 0, "no path"),
            (elsewhere["weights"], 0, "must lie in /dev/shm"),
            ("weights", 0, "must lie in /dev/shm"),
            ("/dev/shm/", 0, "must lie in /dev/shm"),
            ("/dev/shm2/weights", 0, "must lie in /dev/shm"),
            ($"/dev/shm/..{elsewhere["weights"]}", 0, "'..'"),
            ($"/dev/shm/../shm/{Path.GetFileName(shm.Path)}/short", 0, "'..'"),
            ($"{shm.Path}//short", 0, "doubled slashes"),
            ($"{shm.Path}/short\0", 0, "null character"),
            (shm["link"], 0, "symbolic link"),
            (shm["folder/weights"], 0, "symbolic link"),
            (shm["pipe"], 0, "too few"),
            (shm.Path, 0, "directory"),
            (shm["none"], 0, "no such file"),
            (shm["short"], 0, "too few"),
            (shm["short"], ulong.MaxValue, "too few"),
        ];
        foreach ((string path, ulong offset, string reason) in attacks)
        {
            UpdateRequest attack = new() { SharedMemory = new SharedMemory { Path = path, Offset = offset } };
            string refused = (await EndsAsync([s_payload.Begin(0, 1), attack])).Failed.Reason;
            Assert.Contains(reason, refused, StringComparison.Ordinal);
        }

        await UnchangedAsync();
    }

    private async Task<Update> BeginAsync(UpdateRequest begin)
    {
        Update update = _server.Weights.Update(deadline: Calls.Deadline());
        await update.RequestStream.WriteAsync(begin);
        return update;
    }

    private static Task SendAsync(Update update, UpdateRequest request) => update.RequestStream.WriteAsync(request);

    private static async Task<UpdateReply> NextAsync(Update update)
    {
        Assert.True(await update.ResponseStream.MoveNext(default), "the server ended the call");
        return update.ResponseStream.Current;
    }

    private async Task CommitAsync(ulong from, ulong to, Action<BeginUpdate>? change = null)
    {
        UpdateReply last = await EndsAsync([s_payload.Begin(from, to, change), .. s_payload.Chunks(1 << 20), s_payload.Commit()]);
        Assert.True(last.Committed?.Version == to, last.ToString());
    }

    /// <summary>Sends all that the server will take, closes, and returns the last reply.</summary>
    private async Task<UpdateReply> EndsAsync(IEnumerable<UpdateRequest> requests)
    {
        using Update update = _server.Weights.Update(deadline: Calls.Deadline());
        Task<List<UpdateReply>> replies = update.ResponseStream.ReadAllAsync().ToListAsync().AsTask();
        try
        {
            foreach (UpdateRequest request in requests) await update.RequestStream.WriteAsync(request);
            await update.RequestStream.CompleteAsync();
        }
        catch (Exception e) when (e is RpcException or InvalidOperationException)
        {
            // The server has answered and ended the call.
        }

        return (await replies)[^1];
    }

    private async Task RejectedAsync(Action<BeginUpdate> change, params string[] named)
    {
        Rejected rejected = (await EndsAsync([s_payload.Begin(0, 1, change)])).Rejected;
        Assert.NotNull(rejected);
        string all = string.Join('\n', rejected.Problems.Select(problem => $"{problem.Field}: {problem.Message}"));
        Assert.All(named, name => Assert.Contains(name, all, StringComparison.Ordinal));
    }

    private async Task UnchangedAsync()
    {
        StatusReply status = await _server.Control.StatusAsync(new StatusRequest());
        Assert.False(status.Updating);
        Assert.Equal(0u, status.Version);
        SampleChunk sample = Assert.Single(await _server.SamplesAsync(Calls.Greedy(s_golden.Prompt, 16)));
        Assert.Equal(s_golden.Tokens, sample.Ids);
    }
}
