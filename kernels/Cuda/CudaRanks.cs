using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// One rank of a group of processes (NCCL) that receives what another broadcasts, bucket by bucket, into two buffers in turn: a bucket
/// travels while the one before is read. Every wait ends with its cancellation, which ends the group: after any failure it cannot be used
/// again.
/// </summary>
public sealed class CudaRanks : IDisposable
{
    /// <summary>Of ncclUniqueId.</summary>
    public const int IdBytes = 128;

    private static readonly TimeSpan s_joinWithin = TimeSpan.FromSeconds(60);

    // The cancellation of a wait ends it earlier.
    private static readonly TimeSpan s_queueWithin = TimeSpan.FromSeconds(60), s_receiveWithin = TimeSpan.FromDays(1);

    private readonly CudaDevice _device;
    private readonly NcclCommunicator _communicator;
    private readonly CudaStream _stream;
    private readonly DeviceBytes?[] _buffers = [null, null];
    private readonly long _joinedBytes;
    private readonly Lock _lock = new();
    private bool _receiving, _disposed;

    /// <summary>As <see cref="CudaPeers.Join"/>.</summary>
    internal CudaRanks(CudaDevice device, ReadOnlySpan<byte> id, int ranks, int rank, CancellationToken cancellation)
    {
        _device = device;
        long before = device.UsedBytes;
        _communicator = device.Connect(MemoryMarshal.Read<ncclUniqueId>(id), ranks, rank, s_joinWithin, cancellation);
        _stream = device.CreateStream();
        _joinedBytes = Math.Max(0, device.UsedBytes - before);
    }

    /// <summary>Whether it can be used: no failure has ended it, and it was not disposed.</summary>
    public bool IsOpen
    {
        get
        {
            lock (_lock)
                return !_disposed;
        }
    }

    /// <summary>
    /// Memory on the device: by how much all memory in use grew while the ranks joined, as the driver counts it, and the buffers.
    /// </summary>
    public long Bytes => IsOpen ? _joinedBytes + _buffers.Sum(buffer => buffer?.Bytes ?? 0) : 0;

    /// <summary>Receives buckets and passes on each, in order. Memory for the largest two is kept until this is disposed.</summary>
    /// <param name="buckets">Bytes of each; the root broadcasts exactly these.</param>
    /// <param name="root">The rank that sends.</param>
    /// <param name="read">Reads bucket i from the memory given; while it runs, the next bucket arrives elsewhere.</param>
    /// <param name="cancellation">Ends it.</param>
    /// <exception cref="CudaException">A rank died, or sent something else.</exception>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory for two buckets.</exception>
    public async Task ReceiveAsync(
        IReadOnlyList<long> buckets, int root, Func<int, DeviceBytes, Task> read, CancellationToken cancellation)
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            _receiving = true;
        }

        try
        {
            for (int turn = 0; turn < Math.Min(2, buckets.Count); turn++)
                Reserve(turn, buckets.Where((_, i) => i % 2 == turn).Max());
            if (buckets.Count > 0)
                Queue(0);
            for (int i = 0; i < buckets.Count; i++)
            {
                await Task.Run(() => WaitForQueued(cancellation), CancellationToken.None).ConfigureAwait(false);
                if (i + 1 < buckets.Count)
                    Queue(i + 1);
                await read(i, _buffers[i % 2]!).ConfigureAwait(false);
            }
        }
        catch
        {
            Dispose(); // what is still queued would be written to buffers that are used for something else
            throw;
        }
        finally
        {
            lock (_lock)
                _receiving = false;
            if (!IsOpen)
                Free();
        }

        void Queue(int i)
        {
            _device.MakeCurrent();
            nuint to = _buffers[i % 2]!.Pointer;
            _communicator.Broadcast(to, to, buckets[i], root, _stream, s_queueWithin);
        }
    }

    /// <summary>Leaves the group; a transfer in progress ends first, for which its cancellation is needed.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            _disposed = true;
            if (_receiving)
                return; // which frees it
        }

        Free();
    }

    private void Free()
    {
        // First the communicator: its work in the stream may wait for a rank that has died.
        _communicator.Dispose();
        _stream.Dispose();
        for (int turn = 0; turn < _buffers.Length; turn++)
        {
            _buffers[turn]?.Dispose();
            _buffers[turn] = null;
        }
    }

    private void WaitForQueued(CancellationToken cancellation)
    {
        _device.MakeCurrent();
        _communicator.Synchronize(_stream, s_receiveWithin, cancellation);
    }

    private void Reserve(int turn, long bytes)
    {
        if (_buffers[turn] is { } kept && kept.Bytes >= bytes)
            return;
        _buffers[turn]?.Dispose();
        _buffers[turn] = null;
        _buffers[turn] = new DeviceBytes(_device.Allocate(bytes));
    }
}
