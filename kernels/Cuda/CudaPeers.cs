using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// Memory of other processes on the same GPU (CUDA IPC) and on others (NCCL), and how weights are written from device memory, without a
/// copy on the host. From any thread.
/// </summary>
public sealed class CudaPeers
{
    /// <summary>Of a handle of memory or of an event.</summary>
    public const int HandleBytes = 64;

    private readonly CudaBackend _backend;
    private volatile CudaRanks[] _ranks = []; // that were open when the last one joined

    internal CudaPeers(CudaBackend backend) => _backend = backend;

    /// <summary>16 bytes that identify the GPU, however processes number GPUs.</summary>
    public ReadOnlyMemory<byte> DeviceUuid => _backend.Device.Uuid;

    /// <summary>What was done on this backend so far.</summary>
    public CudaCounts Counts => _backend.Counts;

    /// <summary>Opens an allocation of another process.</summary>
    /// <param name="handle">cuIpcMemHandle.</param>
    /// <exception cref="CudaException">It was freed, its process has ended, or it is this process's own.</exception>
    public DeviceBytes Open(ReadOnlySpan<byte> handle) => new(_backend.Device.Open(MemoryMarshal.Read<CUipcMemHandle>(handle)));

    /// <summary>
    /// Waits until the device has reached an event that another process has recorded. Nothing is queued here meanwhile, so that a process
    /// that never gets there stops nothing but this.
    /// </summary>
    /// <param name="handle">cuIpcEventHandle.</param>
    /// <param name="cancellation">Ends the wait.</param>
    /// <exception cref="CudaException">The event was destroyed, its process has ended, or it is this process's own.</exception>
    public async Task WaitForEventAsync(ReadOnlyMemory<byte> handle, CancellationToken cancellation)
    {
        using CudaEvent @event = _backend.Device.Open(MemoryMarshal.Read<CUipcEventHandle>(handle.Span));
        while (true)
        {
            cancellation.ThrowIfCancellationRequested();
            _backend.Device.MakeCurrent(); // the thread may be another one after each delay
            if (@event.IsReached)
                return;
            await Task.Delay(1, cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>
    /// Stores parts of tensors of a checkpoint as <see cref="Backend.WriteWeight"/> does, and hashes them: in one launch and one pass over
    /// their bytes. Waits for the result.
    /// </summary>
    /// <returns>Of each part in order, and of each of its pieces in order, the digest: see <see cref="TensorDigest"/>.</returns>
    /// <exception cref="ArgumentException">A part lies outside its memory, or elements outside their weight.</exception>
    public byte[] Apply(IReadOnlyList<DeviceTensor> parts) => _backend.Apply(parts);

    /// <summary>Memory on the device that groups of ranks take.</summary>
    public long RanksBytes => _ranks.Sum(ranks => ranks.Bytes);

    /// <summary>Joins a group of processes that broadcast to each other's devices (NCCL). Blocks until all have joined.</summary>
    /// <param name="id">ncclUniqueId, <see cref="CudaRanks.IdBytes"/>, the same for all ranks and used once.</param>
    /// <param name="ranks">How many there are, each on a device of its own.</param>
    /// <param name="rank">Which of them this is.</param>
    /// <param name="cancellation">Ends the wait.</param>
    /// <exception cref="CudaException">NCCL is missing, or refused.</exception>
    /// <exception cref="TimeoutException">Not all have joined within a minute.</exception>
    public CudaRanks Join(ReadOnlySpan<byte> id, int ranks, int rank, CancellationToken cancellation)
    {
        CudaRanks joined = new(_backend.Device, id, ranks, rank, cancellation);
        lock (_backend.Device.Copies)
            _ranks = [.. _ranks.Where(group => group.IsOpen), joined];
        return joined;
    }

    /// <summary>Copies bytes to the host.</summary>
    public void Read(DeviceBytes memory, long offset, Span<byte> destination) => _backend.Read(memory, offset, destination);
}

/// <summary>Memory on the GPU that tensors can be read from. Closing it does not disturb an operation that reads it.</summary>
public sealed class DeviceBytes : IDisposable
{
    /// <summary>An allocation of another process.</summary>
    internal DeviceBytes(PeerBuffer buffer)
        : this(buffer, buffer.Bytes)
    {
    }

    /// <summary>Memory of this process.</summary>
    internal DeviceBytes(DeviceBuffer buffer)
        : this(buffer, buffer.Bytes)
    {
    }

    private DeviceBytes(CudaHandle buffer, long bytes) => (Handle, Bytes) = (buffer, bytes);

    /// <summary>Of the whole allocation.</summary>
    public long Bytes { get; }

    internal CudaHandle Handle { get; }

    internal nuint Pointer => (nuint)Handle.Value;

    public void Dispose() => Handle.Dispose();
}

/// <summary>A part of a tensor in device memory.</summary>
/// <param name="Memory">Where it is.</param>
/// <param name="Offset">Of its first byte there.</param>
/// <param name="Bytes">Whole elements; more than 0.</param>
/// <param name="Type">Of its elements.</param>
/// <param name="Stores">Where its elements go, ascending; none: they are hashed alone.</param>
public readonly record struct DeviceTensor(DeviceBytes Memory, long Offset, long Bytes, DType Type, IReadOnlyList<WeightRange> Stores);

/// <summary>Where a range of elements goes.</summary>
/// <param name="First">Of the part's elements.</param>
/// <param name="Count">How many.</param>
/// <param name="Weight">Where to.</param>
/// <param name="Element">Where the first goes: output * inputs + input.</param>
public readonly record struct WeightRange(long First, long Count, Weight Weight, long Element);

/// <summary>What a backend has done since it was created.</summary>
/// <param name="Launches">Of <see cref="CudaPeers.Apply"/>.</param>
/// <param name="Bytes">That they read of other processes' memory.</param>
/// <param name="Allocations">Of memory on the device, for any purpose.</param>
/// <param name="Graphs">That were captured.</param>
public readonly record struct CudaCounts(long Launches, long Bytes, long Allocations, long Graphs);
