using System.Buffers;
using System.IO.Hashing;

namespace Rollout.Client;

/// <summary>
/// Takes the payload's bytes from the trainer's tensors, once, and hashes them on the way while they are in the cache.
/// </summary>
internal sealed class PayloadWriter(PayloadLayout layout, IReadOnlyList<TensorSource> tensors, bool hash)
{
    /// <summary>Bytes moved at a time: whole elements, small enough for a core's cache and for gRPC's default message.</summary>
    public const int Piece = 1 << 20;

    private readonly byte[] _digests = new byte[tensors.Count * WeightDigest.Length];

    /// <summary>Of everything written; empty where hashing is off.</summary>
    public byte[] Digest() => hash ? WeightDigest.Combine(_digests) : [];

    /// <summary>Each tensor at its offset, several at once if wanted.</summary>
    public Task WriteToAsync(SharedMemoryFile file, int parallelism, CancellationToken cancellationToken)
    {
        var options = new ParallelOptions { MaxDegreeOfParallelism = parallelism, CancellationToken = cancellationToken };
        return Parallel.ForEachAsync(Enumerable.Range(0, tensors.Count), options, (i, token) =>
        {
            byte[] piece = ArrayPool<byte>.Shared.Rent(Piece);
            try
            {
                Write(i, file, piece, token);
            }
            finally
            {
                ArrayPool<byte>.Shared.Return(piece);
            }

            return ValueTask.CompletedTask;
        });
    }

    /// <summary>The payload from its start to its end, gaps as zeros. A piece is valid until the second next one is asked for.</summary>
    public IEnumerable<(long Offset, Memory<byte> Bytes)> Pieces()
    {
        byte[][] buffers = [new byte[Piece], new byte[Piece]];
        int turn = 0;
        int filled = 0;
        long start = 0;
        for (int i = 0; i < tensors.Count; i++)
        {
            long gap = (long)layout.Manifest[i].Offset - (start + filled);
            var digest = new XxHash128();
            for (long at = -gap; at < layout.Sizes[i];)
            {
                int take = (int)Math.Min(Piece - filled, at < 0 ? -at : layout.Sizes[i] - at);
                Span<byte> destination = buffers[turn].AsSpan(filled, take);
                if (at < 0)
                    destination.Clear();
                else
                    Take(i, at, destination, digest);
                at += take;
                filled += take;
                if (filled < Piece)
                    continue;
                yield return (start, buffers[turn]);
                start += filled;
                filled = 0;
                turn ^= 1;
            }

            digest.GetHashAndReset(DigestOf(i));
        }

        if (filled > 0)
            yield return (start, buffers[turn].AsMemory(0, filled));
    }

    private void Write(int tensor, SharedMemoryFile file, byte[] piece, CancellationToken cancellationToken)
    {
        var digest = new XxHash128();
        long size = layout.Sizes[tensor];
        for (long at = 0; at < size;)
        {
            cancellationToken.ThrowIfCancellationRequested();
            Span<byte> bytes = piece.AsSpan(0, (int)Math.Min(Piece, size - at));
            Take(tensor, at, bytes, digest);
            file.Write(bytes, (long)layout.Manifest[tensor].Offset + at);
            at += bytes.Length;
        }

        digest.GetHashAndReset(DigestOf(tensor));
    }

    private void Take(int tensor, long at, Span<byte> destination, XxHash128 digest)
    {
        tensors[tensor].CopyTo(at, destination);
        if (hash)
            digest.Append(destination);
    }

    private Span<byte> DigestOf(int tensor) => _digests.AsSpan(tensor * WeightDigest.Length, WeightDigest.Length);
}
