using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>One rank of a group of processes that broadcasts tensors to the devices of the others. Not thread-safe.</summary>
public sealed class TensorRanks : IDisposable
{
    private static readonly TimeSpan s_queueWithin = TimeSpan.FromSeconds(60), s_doneWithin = TimeSpan.FromDays(1);

    private readonly TensorMemory _memory;
    private readonly NcclCommunicator _communicator;
    private readonly CudaStream _stream;

    internal TensorRanks(TensorMemory memory, NcclCommunicator communicator, CudaStream stream)
        => (_memory, _communicator, _stream) = (memory, communicator, stream);

    /// <summary>Why tensors cannot be broadcast from this process, in a sentence; null where they can.</summary>
    public static string? WhyNone => CudaLibraries.Missing(CudaLibraries.Nccl);

    /// <summary>ncclUniqueId of a new group, 128 bytes. This process has to run until all ranks have joined.</summary>
    /// <exception cref="CudaException">NCCL is missing.</exception>
    public static byte[] NewId()
    {
        ncclUniqueId id = NcclCommunicator.NewId();
        return MemoryMarshal.AsBytes(new ReadOnlySpan<ncclUniqueId>(ref id)).ToArray();
    }

    /// <summary>Queues a broadcast of a bucket's first bytes from this rank, after the work that a stream has queued so far.</summary>
    /// <param name="bucket">Must not change until <see cref="Wait"/> has returned.</param>
    /// <param name="bytes">How many; the other ranks receive as many.</param>
    /// <param name="rank">This rank.</param>
    /// <param name="after">As in <see cref="TensorMemory.RecordReady"/>.</param>
    public void Broadcast(DeviceBucket bucket, long bytes, int rank, nint after)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(bytes, bucket.Bytes);
        using TensorMemory.Scope _ = new(_memory);
        using (CudaEvent filled = _memory.CreateEvent())
        {
            Driver.cuEventRecord(filled.Value, after).ThrowIfFailed();
            Driver.cuStreamWaitEvent(_stream.Value, filled.Value, 0).ThrowIfFailed();
        }

        nuint pointer = (nuint)bucket.Pointer;
        _communicator.Broadcast(pointer, pointer, bytes, rank, _stream, s_queueWithin);
    }

    /// <summary>Waits until everything queued has been sent. After a failure the group cannot be used again.</summary>
    /// <exception cref="CudaException">A rank died, or expected something else.</exception>
    public void Wait(CancellationToken cancellation)
    {
        using TensorMemory.Scope _ = new(_memory);
        _communicator.Synchronize(_stream, s_doneWithin, cancellation);
    }

    public void Dispose()
    {
        using TensorMemory.Scope _ = new(_memory);
        _communicator.Dispose(); // its work in the stream may wait for a rank that has died
        _stream.Dispose();
    }
}
