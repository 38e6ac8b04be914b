using System.Buffers;
using Google.Protobuf;
using Grpc.Core;
using Rollout.Server.Weights;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>
/// Parses the messages of an update. The generated parser allocates an array for every chunk: megabytes that are cleared, page-faulted and
/// collected, to be read once. Here a chunk is copied into a <see cref="ChunkBuffer"/>. The generated parser parses all other messages.
/// </summary>
internal static class ChunkMarshaller
{
    private const byte ChunkTag = (UpdateRequest.ChunkFieldNumber << 3) | (int)WireFormat.WireType.LengthDelimited;
    private const byte OffsetTag = (Chunk.OffsetFieldNumber << 3) | (int)WireFormat.WireType.Varint;
    private const byte DataTag = (Chunk.DataFieldNumber << 3) | (int)WireFormat.WireType.LengthDelimited;

    public static Marshaller<UpdateRequest> Create(Marshaller<UpdateRequest> generated)
        => new(generated.ContextualSerializer, context => Parse(context.PayloadAsReadOnlySequence()));

    public static UpdateRequest Parse(in ReadOnlySequence<byte> message)
        => TryParseChunk(message) is { } chunk ? new UpdateRequest { Chunk = chunk } : UpdateRequest.Parser.ParseFrom(message);

    /// <summary>
    /// A chunk as every protobuf library writes it: offset, unless zero, then data up to the message's last byte. Null for everything else,
    /// including other encodings of a chunk, whose fields may be in any order and repeated.
    /// </summary>
    private static Chunk? TryParseChunk(in ReadOnlySequence<byte> message)
    {
        SequenceReader<byte> reader = new(message);
        if (!reader.IsNext(ChunkTag, advancePast: true) || !IsRest(ref reader)) return null;
        ulong offset = 0;
        if (reader.IsNext(OffsetTag, advancePast: true) && !TryReadVarint(ref reader, out offset)) return null;
        if (!reader.IsNext(DataTag, advancePast: true) || !IsRest(ref reader)) return null;
        return new Chunk { Offset = offset, Data = UnsafeByteOperations.UnsafeWrap(new ChunkBuffer(reader.UnreadSequence).Memory) };
    }

    /// <summary>Reads a length. True when it is the length of all that follows.</summary>
    private static bool IsRest(ref SequenceReader<byte> reader)
        => TryReadVarint(ref reader, out ulong length) && length == (ulong)reader.Remaining;

    private static bool TryReadVarint(ref SequenceReader<byte> reader, out ulong value)
    {
        value = 0;
        for (int shift = 0; shift < 63 && reader.TryRead(out byte next); shift += 7)
        {
            value |= (ulong)(next & 0x7F) << shift;
            if (next < 0x80) return true;
        }

        return false; // cut off, or of 64 bits and past any payload: the generated parser reports it
    }
}
