using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>
/// The GPU that tensors of this process are on, for a trainer that sends them to another process: their memory is named for CUDA IPC, and
/// copied into buckets where it cannot be named. Leaves the current device of the calling thread as it is. Not thread-safe.
/// </summary>
/// <remarks>Uses the device's primary context, as PyTorch and TorchSharp do.</remarks>
public sealed unsafe class TensorMemory : IDisposable
{
    private readonly CudaContext _context;
    private readonly CudaEvent _ready;
    private bool _disposed;

    private TensorMemory(int ordinal)
    {
        Driver.cuDeviceGet(out int device, ordinal).ThrowIfFailed($"device {ordinal}");
        Driver.cuDeviceGetUuid_v2(out CUuuid uuid, device).ThrowIfFailed($"device {ordinal}");
        DeviceUuid = MemoryMarshal.AsBytes(new ReadOnlySpan<CUuuid>(ref uuid)).ToArray();
        Ordinal = ordinal;
        _context = new CudaContext(device);
        using Scope _ = new(this);
        _ready = CudaEvent.CreateShared(_context);
    }

    /// <summary>The number of the device in this process.</summary>
    public int Ordinal { get; }

    /// <summary>16 bytes that identify the device in every process.</summary>
    public ReadOnlyMemory<byte> DeviceUuid { get; }

    /// <summary>The device that has the memory at an address.</summary>
    /// <exception cref="CudaException">There is no driver, or the address is not that of device memory.</exception>
    public static TensorMemory Of(nint pointer) => new(OrdinalOf(pointer));

    /// <summary>A device by its number in this process, for tensors that are still to be allocated.</summary>
    /// <exception cref="CudaException">There is no driver, or no such device.</exception>
    public static TensorMemory OnDevice(int ordinal)
    {
        InitializeDriver();
        return new TensorMemory(ordinal);
    }

    private static int OrdinalOf(nint pointer)
    {
        InitializeDriver();
        Driver.cuDeviceGetCount(out int count).ThrowIfFailed();
        for (int ordinal = 0; ordinal < count; ordinal++)
        {
            // A context is not created for the question's sake: it takes memory, and a device without one has no tensors of this process.
            Driver.cuDeviceGet(out int device, ordinal).ThrowIfFailed($"device {ordinal}");
            Driver.cuDevicePrimaryCtxGetState(device, out uint _, out int active).ThrowIfFailed($"device {ordinal}");
            if (active == 0)
                continue;
            using CudaContext context = new(device);
            if (Has(context, ordinal, pointer))
                return ordinal;
        }

        throw new CudaException($"There is no device memory at address 0x{pointer:x} of this process.");
    }

    private static void InitializeDriver()
    {
        if (CudaLibraries.Missing(CudaLibraries.Driver) is { } missing)
            throw new CudaException(missing);
        Driver.cuInit(0).ThrowIfFailed();
    }

    /// <summary>Whether the memory at an address is this device's.</summary>
    public bool Has(nint pointer) => Has(_context, Ordinal, pointer);

    private static bool Has(CudaContext context, int ordinal, nint pointer)
    {
        using Scope _ = new(context);
        int found;
        CUresult result = Driver.cuPointerGetAttribute(&found, CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, (nuint)pointer);
        return result == CUresult.CUDA_SUCCESS && found == ordinal;
    }

    /// <summary>Whether another process can open the memory: not so where it is mapped to reserved addresses.</summary>
    public bool CanShare(nint pointer)
    {
        using Scope _ = new(this);
        return DeviceBuffer.CanShare((nuint)pointer);
    }

    /// <summary>The allocation that an address lies in.</summary>
    public (nint Start, long Bytes) AllocationOf(nint pointer)
    {
        using Scope _ = new(this);
        Driver.cuMemGetAddressRange_v2(out nuint start, out nuint bytes, (nuint)pointer).ThrowIfFailed("the memory of a tensor");
        return ((nint)start, (long)bytes);
    }

    /// <summary>
    /// cuIpcMemHandle of an allocation, 64 bytes. The memory must stay allocated while another process may open it.
    /// </summary>
    public byte[] HandleOf(nint allocation)
    {
        using Scope _ = new(this);
        Driver.cuIpcGetMemHandle(out CUipcMemHandle handle, (nuint)allocation).ThrowIfFailed("the memory of a tensor");
        return MemoryMarshal.AsBytes(new ReadOnlySpan<CUipcMemHandle>(ref handle)).ToArray();
    }

    /// <summary>
    /// Marks the end of the work that a stream has queued so far, and returns cuIpcEventHandle, 64 bytes, of that point.
    /// </summary>
    /// <param name="stream">
    /// A CUstream or cudaStream_t; 0: the legacy default stream, which waits for all others but non-blocking ones.
    /// </param>
    public byte[] RecordReady(nint stream)
    {
        using Scope _ = new(this);
        Driver.cuEventRecord(_ready.Value, stream).ThrowIfFailed();
        CUipcEventHandle handle = _ready.Share();
        return MemoryMarshal.AsBytes(new ReadOnlySpan<CUipcEventHandle>(ref handle)).ToArray();
    }

    /// <summary>Waits for all work that a stream has queued.</summary>
    public void Synchronize(nint stream)
    {
        using Scope _ = new(this);
        Driver.cuStreamSynchronize(stream).ThrowIfFailed();
    }

    /// <summary>Allocates memory on the device that other processes can open.</summary>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory.</exception>
    public DeviceBucket Allocate(long bytes)
    {
        using Scope _ = new(this);
        return new DeviceBucket(this, new DeviceBuffer(_context, bytes));
    }

    /// <summary>Joins a group of processes, to broadcast to their devices. Blocks until all have joined.</summary>
    /// <param name="id">Of <see cref="TensorRanks.NewId"/>, the same for all ranks.</param>
    /// <param name="ranks">How many there are, each on a device of its own.</param>
    /// <param name="rank">Which of them this is.</param>
    /// <param name="within">From now.</param>
    /// <param name="cancellation">Ends the wait.</param>
    /// <exception cref="CudaException">NCCL is missing, or refused.</exception>
    /// <exception cref="TimeoutException">Not all have joined in time.</exception>
    public TensorRanks Join(ReadOnlySpan<byte> id, int ranks, int rank, TimeSpan within, CancellationToken cancellation)
    {
        using Scope _ = new(this);
        return new TensorRanks(this, new NcclCommunicator(
            _context, MemoryMarshal.Read<ncclUniqueId>(id), ranks, rank, within, cancellation), new CudaStream(_context));
    }

    internal CudaEvent CreateEvent() => new(_context);

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        using (new Scope(this))
            _ready.Dispose();
        _context.Dispose();
    }

    /// <summary>Makes the context current on this thread, and the one from before when it is disposed.</summary>
    internal readonly struct Scope : IDisposable
    {
        private readonly nint _before;

        public Scope(TensorMemory memory)
            : this(memory._context)
        {
        }

        public Scope(CudaContext context)
        {
            ObjectDisposedException.ThrowIf(context.IsClosed, context);
            Driver.cuCtxGetCurrent(out _before).ThrowIfFailed();
            context.MakeCurrent();
        }

        public void Dispose() => Driver.cuCtxSetCurrent(_before).ThrowIfFailed();
    }
}

/// <summary>Memory on the device into which tensors are packed.</summary>
public sealed class DeviceBucket : IDisposable
{
    private readonly TensorMemory _memory;
    private readonly DeviceBuffer _buffer;

    internal DeviceBucket(TensorMemory memory, DeviceBuffer buffer) => (_memory, _buffer) = (memory, buffer);

    public long Bytes => _buffer.Bytes;

    public nint Pointer => (nint)_buffer.Pointer;

    /// <summary>Copies bytes of the host into the bucket; done when this returns.</summary>
    public unsafe void Upload(long offset, ReadOnlySpan<byte> bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(bytes.Length, Bytes - offset);
        using TensorMemory.Scope _ = new(_memory);
        fixed (byte* from = bytes)
            Driver.cuMemcpyHtoDAsync_v2(_buffer.Pointer + (nuint)offset, from, (nuint)bytes.Length, 0).ThrowIfFailed(bytes.Length);
        Driver.cuStreamSynchronize(0).ThrowIfFailed();
    }

    /// <summary>Queues a copy into the bucket.</summary>
    /// <param name="offset">In the bucket.</param>
    /// <param name="source">Address on the device.</param>
    /// <param name="bytes">How many.</param>
    /// <param name="stream">As in <see cref="TensorMemory.RecordReady"/>.</param>
    public void CopyFrom(long offset, nint source, long bytes, nint stream)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(bytes, Bytes - offset);
        using TensorMemory.Scope _ = new(_memory);
        Driver.cuMemcpyDtoDAsync_v2(_buffer.Pointer + (nuint)offset, (nuint)source, (nuint)bytes, stream).ThrowIfFailed(bytes);
    }

    public void Dispose()
    {
        using TensorMemory.Scope _ = new(_memory);
        _buffer.Dispose();
    }
}
