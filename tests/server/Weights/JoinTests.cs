using System.IO.Hashing;
using Google.Protobuf;
using Grpc.Core;
using Rollout.Kernels;
using Rollout.V1;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>Updates whose payload comes in parts over several streams, as from the ranks of a sharded trainer.</summary>
public sealed class JoinTests : IAsyncLifetime
{
    private static readonly Payload s_payload = Payload.Reversed("qwen3");

    private ServerProcess _server = null!;

    public async ValueTask InitializeAsync() => _server = await ServerProcess.StartAsync("qwen3");

    public ValueTask DisposeAsync() => _server.DisposeAsync();

    [Theory]
    [InlineData(1, UpdateMode.Staged)]
    [InlineData(2, UpdateMode.InPlace)]
    [InlineData(5, UpdateMode.Staged)]
    public async Task Parts_of_several_streams_commit_when_all_are_there(int ranks, UpdateMode mode)
    {
        Shards shards = new(s_payload, ranks);
        (List<Update> streams, _) = await OpenAsync(shards, mode);
        await streams[0].SendAsync(shards.Commit()); // waits for the others
        foreach (int rank in Enumerable.Range(0, ranks).Skip(1).Reverse())
        {
            Assert.Equal(0u, (await _server.StatusAsync(_ => true)).Version);
            await SendAsync(streams[rank], shards.Payloads[rank]);
            if (rank % 2 == 0) await streams[rank].RequestStream.CompleteAsync(); // or its stream stays open
        }

        UpdateReply[] ends = await EndsAsync(streams);
        Assert.Equal(1u, ends[0].Committed?.Version ?? 0);
        Assert.Equal(shards.Digest, ends[0].Committed.Digest.ToByteArray());
        Assert.All(ends, end => Assert.Equal(ends[0], end));
        Dictionary<string, ByteString> described = (await _server.Weights.DescribeAsync(new DescribeRequest())).Tensors
            .ToDictionary(tensor => tensor.Name, tensor => tensor.Digest);
        Assert.All(s_payload.Manifest, tensor => Assert.Equal(TensorDigest.Of(shards.Whole(tensor)), described[tensor.Name].ToByteArray()));
    }

    [Theory]
    [InlineData("a part aborts", UpdateMode.Staged, "part 2: enough")]
    [InlineData("a part aborts", UpdateMode.InPlace, "part 2: enough")]
    [InlineData("a part closes early", UpdateMode.Staged, "part 2: the client closed its side before all had come")]
    [InlineData("a part skips bytes", UpdateMode.InPlace, "part 2: expected payload byte")]
    [InlineData("a part commits", UpdateMode.Staged, "part 2: expected a payload message or abort, got commit")]
    [InlineData("a part breaks", UpdateMode.Staged, "part 2: the stream broke")]
    [InlineData("a part breaks", UpdateMode.InPlace, "part 2: the stream broke")]
    [InlineData("the first aborts", UpdateMode.Staged, "enough")]
    [InlineData("the first breaks", UpdateMode.InPlace, "the stream that began the update broke")]
    [InlineData("the first has another digest", UpdateMode.Staged, "the digest of what arrived is")]
    [InlineData("a part never comes", UpdateMode.Staged, "the deadline of 1500 ms")]
    public async Task A_part_that_fails_ends_the_update_for_all_and_the_next_one_commits(string way, UpdateMode mode, string reason)
    {
        Shards shards = new(s_payload, 3);
        uint deadline = way == "a part never comes" ? 1500u : 20_000;
        (List<Update> streams, _) = await OpenAsync(shards, mode, begin => begin.DeadlineMilliseconds = deadline);
        (Update first, Update second, Update third) = (streams[0], streams[1], streams[2]);
        await SendAsync(second, shards.Payloads[1]);
        ByteString half = ByteString.CopyFrom(shards.Payloads[2].AsSpan(0, shards.Payloads[2].Length / 2));
        await third.SendAsync(new UpdateRequest { Chunk = new Chunk { Data = half } });
        switch (way)
        {
            case "a part aborts":
                await third.SendAsync(new UpdateRequest { Abort = new AbortUpdate { Reason = "enough" } });
                break;
            case "a part closes early":
                await third.RequestStream.CompleteAsync();
                break;
            case "a part skips bytes":
                await third.SendAsync(new UpdateRequest { Chunk = new Chunk { Offset = (ulong)half.Length + 2, Data = half } });
                break;
            case "a part commits":
                await third.SendAsync(shards.Commit());
                break;
            case "a part breaks":
                await first.SendAsync(shards.Commit()); // which waits for it
                third.Dispose();
                break;
            case "the first aborts":
                await first.SendAsync(new UpdateRequest { Abort = new AbortUpdate { Reason = "enough" } });
                break;
            case "the first breaks":
                first.Dispose();
                break;
            case "the first has another digest":
                await third.SendAsync(new UpdateRequest
                {
                    Chunk = new Chunk { Offset = (ulong)half.Length, Data = ByteString.CopyFrom(shards.Payloads[2].AsSpan(half.Length)) },
                });
                await first.SendAsync(s_payload.Commit());
                break;
        }

        Update? gone = way == "a part breaks" ? third : way == "the first breaks" ? first : null;
        UpdateReply[] ends = await EndsAsync(streams.Where(stream => stream != gone));
        Assert.All(ends, end => Assert.Equal(ends[0], end));
        string told = ends[0].Failed?.Reason ?? ends[0].Aborted?.Reason ?? "";
        Assert.StartsWith(reason, told, StringComparison.Ordinal);
        Assert.Equal(mode == UpdateMode.InPlace, ends[0].Failed?.Poisoned ?? ends[0].Aborted.Poisoned);
        Assert.Equal(0u, (await _server.StatusAsync(_ => true)).Version);

        (List<Update> next, _) = await OpenAsync(shards, UpdateMode.Staged);
        for (int rank = 1; rank < 3; rank++) await SendAsync(next[rank], shards.Payloads[rank]);
        await next[0].SendAsync(shards.Commit());
        Assert.All(await EndsAsync(next), end => Assert.Equal(1u, end.Committed?.Version ?? 0));
    }

    [Fact]
    public async Task Who_cannot_join_is_told_so_and_the_update_goes_on()
    {
        Shards shards = new(s_payload, 3);
        (List<Update> streams, ByteString id) = await OpenAsync(shards, UpdateMode.Staged);
        foreach ((ByteString wrong, uint part, string reason) in ((ByteString, uint, string)[])[
            (ByteString.CopyFrom(new byte[16]), 1, "no update of this id"), (ByteString.Empty, 1, "no update of this id"),
            (id, 0, "part 0 cannot join"), (id, 3, "part 3 cannot join: the update has parts 1 to 2"),
            (id, 2, "part 2 has joined already")])
        {
            using Update refused = await _server.BeginUpdateAsync(Join(wrong, part));
            Assert.Contains(reason, (await refused.NextAsync()).Failed?.Reason, StringComparison.Ordinal);
            Assert.False(await refused.ResponseStream.MoveNext(default));
        }

        for (int rank = 1; rank < 3; rank++) await SendAsync(streams[rank], shards.Payloads[rank]);
        await streams[0].SendAsync(shards.Commit());
        Assert.All(await EndsAsync(streams), end => Assert.Equal(1u, end.Committed?.Version ?? 0));
        using Update late = await _server.BeginUpdateAsync(Join(id, 1));
        Assert.Contains("it is over", (await late.NextAsync()).Failed?.Reason, StringComparison.Ordinal);
    }

    /// <summary>Every part has shared memory of its own, all at the same time, and the next update has the same again.</summary>
    [Fact]
    public async Task Every_part_has_a_segment_of_its_own()
    {
        Shards shards = new(s_payload, 2);
        string?[] before = [];
        for (ulong version = 0; version < 2; version++)
        {
            ulong served = version;
            using Update first = await _server.BeginUpdateAsync(shards.Begin(
                served, begin => begin.SegmentBytes = (ulong)shards.Payloads[0].Length));
            Ready ready = (await first.NextAsync()).Ready;
            UpdateRequest join = Join(ready.UpdateId, 1);
            join.Join.SegmentBytes = (ulong)shards.Payloads[1].Length;
            using Update second = await _server.BeginUpdateAsync(join);
            Segment[] segments = [ready.Segment, (await second.NextAsync()).Ready.Segment];
            Assert.NotEqual(segments[0].Name, segments[1].Name);
            Assert.True(version == 0 || before.SequenceEqual(segments.Select(segment => segment.Name)));
            before = [.. segments.Select(segment => segment.Name)];
            foreach ((Update stream, int rank) in new[] { (first, 0), (second, 1) })
            {
                await using (FileStream file = new(segments[rank].Path, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
                    await file.WriteAsync(shards.Payloads[rank]);
                await stream.SendAsync(Updates.Window(segments[rank].Path, 0, 0, 0));
            }

            await first.SendAsync(shards.Commit());
            Assert.All(await EndsAsync([first, second]), end => Assert.Equal(served + 1, end.Committed?.Version ?? 0));
        }
    }

    private static UpdateRequest Join(ByteString id, uint part) => new() { Join = new JoinUpdate { UpdateId = id, Part = part } };

    /// <summary>Begins an update, sends part 0 and joins the others.</summary>
    private async Task<(List<Update> Streams, ByteString Id)> OpenAsync(Shards shards, UpdateMode mode, Action<BeginUpdate>? change = null)
    {
        List<Update> streams = [await _server.BeginUpdateAsync(shards.Begin(0, begin =>
        {
            begin.Mode = mode;
            change?.Invoke(begin);
        }))];
        Ready ready = (await streams[0].NextAsync()).Ready;
        Assert.Equal(shards.Payloads.Count > 1 ? 16 : 0, ready.UpdateId.Length);
        await SendAsync(streams[0], shards.Payloads[0]);
        for (uint part = 1; part < shards.Payloads.Count; part++)
        {
            streams.Add(await _server.BeginUpdateAsync(Join(ready.UpdateId, part)));
            Assert.Equal(mode, (await streams[^1].NextAsync()).Ready.Mode);
        }

        return (streams, ready.UpdateId);
    }

    private static Task SendAsync(Update stream, byte[] payload)
        => stream.SendAsync(new UpdateRequest { Chunk = new Chunk { Data = ByteString.CopyFrom(payload) } });

    /// <summary>The last reply of each.</summary>
    private static Task<UpdateReply[]> EndsAsync(IEnumerable<Update> streams) => Task.WhenAll(streams.Select(async stream =>
    {
        List<UpdateReply> replies = await stream.ResponseStream.ReadAllAsync().ToListAsync();
        stream.Dispose();
        return replies[^1];
    }));

    /// <summary>A payload, cut into slices that ranks have: every rank some of every tensor that has as many rows.</summary>
    private sealed class Shards
    {
        private readonly Payload _payload;
        private readonly List<ManifestTensor> _manifest = [];

        public Shards(Payload payload, int ranks)
        {
            _payload = payload;
            List<byte[]> digests = [];
            List<byte>[] payloads = [.. Enumerable.Range(0, ranks).Select(_ => new List<byte>())];
            foreach (ManifestTensor tensor in payload.Manifest)
            {
                byte[] whole = Whole(tensor);
                int rows = (int)tensor.Shape[0], rowBytes = whole.Length / rows;
                for (int rank = ranks - 1; rank >= 0; rank--) // any order will do
                {
                    (int from, int to) = (rows * rank / ranks, rows * (rank + 1) / ranks);
                    if (from == to) continue;
                    ManifestTensor slice = tensor.Clone();
                    (slice.FirstRow, slice.Rows, slice.Part) = ((ulong)from, (ulong)(to - from), (uint)rank);
                    slice.Offset = (ulong)payloads[rank].Count;
                    _manifest.Add(slice);
                    payloads[rank].AddRange(whole[(from * rowBytes)..(to * rowBytes)]);
                    digests.Add(TensorDigest.Of(whole.AsSpan((from * rowBytes)..(to * rowBytes))));
                }
            }

            Payloads = [.. payloads.Select(bytes => bytes.ToArray())];
            XxHash128 digest = new();
            foreach (byte[] one in digests) digest.Append(one);
            Digest = digest.GetCurrentHash();
        }

        public List<byte[]> Payloads { get; }

        public byte[] Digest { get; }

        public byte[] Whole(ManifestTensor tensor)
        {
            int bytes = (int)tensor.Shape.Aggregate(2ul, (product, length) => product * length);
            return _payload.Bytes[(int)tensor.Offset..((int)tensor.Offset + bytes)];
        }

        public UpdateRequest Begin(ulong from, Action<BeginUpdate> change) => _payload.Begin(from, from + 1, begin =>
        {
            begin.Manifest.Clear();
            begin.Manifest.Add(_manifest);
            begin.PayloadBytes = (ulong)Payloads[0].Length;
            begin.JoinedPayloadBytes.Add(Payloads.Skip(1).Select(payload => (ulong)payload.Length));
            change(begin);
        });

        public UpdateRequest Commit() => new() { Commit = new Commit { Digest = ByteString.CopyFrom(Digest) } };
    }
}
