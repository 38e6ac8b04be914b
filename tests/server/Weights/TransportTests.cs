using System.Text;
using Google.Protobuf;
using Rollout.Native;
using Rollout.Server.Weights;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>The sources of an update's bytes: it gets exactly the bytes that were named, or it fails.</summary>
public sealed class TransportTests
{
    private static readonly Payload s_payload = Payload.Of("qwen3", (_, elements) => elements.Reverse(), alignment: 1);

    [Fact]
    public async Task Bytes_may_come_from_one_place_after_the_other_and_no_digest_need_be_sent()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        using TemporaryFolder shm = new("/dev/shm/rollout-test-");
        ulong half = (ulong)s_payload.Bytes.Length / 2;
        await File.WriteAllBytesAsync(shm["first"], s_payload.Bytes[..(int)half]);
        await File.WriteAllBytesAsync(shm["second"], [.. new byte[half], .. s_payload.Bytes[(int)half..]]);
        s_payload.WriteFile(shm["head"], ..3);
        ulong third = s_payload.Manifest[3].Offset;
        UpdateRequest Chunk(ulong from, ulong to) => new()
        {
            Chunk = new Chunk { Offset = from, Data = ByteString.CopyFrom(s_payload.Bytes.AsSpan((int)from, (int)(to - from))) },
        };
        ulong end = (ulong)s_payload.Bytes.Length;
        UpdateRequest[][] ways =
        [
            [Updates.Window(shm["first"], 0, 0, half), Updates.Window(shm["second"], half, half, 0)],
            [Updates.Window(shm["first"], 0, 0, 100), Updates.Window(shm["first"], 100, 100, half - 100),
                Chunk(half, half), Chunk(half, end - 1), Chunk(end - 1, end), Chunk(end, end)],
            [Updates.FileOf(shm["head"], 0), Updates.Window(shm["first"], third, third, half - third), Chunk(half, end)],
            [Chunk(0, third), Updates.Window(shm["first"], third, third, half - third),
                Updates.Window(shm["second"], half, half, end - half)],
        ];
        for (int i = 0; i < ways.Length; i++)
        {
            UpdateRequest begin = s_payload.Begin((ulong)i, (ulong)i + 1);
            List<UpdateReply> replies = await server.UpdateAsync([begin, .. ways[i], new UpdateRequest { Commit = new Commit() }]);
            Assert.True(replies[^1].Committed is not null, $"{i}: {replies[^1]}");
            Assert.Equal(s_payload.Digest, replies[^1].Committed.Digest.ToByteArray()); // the right bytes were written
            ulong[] progress = [.. replies.Where(reply => reply.Progress is not null).Select(reply => reply.Progress.PayloadBytes)];
            Assert.Equal(progress.Order(), progress);
            Assert.Equal(end, progress[^1]);
            Assert.Empty(StillOpen(shm.Path));
        }

        // A tensor as the engine describes it is one as the manifest has it.
        DescribeReply described = await server.Weights.DescribeAsync(new DescribeRequest());
        Assert.Equal(s_payload.Manifest.Select(tensor => (tensor.Name, tensor.Dtype, string.Join(',', tensor.Shape))).Order(),
            described.Tensors.Select(tensor => (tensor.Name, tensor.Dtype, string.Join(',', tensor.Shape))).Order());
    }

    [Fact]
    public async Task Windows_files_and_chunks_that_do_not_follow_or_end_too_late_fail()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        using TemporaryFolder shm = new("/dev/shm/rollout-test-");
        ulong end = (ulong)s_payload.Bytes.Length;
        await File.WriteAllBytesAsync(shm["all"], [.. s_payload.Bytes, 0]);
        s_payload.WriteFile(shm["file"], ..);
        Transpose(shm["file"], shm["transposed"]);
        UpdateRequest first = Updates.Window(shm["all"], 0, 0, 100);
        UpdateRequest Empty(ulong at) => new() { Chunk = new Chunk { Offset = at } };
        (string Reason, UpdateRequest[] Requests)[] wrong =
        [
            ("payload byte 100", [first, Updates.Window(shm["all"], 100, 99, 10)]),
            ("payload byte 100", [first, Updates.Window(shm["all"], 101, 101, 10)]),
            ("payload byte 100", [first, Updates.FileOf(shm["file"], 0)]),
            ("payload byte 100", [first, Empty(99)]),
            ($"{end + 1} bytes received", [first, Updates.Window(shm["all"], 100, 100, end - 99)]),
            ("too few", [first, Updates.Window(shm["all"], 102, 100, end - 100)]),
            ("past any payload", [Updates.Window(shm["all"], 0, 0, 1ul << 63)]),
            ("past any payload", [Updates.Window(shm["all"], 0, 1ul << 63, 1)]),
            ("past any payload", [Empty(1ul << 63)]),
            ("past any payload", [Updates.FileOf(shm["file"], 1ul << 63)]),
            ("has shape", [Updates.FileOf(shm["transposed"], 0)]),
        ];
        foreach ((string reason, UpdateRequest[] requests) in wrong)
        {
            UpdateReply last = (await server.UpdateAsync([s_payload.Begin(0, 1), .. requests]))[^1];
            Assert.Contains(reason, last.Failed?.Reason, StringComparison.Ordinal);
            Assert.Empty(StillOpen(shm.Path));
        }

        // As many bytes as the file has, to the last one.
        UpdateReply right = (await server.UpdateAsync([s_payload.Begin(0, 1), first, Updates.Window(shm["all"], 101, 100, 0),
            new UpdateRequest { Abort = new AbortUpdate() }]))[^1];
        Assert.NotNull(right.Aborted);
    }

    [Fact]
    public void The_segment_is_lent_once_kept_and_no_larger_than_the_machine_has_room_for()
    {
        using SharedSegment segment = new();
        Assert.Null(segment.Lend(0, 0, () => long.MaxValue));
        SealedMemory first = segment.Lend(0, 1000, () => long.MaxValue)!;
        Assert.Equal(1000, first.Bytes);
        Assert.Null(segment.Lend(0, 10, () => long.MaxValue)); // until it is given back
        segment.Discard();
        Assert.False(first.IsClosed); // a client still writes to it
        segment.GiveBack(0);
        Assert.Same(first, segment.Lend(0, 999, () => 0));
        segment.GiveBack(0);
        SealedMemory larger = segment.Lend(0, 1001, () => 0)!;
        Assert.Equal(1001, larger.Bytes);
        Assert.True(first.IsClosed);
        segment.GiveBack(0);

        // Half of what there is, but never less than 16 MiB; what it has already is not given up for less.
        Assert.Equal(20 << 20, segment.Lend(0, 1 << 30, () => 40 << 20)!.Bytes);
        segment.GiveBack(0);
        SealedMemory most = segment.Lend(0, 1 << 30, () => 0)!;
        Assert.Equal(20 << 20, most.Bytes);
        segment.GiveBack(0);
        segment.Discard();
        Assert.True(most.IsClosed);
        Assert.Equal(16 << 20, segment.Lend(0, 1 << 30, () => 0)!.Bytes);
        segment.GiveBack(0);
        segment.Discard();
    }

    /// <summary>Files of the folder that this process, and so the server in it, holds open.</summary>
    private static string[] StillOpen(string folder) =>
        [.. Directory.GetFileSystemEntries("/proc/self/fd").Select(file => new FileInfo(file).LinkTarget).OfType<string>()
            .Where(file => file.StartsWith(folder, StringComparison.Ordinal))];

    /// <summary>The same file, but for the first matrix: its header says it the other way round.</summary>
    private static void Transpose(string from, string to)
    {
        byte[] bytes = File.ReadAllBytes(from);
        V1.ManifestTensor matrix = s_payload.Manifest.First(tensor => tensor.Shape.Count == 2 && tensor.Shape[0] != tensor.Shape[1]);
        int header = (int)BitConverter.ToInt64(bytes, 0);
        string json = Encoding.UTF8.GetString(bytes, 8, header);
        int at = json.IndexOf($"\"{matrix.Name}\"", StringComparison.Ordinal);
        string shape = $"[{matrix.Shape[0]},{matrix.Shape[1]}]", other = $"[{matrix.Shape[1]},{matrix.Shape[0]}]";
        int found = json.IndexOf(shape, at, StringComparison.Ordinal);
        Assert.True(found > at, json);
        Encoding.UTF8.GetBytes(other).CopyTo(bytes, 8 + found);
        File.WriteAllBytes(to, bytes);
    }
}
