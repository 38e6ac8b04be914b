using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>The driver API, with the names of its manual. All pointers to device memory are nuint, all handles nint.</summary>
internal static unsafe partial class Driver
{
    public const uint CU_STREAM_NON_BLOCKING = 1;
    public const uint CU_EVENT_DISABLE_TIMING = 2;
    public const uint CU_EVENT_INTERPROCESS = 4;
    public const uint CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1;

    static Driver() => CudaLibraries.ResolveFor(typeof(Driver).Assembly);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuInit(uint flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDriverGetVersion(out int version);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuGetErrorName(CUresult error, out byte* name);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuGetErrorString(CUresult error, out byte* text);

    // ---- Devices and contexts.

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDeviceGetCount(out int count);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDeviceGet(out int device, int ordinal);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDeviceGetName(byte* name, int bytes, int device);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDeviceGetUuid_v2(out CUuuid uuid, int device);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDeviceGetAttribute(out int value, CUdevice_attribute attribute, int device);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDevicePrimaryCtxGetState(int device, out uint flags, out int active);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDevicePrimaryCtxRetain(out nint context, int device);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuDevicePrimaryCtxRelease_v2(int device);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuCtxGetCurrent(out nint context);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuCtxSetCurrent(nint context);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuCtxPushCurrent_v2(nint context);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuCtxPopCurrent_v2(out nint context);

    // ---- Memory.

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemGetInfo_v2(out nuint free, out nuint total);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemAlloc_v2(out nuint pointer, nuint bytes);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemFree_v2(nuint pointer);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemGetAddressRange_v2(out nuint start, out nuint bytes, nuint pointer);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, nuint pointer);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemAllocHost_v2(out void* pointer, nuint bytes);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemFreeHost(void* pointer);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemcpyHtoDAsync_v2(nuint destination, void* source, nuint bytes, nint stream);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemcpyDtoHAsync_v2(void* destination, nuint source, nuint bytes, nint stream);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemcpyDtoDAsync_v2(nuint destination, nuint source, nuint bytes, nint stream);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemsetD8Async(nuint pointer, byte value, nuint bytes, nint stream);

    // ---- Virtual memory management.

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemGetAllocationGranularity(
        out nuint bytes, in CUmemAllocationProp prop, CUmemAllocationGranularity_flags option);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemAddressReserve(out nuint pointer, nuint bytes, nuint alignment, nuint address, ulong flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemAddressFree(nuint pointer, nuint bytes);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemCreate(out ulong handle, nuint bytes, in CUmemAllocationProp prop, ulong flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemRelease(ulong handle);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemMap(nuint pointer, nuint bytes, nuint offset, ulong handle, ulong flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemSetAccess(nuint pointer, nuint bytes, in CUmemAccessDesc access, nuint count);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuMemUnmap(nuint pointer, nuint bytes);

    // ---- Memory and events of another process.

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuIpcGetMemHandle(out CUipcMemHandle handle, nuint pointer);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuIpcOpenMemHandle_v2(out nuint pointer, CUipcMemHandle handle, uint flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuIpcCloseMemHandle(nuint pointer);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuIpcGetEventHandle(out CUipcEventHandle handle, nint @event);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuIpcOpenEventHandle(out nint @event, CUipcEventHandle handle);

    // ---- Streams and events.

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuCtxGetStreamPriorityRange(out int least, out int greatest);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuStreamCreateWithPriority(out nint stream, uint flags, int priority);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuStreamGetPriority(nint stream, out int priority);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuStreamDestroy_v2(nint stream);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuStreamSynchronize(nint stream);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuStreamWaitEvent(nint stream, nint @event, uint flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuEventCreate(out nint @event, uint flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuEventDestroy_v2(nint @event);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuEventRecord(nint @event, nint stream);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuEventQuery(nint @event);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuEventSynchronize(nint @event);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuEventElapsedTime(out float milliseconds, nint start, nint end);

    // ---- Kernels.

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuModuleLoadData(out nint module, void* image);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuModuleUnload(nint module);

    [LibraryImport(CudaLibraries.Driver, StringMarshalling = StringMarshalling.Utf8)]
    public static partial CUresult cuModuleGetFunction(out nint function, nint module, string name);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuFuncSetAttribute(nint function, CUfunction_attribute attribute, int value);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuLaunchKernelEx(CUlaunchConfig* config, nint function, void** arguments, void** extra);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(
        out int blocks, nint function, int threads, nuint sharedBytes);

    // ---- Graphs.

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuStreamBeginCapture_v2(nint stream, CUstreamCaptureMode mode);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuStreamEndCapture(nint stream, out nint graph);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuGraphInstantiateWithFlags(out nint executable, nint graph, ulong flags);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuGraphLaunch(nint executable, nint stream);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuGraphExecDestroy(nint executable);

    [LibraryImport(CudaLibraries.Driver)]
    public static partial CUresult cuGraphDestroy(nint graph);
}

/// <summary>The results that are distinguished; all others are failures.</summary>
internal enum CUresult
{
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NOT_READY = 600,
}

internal enum CUdevice_attribute
{
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
}

internal enum CUpointer_attribute
{
    /// <summary>Of the device that has the memory; an int.</summary>
    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,

    /// <summary>Whether cuIpcGetMemHandle can share the memory; an int.</summary>
    CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE = 10,
}

internal enum CUfunction_attribute
{
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
}

internal enum CUlaunchAttributeID
{
    /// <summary>With value 1, the kernel may start before the previous one in its stream has ended.</summary>
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
}

internal enum CUstreamCaptureMode
{
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
}

internal enum CUmemAllocationGranularity_flags
{
    CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1,
}

internal enum CUmemAllocationType
{
    CU_MEM_ALLOCATION_TYPE_PINNED = 1,
}

internal enum CUmemLocationType
{
    CU_MEM_LOCATION_TYPE_DEVICE = 1,
}

internal enum CUmemAccess_flags
{
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3,
}

[StructLayout(LayoutKind.Sequential)]
internal struct CUmemLocation
{
    public CUmemLocationType type;
    public int id;
}

/// <summary>Properties of an allocation.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct CUmemAllocationProp
{
    public CUmemAllocationType type;
    public int requestedHandleTypes;
    public CUmemLocation location;
    public nint win32HandleMetaData;
    public ulong allocFlags; // 8 bytes: compression, RDMA, usage; none is requested
}

[StructLayout(LayoutKind.Sequential)]
internal struct CUmemAccessDesc
{
    public CUmemLocation location;
    public CUmemAccess_flags flags;
}

/// <summary>16 bytes that identify a device, independent of its slot and of how processes number it.</summary>
[StructLayout(LayoutKind.Sequential, Size = 16)]
internal unsafe struct CUuuid
{
    public fixed byte Bytes[16];
}

/// <summary>A kernel's launch.</summary>
[StructLayout(LayoutKind.Sequential)]
internal unsafe struct CUlaunchConfig
{
    public uint GridDimX, GridDimY, GridDimZ;
    public uint BlockDimX, BlockDimY, BlockDimZ;
    public uint SharedMemBytes;
    public nint hStream;
    public CUlaunchAttribute* attrs;
    public uint numAttrs;
}

/// <summary>An attribute of a launch.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct CUlaunchAttribute
{
    public CUlaunchAttributeID id;
    public int pad;
    public CUlaunchAttributeValue value;
}

/// <summary>A union of 64 bytes.</summary>
[StructLayout(LayoutKind.Explicit, Size = 64)]
internal struct CUlaunchAttributeValue
{
    [FieldOffset(0)]
    public int programmaticStreamSerializationAllowed;
}

/// <summary>64 bytes by which another process of the machine opens an allocation.</summary>
[StructLayout(LayoutKind.Sequential, Size = 64)]
internal unsafe struct CUipcMemHandle
{
    public fixed byte Reserved[64];
}

/// <summary>64 bytes by which another process of the machine opens an event.</summary>
[StructLayout(LayoutKind.Sequential, Size = 64)]
internal unsafe struct CUipcEventHandle
{
    public fixed byte Reserved[64];
}
