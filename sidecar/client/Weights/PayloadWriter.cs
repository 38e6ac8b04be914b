using System.Buffers;

namespace Rollout.Client;

/// <summary>
/// Copies the payload's bytes from the trainer's tensors, once, and hashes them while they are in the cache.
/// </summary>
internal sealed class PayloadWriter(PayloadLayout layout, IReadOnlyList<TensorSource> tensors, bool hash)
{
    /// <summary>Bytes moved at a time: whole elements, small enough for a core's cache and for gRPC's default message.</summary>
    public const int Piece = 1 << 20;

    private readonly byte[] _digests = new byte[tensors.Count * WeightDigest.Length];
    private readonly TensorHasher?[] _hashers = new TensorHasher?[tensors.Count]; // of partly copied tensors

    /// <summary>Length of the payload.</summary>
    public long Bytes => layout.PayloadBytes;

    /// <summary>Digest of everything written; empty where hashing is off.</summary>
    public byte[] Digest()
    {
        if (!hash)
            return [];
        for (int i = 0; i < tensors.Count; i++)
        {
            if (layout.Sizes[i] == 0)
                new TensorHasher(0).Finish(DigestOf(i));
        }

        return WeightDigest.Combine(_digests);
    }

    /// <summary>Writes payload bytes [from, to) to a file, several tensors at once if wanted. Parts must be in ascending order.</summary>
    /// <param name="file">The file.</param>
    /// <param name="from">Where the part before this one ended.</param>
    /// <param name="to">The end, exclusive.</param>
    /// <param name="at">Offset in the file for byte <paramref name="from"/>.</param>
    /// <param name="parallelism">Tensors at once.</param>
    public Task WriteToAsync(PayloadFile file, long from, long to, long at, int parallelism, CancellationToken cancellationToken)
    {
        ParallelOptions options = new() { MaxDegreeOfParallelism = parallelism, CancellationToken = cancellationToken };
        return Parallel.ForEachAsync(Overlapping(from, to), options, (i, token) =>
        {
            long start = (long)layout.Manifest[i].Offset;
            byte[] piece = ArrayPool<byte>.Shared.Rent(Piece);
            try
            {
                long end = Math.Min(to, start + layout.Sizes[i]);
                Write(i, Math.Max(from, start) - start, end - start, file, at - from + start, piece, token);
            }
            finally
            {
                ArrayPool<byte>.Shared.Return(piece);
            }

            return ValueTask.CompletedTask;
        });
    }

    /// <summary>The whole payload in pieces, gaps as zeros. A piece is valid until the second next one is requested.</summary>
    public IEnumerable<(long Offset, Memory<byte> Bytes)> Pieces()
    {
        byte[][] buffers = [new byte[Piece], new byte[Piece]];
        int turn = 0;
        int filled = 0;
        long start = 0;
        for (int i = 0; i < tensors.Count; i++)
        {
            long gap = (long)layout.Manifest[i].Offset - (start + filled);
            for (long at = -gap; at < layout.Sizes[i];)
            {
                int take = (int)Math.Min(Piece - filled, at < 0 ? -at : layout.Sizes[i] - at);
                Span<byte> destination = buffers[turn].AsSpan(filled, take);
                if (at < 0)
                    destination.Clear();
                else
                    Take(i, at, destination);
                at += take;
                filled += take;
                if (filled < Piece)
                    continue;
                yield return (start, buffers[turn]);
                start += filled;
                filled = 0;
                turn ^= 1;
            }
        }

        if (filled > 0)
            yield return (start, buffers[turn].AsMemory(0, filled));
    }

    private IEnumerable<int> Overlapping(long from, long to) => Enumerable.Range(0, tensors.Count).Where(i =>
        (long)layout.Manifest[i].Offset < to && (long)layout.Manifest[i].Offset + layout.Sizes[i] > from);

    /// <summary>Writes bytes [begin, end) of a tensor whose first byte is at offset start of the file.</summary>
    private void Write(int tensor, long begin, long end, PayloadFile file, long start, byte[] piece, CancellationToken cancellationToken)
    {
        for (long at = begin; at < end;)
        {
            cancellationToken.ThrowIfCancellationRequested();
            Span<byte> bytes = piece.AsSpan(0, (int)Math.Min(Piece, end - at));
            Take(tensor, at, bytes);
            file.Write(bytes, start + at);
            at += bytes.Length;
        }
    }

    private void Take(int tensor, long at, Span<byte> destination)
    {
        tensors[tensor].CopyTo(at, destination);
        if (!hash)
            return;
        TensorHasher hasher = _hashers[tensor] ??= new TensorHasher(layout.Sizes[tensor]);
        hasher.Append(destination);
        if (at + destination.Length < layout.Sizes[tensor])
            return;
        hasher.Finish(DigestOf(tensor));
        _hashers[tensor] = null;
    }

    private Span<byte> DigestOf(int tensor) => _digests.AsSpan(tensor * WeightDigest.Length, WeightDigest.Length);
}
