using System.Diagnostics;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Engine;

/// <summary>Payload bytes [PayloadOffset, PayloadOffset + Bytes), which stand in device memory from an offset on.</summary>
public readonly record struct DevicePart(DeviceBytes Memory, long Offset, long PayloadOffset, long Bytes);

/// <summary>
/// A part of a payload in memory of the backend's own device: hashed, converted and stored there, in one launch. Only tensors of which some
/// elements are sent go through the host.
/// </summary>
/// <param name="peers">The backend's.</param>
/// <param name="parts">Where the tensors stand, ascending; gaps between tensors need not be covered.</param>
/// <param name="readyEvent">Of another process: nothing is read before the device has reached it. Empty: everything is written.</param>
/// <param name="payloadOffset">Of the part's first byte.</param>
/// <param name="bytes">Its length.</param>
public sealed class DeviceSource(
    CudaPeers peers, IReadOnlyList<DevicePart> parts, ReadOnlyMemory<byte> readyEvent, long payloadOffset, long bytes)
    : PayloadSource(payloadOffset, bytes, owner: null)
{
    private Piece[] _pieces = [];

    internal override async Task PrepareAsync(PayloadCursor cursor, CancellationToken cancellation)
    {
        _pieces = [.. Cut(cursor)];
        if (!readyEvent.IsEmpty) await WaitAsync(cancellation).ConfigureAwait(false);
        cancellation.ThrowIfCancellationRequested();
    }

    internal override async Task ReadAsync(PayloadCursor cursor, CancellationToken cancellation)
    {
        await Task.Run(() => Read(_pieces), CancellationToken.None).ConfigureAwait(false);
        cursor.MoveTo(PayloadOffset + Bytes);
    }

    /// <summary>Bytes of one tensor that stand together.</summary>
    private readonly record struct Piece(IncomingRange Range, long First, DeviceBytes Memory, long Offset, long Bytes);

    private IEnumerable<Piece> Cut(PayloadCursor cursor)
    {
        int p = 0;
        foreach ((IncomingRange range, long left) in cursor.Left(PayloadOffset + Bytes))
        {
            IncomingTensor tensor = range.Tensor;
            if (!tensor.IsSparse && range.IsOnHost)
                throw Wrong($"the first bytes of tensor '{tensor.Name}' came another way: send it whole in one way");
            for (long taken = range.Taken, end = taken + left; taken < end;)
            {
                long at = range.Start + taken;
                while (p < parts.Count && parts[p].PayloadOffset + parts[p].Bytes <= at) p++;
                if (p == parts.Count || parts[p].PayloadOffset > at)
                    throw Wrong($"payload byte {at}, in tensor '{tensor.Name}', is in none of the ranges");
                DevicePart part = parts[p];
                long count = Math.Min(end - taken, part.PayloadOffset + part.Bytes - at);
                bool isBorder = taken + count == range.Bytes || (taken + count) % TensorDigest.PieceBytes == 0;
                if (!tensor.IsSparse && !isBorder)
                {
                    throw Wrong($"a range ends inside tensor '{tensor.Name}', at its byte {at + count - tensor.Start}: it may do so after "
                        + $"a multiple of {TensorDigest.PieceBytes} bytes only");
                }

                yield return new Piece(range, taken, part.Memory, part.Offset + at - part.PayloadOffset, count);
                taken += count;
            }
        }
    }

    private async Task WaitAsync(CancellationToken cancellation)
    {
        try
        {
            await peers.WaitForEventAsync(readyEvent, cancellation).ConfigureAwait(false);
        }
        catch (Native.CudaException e)
        {
            throw new UpdateFailedException(UpdateFailure.Source, $"the event that says when the memory is written: {e.Message}");
        }
    }

    private void Read(Piece[] pieces)
    {
        try
        {
            Piece[] whole = [.. pieces.Where(piece => !piece.Range.Tensor.IsSparse)];
            long started = Stopwatch.GetTimestamp();
            ReadOnlySpan<byte> digests = peers.Apply(
                [.. whole.Select(piece => piece.Range.OnDevice(piece.Memory, piece.Offset, piece.First, piece.Bytes))]);
            long ticks = Stopwatch.GetTimestamp() - started;
            foreach (Piece piece in whole)
            {
                int length = TensorDigest.Pieces(piece.Bytes) * TensorDigest.Length;
                piece.Range.TakeOnDevice(digests[..length], piece.Bytes, ticks);
                digests = digests[length..];
                ticks = 0; // all of it with the first
            }

            foreach (Piece piece in pieces.Where(piece => piece.Range.Tensor.IsSparse))
            {
                byte[] bytes = new byte[piece.Bytes];
                peers.Read(piece.Memory, piece.Offset, bytes);
                piece.Range.Take(bytes);
            }
        }
        catch (ObjectDisposedException)
        {
            throw new UpdateFailedException(UpdateFailure.Source, "the device memory was released before it was read");
        }
    }

    private static UpdateFailedException Wrong(string what) => new(UpdateFailure.Protocol, what);
}
