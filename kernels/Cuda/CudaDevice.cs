using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>One GPU: its context, the stream that steps run on, and the one for everything concurrent with them.</summary>
internal sealed unsafe class CudaDevice : IDisposable
{
    [ThreadStatic]
    private static CudaDevice? s_current;

    private readonly CudaContext _context;
    private readonly Lock _copies = new();
    private long _allocations;

    /// <exception cref="CudaException">
    /// There is no such device, or a library is missing: the message says what was looked for and where.
    /// </exception>
    public CudaDevice(int ordinal)
    {
        if (Find(out int count) is { } none)
            throw new CudaException(none);
        if (ordinal >= count)
            throw new CudaException($"There is no cuda:{ordinal}: this machine has {count} CUDA {(count == 1 ? "device" : "devices")}.");
        Driver.cuDeviceGet(out int device, ordinal).ThrowIfFailed($"device {ordinal}");
        byte* name = stackalloc byte[256];
        Driver.cuDeviceGetName(name, 256, device).ThrowIfFailed($"device {ordinal}");
        Name = Marshal.PtrToStringUTF8((nint)name) ?? "";
        Driver.cuDeviceGetUuid_v2(out CUuuid uuid, device).ThrowIfFailed($"device {ordinal}");
        Uuid = MemoryMarshal.AsBytes(new ReadOnlySpan<CUuuid>(ref uuid)).ToArray();
        Ordinal = ordinal;
        int major = Attribute(CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
        Architecture = $"sm_{major}{Attribute(CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)}";
        Multiprocessors = Attribute(CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        L2Bytes = Attribute(CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
        Driver.cuDriverGetVersion(out int version).ThrowIfFailed();
        StartsKernelsEarly = major >= 9 && version >= 12030;
        if (Attribute(CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) == 0)
        {
            throw new CudaException($"cuda:{ordinal} {Name} cannot map memory to reserved addresses (virtual memory management), "
                + "which weights, keys and values need.");
        }
        _context = new CudaContext(device);
        MakeCurrent();
        Stream = new CudaStream(_context, first: true); // a step waits for a part of an update at most, not for all that is queued
        Beside = new CudaStream(_context);

        int Attribute(CUdevice_attribute attribute)
        {
            Driver.cuDeviceGetAttribute(out int value, attribute, device).ThrowIfFailed($"{attribute}");
            return value;
        }
    }

    /// <summary>Devices that can be used; 0 where the libraries are missing.</summary>
    public static int Count => Find(out int count) is null ? count : 0;

    /// <summary>Why no device can be used, in one sentence; null where one can.</summary>
    public static string? WhyNone => Find(out _);

    public int Ordinal { get; }

    /// <summary>The product: "NVIDIA H200".</summary>
    public string Name { get; }

    /// <summary>16 bytes that identify the device, however processes number devices.</summary>
    public byte[] Uuid { get; }

    /// <summary>What code is compiled for: "sm_90".</summary>
    public string Architecture { get; }

    public int Multiprocessors { get; }

    /// <summary>Size of the cache that all multiprocessors share.</summary>
    public long L2Bytes { get; }

    /// <summary>
    /// Whether a kernel may be started while the previous one in its stream still runs, and itself waits for it (programmatic dependent
    /// launch): from compute capability 9.0 on, and in graphs from CUDA 12.3 on.
    /// </summary>
    public bool StartsKernelsEarly { get; }

    /// <summary>Steps run here, in order.</summary>
    public CudaStream Stream { get; }

    /// <summary>When set, records the time of every launch; no graphs are used then. For measurements.</summary>
    public CudaLaunchTimes? Times { get; set; }

    /// <summary>Weights are written and read here, while steps run.</summary>
    public CudaStream Beside { get; }

    /// <summary>Lock to hold while using <see cref="Beside"/>.</summary>
    public Lock Copies => _copies;

    public long FreeBytes
    {
        get
        {
            MakeCurrent();
            Driver.cuMemGetInfo_v2(out nuint free, out _).ThrowIfFailed();
            return (long)free;
        }
    }

    /// <summary>Bytes in use, by any process: the driver does not tell them apart.</summary>
    public long UsedBytes
    {
        get
        {
            MakeCurrent();
            Driver.cuMemGetInfo_v2(out nuint free, out nuint total).ThrowIfFailed();
            return (long)(total - free);
        }
    }

    /// <summary>
    /// Makes this device current on this thread, whatever another library has set on the thread since the last call. A device that is used
    /// again after its last user was disposed may have the same context as before; threads that had it current must set it again.
    /// </summary>
    public void MakeCurrent()
    {
        if (s_current == this && _context.IsCurrent)
            return;
        _context.MakeCurrent();
        s_current = this;
    }

    /// <summary>Allocations on the device so far.</summary>
    public long Allocations => Interlocked.Read(ref _allocations);

    public DeviceBuffer Allocate(long bytes)
    {
        MakeCurrent();
        DeviceBuffer buffer = new(_context, bytes);
        CountAllocation();
        return buffer;
    }

    /// <summary>For memory that is not from <see cref="Allocate"/>.</summary>
    public void CountAllocation() => Interlocked.Increment(ref _allocations);

    /// <inheritdoc cref="DeviceRange(CudaContext, int, long)"/>
    public DeviceRange Reserve(long bytes)
    {
        MakeCurrent();
        return new DeviceRange(_context, Ordinal, bytes);
    }

    public PinnedBuffer AllocatePinned(long bytes)
    {
        MakeCurrent();
        return new PinnedBuffer(_context, bytes);
    }

    /// <inheritdoc cref="PeerBuffer(CudaContext, CUipcMemHandle)"/>
    public PeerBuffer Open(CUipcMemHandle handle)
    {
        MakeCurrent();
        return new PeerBuffer(_context, handle);
    }

    /// <inheritdoc cref="CudaEvent(CudaContext, CUipcEventHandle)"/>
    public CudaEvent Open(CUipcEventHandle handle)
    {
        MakeCurrent();
        return new CudaEvent(_context, handle);
    }

    /// <inheritdoc cref="CudaEvent.CreateShared(CudaContext)"/>
    public CudaEvent CreateSharedEvent()
    {
        MakeCurrent();
        return CudaEvent.CreateShared(_context);
    }

    /// <inheritdoc cref="NcclCommunicator(CudaContext, ncclUniqueId, int, int, TimeSpan, CancellationToken)"/>
    public NcclCommunicator Connect(ncclUniqueId id, int ranks, int rank, TimeSpan deadline, CancellationToken cancellation = default)
    {
        MakeCurrent();
        return new NcclCommunicator(_context, id, ranks, rank, deadline, cancellation);
    }

    /// <summary>A stream of its own, for work that no step waits for.</summary>
    public CudaStream CreateStream()
    {
        MakeCurrent();
        return new CudaStream(_context);
    }

    /// <inheritdoc cref="CudaEvent(CudaContext, bool)"/>
    public CudaEvent CreateEvent(bool timed = false)
    {
        MakeCurrent();
        return new CudaEvent(_context, timed);
    }

    public CudaModule Load(byte[] cubin, string name)
    {
        MakeCurrent();
        return new CudaModule(_context, cubin, name);
    }

    /// <summary>Ends what <see cref="CudaGraph.BeginCapture"/> began on <see cref="Stream"/>.</summary>
    public CudaGraph EndCapture() => new(_context, Stream);

    public DeviceBuffer AllocateZeroed(long bytes)
    {
        DeviceBuffer buffer = Allocate(bytes);
        Zero(buffer.Pointer, Math.Max(1, bytes));
        return buffer;
    }

    /// <summary>Zeroes bytes that nothing queued uses.</summary>
    public void Zero(nuint pointer, long bytes)
    {
        if (bytes == 0)
            return;
        lock (_copies)
        {
            Driver.cuMemsetD8Async(pointer, 0, (nuint)bytes, Beside.Value).ThrowIfFailed(bytes);
            Beside.Synchronize();
        }
    }

    /// <summary>Copies bytes to the device, after all work queued before; done when this returns.</summary>
    public void Upload(nuint destination, ReadOnlySpan<byte> source)
    {
        MakeCurrent();
        fixed (byte* bytes = source)
            Driver.cuMemcpyHtoDAsync_v2(destination, bytes, (nuint)source.Length, Stream.Value).ThrowIfFailed(source.Length);
        Stream.Synchronize();
    }

    /// <summary>Copies bytes from the device, after all work queued before.</summary>
    public void Download(nuint source, Span<byte> destination) => Download(source, destination, Stream);

    /// <inheritdoc cref="Download(nuint, Span{byte})"/>
    public void Download(nuint source, Span<byte> destination, CudaStream on)
    {
        MakeCurrent();
        fixed (byte* bytes = destination)
            Driver.cuMemcpyDtoHAsync_v2(bytes, source, (nuint)destination.Length, on.Value).ThrowIfFailed(destination.Length);
        on.Synchronize();
    }

    /// <summary>Copies bytes of the device, as many as the buffer has, after all work queued before; done when this returns.</summary>
    public void CopyOut(nuint source, PinnedBuffer destination)
    {
        MakeCurrent();
        Driver.cuMemcpyDtoHAsync_v2(destination.Pointer, source, (nuint)destination.Bytes, Stream.Value).ThrowIfFailed(destination.Bytes);
        Stream.Synchronize();
    }

    /// <summary>Copies all bytes of the buffer to the device, after all work queued before; done when this returns.</summary>
    public void CopyIn(PinnedBuffer source, nuint destination)
    {
        MakeCurrent();
        Driver.cuMemcpyHtoDAsync_v2(destination, source.Pointer, (nuint)source.Bytes, Stream.Value).ThrowIfFailed(source.Bytes);
        Stream.Synchronize();
    }

    public void Dispose()
    {
        Stream.Dispose();
        Beside.Dispose();
        _context.Dispose();
        if (s_current == this)
            s_current = null;
    }

    private static string? Find(out int count)
    {
        count = 0;
        if (CudaLibraries.Missing(CudaLibraries.Driver, CudaLibraries.Nvrtc, CudaLibraries.CublasLt) is { } missing)
            return missing;
        try
        {
            Driver.cuInit(0).ThrowIfFailed();
            Driver.cuDeviceGetCount(out count).ThrowIfFailed();
        }
        catch (CudaException e)
        {
            return e.Message;
        }

        return count == 0 ? "This machine has no CUDA device." : null;
    }
}
