using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>A device's primary context: all libraries and frameworks in this process share it.</summary>
internal sealed class CudaContext : SafeHandle
{
    private readonly int _device;

    public CudaContext(int device)
        : base(0, ownsHandle: true)
    {
        _device = device;
        Driver.cuDevicePrimaryCtxRetain(out nint context, device).ThrowIfFailed($"device {device}");
        SetHandle(context);
    }

    public override bool IsInvalid => handle == 0;

    /// <summary>
    /// Whether the context is current on this thread. The driver knows it without asking the device: it costs nanoseconds.
    /// </summary>
    public bool IsCurrent => Driver.cuCtxGetCurrent(out nint current) == CUresult.CUDA_SUCCESS && current == handle;

    /// <summary>Makes the context current on this thread.</summary>
    public void MakeCurrent() => Driver.cuCtxSetCurrent(handle).ThrowIfFailed();

    protected override bool ReleaseHandle() => Driver.cuDevicePrimaryCtxRelease_v2(_device) == CUresult.CUDA_SUCCESS;
}

/// <summary>
/// An object that belongs to a context and keeps it alive. Released on any thread, the finalizer's included; the thread's current context
/// stays unchanged.
/// </summary>
internal abstract class CudaHandle : SafeHandle
{
    private readonly CudaContext _context;

    protected CudaHandle(CudaContext context)
        : base(0, ownsHandle: true)
    {
        _context = context;
        context.MakeCurrent();
    }

    public override bool IsInvalid => handle == 0;

    public nint Value => !IsClosed ? handle : throw new ObjectDisposedException(GetType().Name);

    protected abstract CUresult Destroy(nint value);

    /// <summary>From here on this handle owns the value, and keeps its context alive until it is released.</summary>
    protected void Own(nint value)
    {
        bool counted = false;
        _context.DangerousAddRef(ref counted);
        SetHandle(value);
    }

    protected sealed override bool ReleaseHandle()
    {
        bool released = false;
        if (Driver.cuCtxPushCurrent_v2(_context.DangerousGetHandle()) == CUresult.CUDA_SUCCESS)
        {
            released = Destroy(handle) == CUresult.CUDA_SUCCESS;
            released &= Driver.cuCtxPopCurrent_v2(out _) == CUresult.CUDA_SUCCESS;
        }

        _context.DangerousRelease();
        return released;
    }
}

/// <summary>Bytes on the device.</summary>
internal sealed class DeviceBuffer : CudaHandle
{
    public DeviceBuffer(CudaContext context, long bytes)
        : base(context)
    {
        Bytes = bytes;
        Driver.cuMemAlloc_v2(out nuint pointer, (nuint)Math.Max(1, bytes)).ThrowIfFailed($"{bytes} bytes");
        Own((nint)pointer);
    }

    public long Bytes { get; }

    public nuint Pointer => (nuint)Value;

    /// <summary>Whether <see cref="Share"/> can share the memory at an address: not so where it is mapped to reserved addresses.</summary>
    public static unsafe bool CanShare(nuint pointer)
    {
        int can;
        Driver.cuPointerGetAttribute(&can, CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, pointer).ThrowIfFailed();
        return can != 0;
    }

    /// <summary>A handle by which another process of this machine can open these bytes, as long as this one keeps them.</summary>
    public CUipcMemHandle Share()
    {
        Driver.cuIpcGetMemHandle(out CUipcMemHandle handle, Pointer).ThrowIfFailed($"{Bytes} bytes");
        return handle;
    }

    protected override CUresult Destroy(nint value) => Driver.cuMemFree_v2((nuint)value);
}

/// <summary>Bytes on the device that another process of this machine has allocated.</summary>
internal sealed class PeerBuffer : CudaHandle
{
    /// <exception cref="CudaException">It was freed, belongs to this process, or is on a device that this one cannot read.</exception>
    public PeerBuffer(CudaContext context, CUipcMemHandle handle)
        : base(context)
    {
        Driver.cuIpcOpenMemHandle_v2(out nuint pointer, handle, Driver.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
            .ThrowIfFailed("memory of another process");
        Own((nint)pointer);
        CUresult result = Driver.cuMemGetAddressRange_v2(out nuint start, out nuint bytes, pointer);
        if (result != CUresult.CUDA_SUCCESS || start != pointer)
        {
            Dispose();
            result.ThrowIfFailed("memory of another process", nameof(Driver.cuMemGetAddressRange_v2));
            throw new CudaException("The driver opened memory of another process inside its allocation.");
        }

        Bytes = (long)bytes;
    }

    /// <summary>Of the whole allocation.</summary>
    public long Bytes { get; }

    public nuint Pointer => (nuint)Value;

    protected override CUresult Destroy(nint value) => Driver.cuIpcCloseMemHandle((nuint)value);
}

/// <summary>Pinned bytes on the host, which the device can copy directly.</summary>
internal sealed unsafe class PinnedBuffer : CudaHandle
{
    public PinnedBuffer(CudaContext context, long bytes)
        : base(context)
    {
        Bytes = bytes;
        Driver.cuMemAllocHost_v2(out void* pointer, (nuint)Math.Max(1, bytes)).ThrowIfFailed($"{bytes} bytes");
        Own((nint)pointer);
    }

    public long Bytes { get; }

    public byte* Pointer => (byte*)Value;

    protected override CUresult Destroy(nint value) => Driver.cuMemFreeHost((void*)value);
}

/// <summary>A stream. It does not wait for the legacy default stream, which frameworks use.</summary>
internal sealed class CudaStream : CudaHandle
{
    /// <param name="context">Of the device.</param>
    /// <param name="first">Whether its kernels go before those of other streams that have begun and wait for multiprocessors.</param>
    public CudaStream(CudaContext context, bool first = false)
        : base(context)
    {
        Driver.cuCtxGetStreamPriorityRange(out int least, out int greatest).ThrowIfFailed();
        Driver.cuStreamCreateWithPriority(out nint stream, Driver.CU_STREAM_NON_BLOCKING, first ? greatest : least).ThrowIfFailed();
        Own(stream);
    }

    /// <summary>A smaller number goes first.</summary>
    public int Priority
    {
        get
        {
            Driver.cuStreamGetPriority(Value, out int priority).ThrowIfFailed();
            return priority;
        }
    }

    public void Synchronize() => Driver.cuStreamSynchronize(Value).ThrowIfFailed();

    protected override CUresult Destroy(nint value) => Driver.cuStreamDestroy_v2(value);
}

/// <summary>A point in a stream's work.</summary>
internal sealed class CudaEvent : CudaHandle
{
    /// <param name="context">Of the streams whose work it marks.</param>
    /// <param name="timed">Whether <see cref="SecondsSince"/> will be used.</param>
    public CudaEvent(CudaContext context, bool timed = false)
        : this(context, timed ? 0 : Driver.CU_EVENT_DISABLE_TIMING)
    {
    }

    /// <summary>Opens an event of another process.</summary>
    /// <exception cref="CudaException">It was destroyed, or belongs to this process.</exception>
    public CudaEvent(CudaContext context, CUipcEventHandle handle)
        : base(context)
    {
        Driver.cuIpcOpenEventHandle(out nint @event, handle).ThrowIfFailed("event of another process");
        Own(@event);
    }

    private CudaEvent(CudaContext context, uint flags)
        : base(context)
    {
        Driver.cuEventCreate(out nint @event, flags).ThrowIfFailed();
        Own(@event);
    }

    /// <summary>One that other processes of this machine can wait for: see <see cref="Share"/>.</summary>
    public static CudaEvent CreateShared(CudaContext context) =>
        new(context, Driver.CU_EVENT_DISABLE_TIMING | Driver.CU_EVENT_INTERPROCESS);

    /// <summary>A handle by which another process of this machine can open it, as long as this one keeps it.</summary>
    public CUipcEventHandle Share()
    {
        Driver.cuIpcGetEventHandle(out CUipcEventHandle handle, Value).ThrowIfFailed();
        return handle;
    }

    /// <summary>The device's time from an earlier event to this one; both must have been reached.</summary>
    public double SecondsSince(CudaEvent start)
    {
        Driver.cuEventElapsedTime(out float milliseconds, start.Value, Value).ThrowIfFailed();
        return milliseconds / 1000.0;
    }

    public void Record(CudaStream stream) => Driver.cuEventRecord(Value, stream.Value).ThrowIfFailed();

    public void Synchronize() => Driver.cuEventSynchronize(Value).ThrowIfFailed();

    /// <summary>Whether the stream has reached this point.</summary>
    public bool IsReached
    {
        get
        {
            CUresult result = Driver.cuEventQuery(Value);
            if (result != CUresult.CUDA_ERROR_NOT_READY)
                result.ThrowIfFailed(call: nameof(Driver.cuEventQuery));
            return result == CUresult.CUDA_SUCCESS;
        }
    }

    protected override CUresult Destroy(nint value) => Driver.cuEventDestroy_v2(value);
}

/// <summary>Compiled kernels.</summary>
internal sealed unsafe class CudaModule : CudaHandle
{
    public CudaModule(CudaContext context, ReadOnlySpan<byte> cubin, string name)
        : base(context)
    {
        fixed (byte* image = cubin)
        {
            Driver.cuModuleLoadData(out nint module, image).ThrowIfFailed(name);
            Own(module);
        }
    }

    /// <summary>A kernel of the module; valid while the module is.</summary>
    public nint Function(string name)
    {
        Driver.cuModuleGetFunction(out nint function, Value, name).ThrowIfFailed(name);
        return function;
    }

    protected override CUresult Destroy(nint value) => Driver.cuModuleUnload(value);
}

/// <summary>Work captured once, to be launched as one.</summary>
internal sealed class CudaGraph : CudaHandle
{
    /// <param name="context">Of the stream.</param>
    /// <param name="stream">Is capturing; this ends the capture.</param>
    public CudaGraph(CudaContext context, CudaStream stream)
        : base(context)
    {
        Driver.cuStreamEndCapture(stream.Value, out nint graph).ThrowIfFailed();
        try
        {
            Driver.cuGraphInstantiateWithFlags(out nint executable, graph, flags: 0).ThrowIfFailed();
            Own(executable);
        }
        finally
        {
            _ = Driver.cuGraphDestroy(graph); // the executable does not need the graph, and a failure to instantiate is the one to report
        }
    }

    public static void BeginCapture(CudaStream stream) =>
        Driver.cuStreamBeginCapture_v2(stream.Value, CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).ThrowIfFailed();

    /// <summary>Ends a capture and discards its work; also one that failed.</summary>
    public static void AbandonCapture(CudaStream stream)
    {
        if (Driver.cuStreamEndCapture(stream.Value, out nint graph) == CUresult.CUDA_SUCCESS)
            _ = Driver.cuGraphDestroy(graph); // a failure here cannot be handled
    }

    public void Launch(CudaStream stream) => Driver.cuGraphLaunch(Value, stream.Value).ThrowIfFailed();

    protected override CUresult Destroy(nint value) => Driver.cuGraphExecDestroy(value);
}
