using System.Buffers;
using System.Diagnostics;
using System.IO.Hashing;
using Microsoft.Win32.SafeHandles;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// One transaction: new weights land in the spare set while the engine goes on with the set in service; a commit exchanges the two
/// between two steps; anything else leaves the engine as it was.
/// <code>
///   BeginUpdate(manifest) -> [ receiving ] -- all bytes, digests as expected --> Commit: the loop swaps the sets
///                                  |
///                                  +-- Dispose, failure ------------------------> the spare set is free again
/// </code>
/// A stream is written by one thread in ascending order (<see cref="Write"/>); a file is read by all cores (<see cref="ReadFrom"/>).
/// </summary>
public sealed class WeightUpdate : IDisposable
{
    // Fits a core's L2 beside what it is packed into.
    private const int FileChunk = 512 * 1024;

    private readonly RolloutEngine _engine;
    private readonly WeightSet _staging;
    private readonly Incoming[] _incoming;
    private readonly long _started = Stopwatch.GetTimestamp();
    private int _current;
    private bool _failed;
    private bool _ended;

    internal WeightUpdate(RolloutEngine engine, UpdateManifest manifest, LoadPlan plan, IBackend backend, WeightSet staging)
    {
        _engine = engine;
        _staging = staging;
        Manifest = manifest;
        _incoming = [.. manifest.Tensors.Select(tensor => new Incoming(tensor, plan, backend, staging))];
    }

    public UpdateManifest Manifest { get; }

    public long StagingBytes => _staging.Bytes;

    /// <summary>Payload bytes taken so far.</summary>
    public long ReceivedBytes { get; private set; }

    /// <summary>
    /// Takes payload bytes [<paramref name="payloadOffset"/>, + length). They must follow the last ones without a gap.
    /// </summary>
    /// <exception cref="UpdateFailedException">Out of order, or past the payload's end. The update cannot go on.</exception>
    public void Write(long payloadOffset, ReadOnlySpan<byte> bytes)
    {
        ThrowIfOver();
        if (payloadOffset != ReceivedBytes) throw Fail($"expected payload byte {ReceivedBytes} next, got {payloadOffset}");
        if (payloadOffset + bytes.Length > Manifest.PayloadBytes)
            throw Fail($"{payloadOffset + bytes.Length} bytes received of a payload of {Manifest.PayloadBytes}");
        ReceivedBytes += bytes.Length;
        while (!bytes.IsEmpty && _current < _incoming.Length)
        {
            Incoming tensor = _incoming[_current];
            long gap = tensor.Start + tensor.Taken - payloadOffset; // alignment before the tensor
            if (gap >= bytes.Length) return;
            bytes = bytes[(int)gap..];
            ReadOnlySpan<byte> own = bytes[..(int)Math.Min(bytes.Length, tensor.Bytes - tensor.Taken)];
            tensor.Take(own);
            bytes = bytes[own.Length..];
            payloadOffset += gap + own.Length;
            if (tensor.Taken == tensor.Bytes) _current++;
        }
    }

    /// <summary>
    /// Takes the whole payload from a file (of /dev/shm, say), tensors in parallel. Read, not mapped: a file that shrinks meanwhile is an
    /// error here and not a SIGBUS.
    /// </summary>
    public void ReadFrom(SafeFileHandle file, long fileOffset, CancellationToken cancellation = default)
    {
        ThrowIfOver();
        if (ReceivedBytes > 0) throw Fail("payload bytes had already come another way");
        try
        {
            ParallelOptions options = new() { CancellationToken = cancellation, MaxDegreeOfParallelism = Environment.ProcessorCount };
            // Largest first, so that the cores finish together.
            Parallel.ForEach(_incoming.OrderByDescending(tensor => tensor.Bytes), options, tensor =>
            {
                byte[] buffer = ArrayPool<byte>.Shared.Rent((int)Math.Min(FileChunk, Math.Max(1, tensor.Bytes)));
                try
                {
                    while (tensor.Taken < tensor.Bytes)
                    {
                        cancellation.ThrowIfCancellationRequested();
                        int wanted = (int)Math.Min(FileChunk, tensor.Bytes - tensor.Taken);
                        int read = RandomAccess.Read(file, buffer.AsSpan(0, wanted), fileOffset + tensor.Start + tensor.Taken);
                        if (read == 0) throw new UpdateFailedException($"the file ends inside tensor '{tensor.Name}'");
                        tensor.Take(buffer.AsSpan(0, read));
                    }
                }
                finally
                {
                    ArrayPool<byte>.Shared.Return(buffer);
                }
            });
        }
        catch (AggregateException e) when (e.InnerExceptions[0] is UpdateFailedException or IOException)
        {
            throw Fail(e.InnerExceptions[0].Message);
        }
        catch
        {
            _failed = true;
            throw;
        }

        _current = _incoming.Length;
        ReceivedBytes = Manifest.PayloadBytes;
    }

    /// <summary>Puts the new weights in service between two steps and applies the manifest's policy to the samples in flight.</summary>
    /// <param name="expectedDigest">The combined digest the sender computed (see weights.proto); empty: not compared.</param>
    /// <param name="cancellation">
    /// Takes the commit back if its moment has not come, as while draining. The answer is true either way: the task ends with the result
    /// when the weights were swapped, and with an exception when they never will be.
    /// </param>
    /// <exception cref="UpdateFailedException">
    /// Bytes are missing, the digest differs, or the commit was taken back. The old weights stay.
    /// </exception>
    public async Task<CommitResult> CommitAsync(ReadOnlyMemory<byte> expectedDigest, CancellationToken cancellation = default)
    {
        ThrowIfOver();
        Incoming? missing = _incoming.FirstOrDefault(tensor => tensor.Taken < tensor.Bytes);
        if (missing is not null) throw Fail($"only {missing.Taken} of {missing.Bytes} bytes of tensor '{missing.Name}' have come");

        Dictionary<string, byte[]> digests = _incoming.ToDictionary(tensor => tensor.Name, tensor => tensor.Digest());
        CheckTied(digests);
        byte[] digest = Combine(_incoming.Select(tensor => digests[tensor.Name]));
        if (!expectedDigest.IsEmpty && !expectedDigest.Span.SequenceEqual(digest))
        {
            throw Fail($"the digest of what arrived is {Convert.ToHexStringLower(digest)}, the sender's is "
                + Convert.ToHexStringLower(expectedDigest.Span));
        }

        double transfer = Stopwatch.GetElapsedTime(_started).TotalSeconds;
        long committing = Stopwatch.GetTimestamp();
        double stall = await _engine.SwapAsync(new WeightSwap(this, _staging, digests), cancellation).ConfigureAwait(false);
        _ended = true;
        return new CommitResult(Manifest.NewVersion, digest, transfer, Stopwatch.GetElapsedTime(committing).TotalSeconds, stall);
    }

    /// <summary>The combined digest of weights.proto: XxHash128 over the tensors' digests in manifest order.</summary>
    public static byte[] Combine(IEnumerable<byte[]> digests)
    {
        XxHash128 hash = new();
        foreach (byte[] digest in digests) hash.Append(digest);
        return hash.GetCurrentHash();
    }

    /// <summary>Gives the seat and the spare set back. After a commit this changes nothing.</summary>
    public void Dispose()
    {
        if (_ended) return;
        _ended = true;
        _engine.EndUpdate(this);
    }

    /// <summary>A head sent beside the embedding it is tied to has no place of its own: it must be the same bytes.</summary>
    private void CheckTied(Dictionary<string, byte[]> digests)
    {
        foreach (Incoming tensor in _incoming)
        {
            if (!tensor.Entry.Tied) continue;
            Incoming original = _incoming.First(other => !other.Entry.Tied && other.Entry.Slot == tensor.Entry.Slot);
            if (digests[original.Name].AsSpan().SequenceEqual(digests[tensor.Name])) continue;
            throw Fail($"the model ties '{tensor.Name}' to '{original.Name}', but their bytes differ");
        }
    }

    private UpdateFailedException Fail(string reason)
    {
        _failed = true;
        return new UpdateFailedException(reason);
    }

    private void ThrowIfOver()
    {
        if (_ended) throw new UpdateFailedException("the update is over");
        if (_failed) throw new UpdateFailedException("the update has failed and cannot go on");
    }

    /// <summary>One tensor on its way from the payload into its place in the staging set.</summary>
    private sealed class Incoming(ManifestTensor tensor, LoadPlan plan, IBackend backend, WeightSet staging)
    {
        private readonly int _elementSize = tensor.Type.Size();
        private readonly XxHash128 _hash = new();
        private readonly byte[] _split = new byte[4]; // an element whose bytes came in two pieces
        private int _splitLength;

        public string Name => tensor.Name;

        public long Start => tensor.Offset;

        public long Bytes { get; } = tensor.Bytes;

        public long Taken { get; private set; }

        public LoadEntry Entry { get; } = plan.TryFind(tensor.Name, out LoadEntry? entry)
            ? entry
            : throw new InvalidOperationException($"'{tensor.Name}' passed the preflight without being in the model");

        public byte[] Digest() => _hash.GetCurrentHash();

        public void Take(ReadOnlySpan<byte> bytes)
        {
            _hash.Append(bytes);
            long element = Taken / _elementSize;
            Taken += bytes.Length;
            if (Entry.Tied) return;

            if (_splitLength > 0)
            {
                int rest = Math.Min(_elementSize - _splitLength, bytes.Length);
                bytes[..rest].CopyTo(_split.AsSpan(_splitLength));
                _splitLength += rest;
                bytes = bytes[rest..];
                if (_splitLength < _elementSize) return;
                Store(element++, _split.AsSpan(0, _elementSize));
                _splitLength = 0;
            }

            int whole = bytes.Length / _elementSize * _elementSize;
            if (whole > 0) Store(element, bytes[..whole]);
            bytes[whole..].CopyTo(_split);
            _splitLength = bytes.Length - whole;
        }

        private void Store(long element, ReadOnlySpan<byte> bytes)
            => backend.WriteWeight(staging[Entry.Slot], Entry.FirstElement + element, bytes, tensor.Type);
    }
}
