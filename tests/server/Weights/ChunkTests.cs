using System.Buffers;
using CsCheck;
using Google.Protobuf;
using Grpc.Core;
using Rollout.Server.Grpc;
using Rollout.Server.Hosting;
using Rollout.Server.Weights;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>The bytes of a chunk from the connection to the update.</summary>
public sealed class ChunkTests
{
    [Theory]
    [InlineData(0, 0UL)]
    [InlineData(1, 1UL)]
    [InlineData(127, 127UL)]
    [InlineData(128, 1UL << 32)]
    [InlineData(16_384, (ulong)long.MaxValue)]
    [InlineData(1 << 20, 1UL << 63)]
    [InlineData(10 << 20, ulong.MaxValue)]
    public void A_chunk_is_read_bit_exact_however_it_is_cut(int length, ulong offset)
    {
        Random random = new(length);
        byte[] data = new byte[length];
        random.NextBytes(data);
        UpdateRequest sent = new() { Chunk = new Chunk { Offset = offset, Data = ByteString.CopyFrom(data) } };
        byte[] message = sent.ToByteArray();
        for (int i = 0; i < 5; i++)
        {
            int[] cuts = [.. Enumerable.Range(0, i * 3).Select(_ => random.Next(message.Length + 1))];
            UpdateRequest read = ChunkMarshaller.Parse(Cut(message, [.. cuts, 1, 2, 3, 4])); // inside tags and lengths too
            Assert.Equal(offset, read.Chunk.Offset);
            Assert.True(read.Chunk.Data.Span.SequenceEqual(data));
            ((IDisposable?)ChunkBuffer.Behind(read.Chunk.Data))?.Dispose();
            bool pooled = length > 0 && offset <= long.MaxValue; // empty chunks and offsets past any payload take the slow path
            if (pooled) Assert.Throws<ObjectDisposedException>(() => read.Chunk.Data.Span.Length);
        }
    }

    /// <summary>
    /// Also for messages that no library writes: repeated, reordered, unknown or truncated fields, and bytes that are not protobuf.
    /// </summary>
    [Fact]
    public void Any_bytes_mean_what_the_generated_parser_says()
    {
        byte[][] parts =
        [
            [0x08, 0x05], [0x08, 0x80, 0x01], [0x08, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01], [0x08, 0x80, 0x80, 0x00],
            [0x12, 0x00], [0x12, 0x03, 1, 2, 3], [0x12, 0x83, 0x00, 1, 2, 3], [0x12, 0x04, 1, 2, 3],
            [0x1A, 0x01, 7], [0x38, 0x01], [0x0A], [0x12],
        ];
        Gen<byte[]> field = Gen.Int[0, parts.Length - 1].Select(i => parts[i]);
        Gen<byte[]> fields = field.Array[0, 3].Select(chosen => chosen.SelectMany(part => part).ToArray());
        Gen<byte[]> chunk = fields.Select(Gen.Int[-1, 1], Gen.Int[0, 4].Select(i => (byte)(i == 0 ? 0x0A : i == 1 ? 0x2A : 0x12)),
            (bytes, wrong, tag) => (byte[])[tag, (byte)Math.Max(0, bytes.Length + (wrong * (bytes.Length % 2))), .. bytes]);
        Gen<byte[]> message = Gen.OneOf(chunk, chunk.Select(chunk, (a, b) => (byte[])[.. a, .. b]), Gen.Byte.Array[0, 12]);
        message.Select(Gen.Int[0, 12].Array[0, 4]).Sample((bytes, cuts) => Assert.Equal(
            Outcome(() => UpdateRequest.Parser.ParseFrom(bytes)),
            Outcome(() => ChunkMarshaller.Parse(Cut(bytes, cuts)))), iter: 20_000);

        static object Outcome(Func<UpdateRequest> parse)
        {
            try
            {
                return parse();
            }
            catch (InvalidProtocolBufferException)
            {
                return "not a message";
            }
        }
    }

    [Fact]
    public void Data_that_was_released_cannot_be_read_and_other_data_stays()
    {
        UpdateRequest sent = new() { Chunk = new Chunk { Data = ByteString.CopyFrom(1, 2) } };
        ByteString pooled = ChunkMarshaller.Parse(Cut(sent.ToByteArray(), [])).Chunk.Data;
        IDisposable buffer = ChunkBuffer.Behind(pooled)!;
        buffer.Dispose();
        buffer.Dispose();
        Assert.Throws<ObjectDisposedException>(() => pooled.Length + pooled.Span[0]);

        ByteString own = ByteString.CopyFrom(1, 2);
        Assert.Null(ChunkBuffer.Behind(own));
        Assert.Equal([1, 2], own.ToByteArray());
    }

    [Fact]
    public void Blocks_are_used_again_and_past_the_limit_they_are_small()
    {
        using BlockPool pool = new();
        IMemoryOwner<byte>[] blocks = [.. Enumerable.Range(0, BlockPool.MaxBlocks).Select(_ => pool.Rent())];
        Assert.All(blocks, block => Assert.Equal(BlockPool.BlockBytes, block.Memory.Length));
        Assert.Equal(blocks.Length, blocks.Distinct().Count());
        using (IMemoryOwner<byte> small = pool.Rent(4096)) Assert.InRange(small.Memory.Length, 4096, BlockPool.BlockBytes - 1);
        blocks[7].Dispose();
        Assert.Same(blocks[7], pool.Rent());
        Assert.Throws<ArgumentOutOfRangeException>(() => pool.Rent(BlockPool.BlockBytes + 1));
    }

    [Fact]
    public async Task Chunks_of_any_size_arrive_and_one_that_is_wrong_fails_at_its_own_turn()
    {
        Payload payload = Payload.Reversed("qwen3");
        await using ServerProcess server = await ServerProcess.StartAsync("qwen3");
        Random random = new(3);
        List<UpdateRequest> chunks = [];
        for (int at = 0; at < payload.Bytes.Length;)
        {
            int most = (int)Math.Min(1L << random.Next(20), payload.Bytes.Length - at); // from a byte to half the payload, evenly
            int size = random.Next(1, most + 1);
            chunks.Add(new UpdateRequest { Chunk = new Chunk { Offset = (ulong)at, Data = ByteString.CopyFrom(payload.Bytes, at, size) } });
            at += size;
        }

        // As many good ones after it as the connection buffers.
        int wrong = chunks.Count / 2;
        UpdateRequest again = chunks[wrong - 1];
        UpdateReply failed = await LastReplyAsync(
            server, [payload.Begin(0, 1), .. chunks[..wrong], again, .. chunks[wrong..], payload.Commit()]);
        Assert.Equal($"expected payload byte {chunks[wrong].Chunk.Offset} next, got {again.Chunk.Offset}", failed.Failed.Reason);

        UpdateRequest abort = new() { Abort = new AbortUpdate { Reason = "enough" } };
        Assert.Equal("enough", (await LastReplyAsync(server, [payload.Begin(0, 1), .. chunks[..wrong], abort])).Aborted.Reason);

        UpdateReply committed = await LastReplyAsync(server, [payload.Begin(0, 1), .. chunks, payload.Commit()]);
        Assert.Equal(payload.Digest, committed.Committed.Digest.ToByteArray());
    }

    private static async Task<UpdateReply> LastReplyAsync(ServerProcess server, IEnumerable<UpdateRequest> requests)
    {
        using AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> update = server.Weights.Update(deadline: Calls.Deadline());
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

    private static ReadOnlySequence<byte> Cut(byte[] bytes, int[] at)
    {
        Segment first = new(default, 0);
        Segment last = first;
        int from = 0;
        foreach (int to in at.Select(cut => Math.Min(cut, bytes.Length)).Append(bytes.Length).Order())
        {
            last = last.Append(bytes.AsMemory(from, to - from));
            from = to;
        }

        return new ReadOnlySequence<byte>(first, 0, last, last.Memory.Length);
    }

    private sealed class Segment : ReadOnlySequenceSegment<byte>
    {
        public Segment(ReadOnlyMemory<byte> memory, long index)
        {
            Memory = memory;
            RunningIndex = index;
        }

        public Segment Append(ReadOnlyMemory<byte> memory)
        {
            Segment next = new(memory, RunningIndex + Memory.Length);
            Next = next;
            return next;
        }
    }
}
