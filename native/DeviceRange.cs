namespace Rollout.Native;

/// <summary>
/// A range of device addresses, reserved until it is disposed. Its memory can be freed and allocated again while the addresses stay, so
/// that pointers into it, such as those in a captured graph, stay valid.
/// </summary>
internal sealed class DeviceRange : CudaHandle
{
    private readonly CUmemAllocationProp _memory;
    private readonly nuint _reserved; // Bytes, rounded up to the mapping granularity

    /// <summary>Reserves the addresses; <see cref="Map"/> allocates the memory.</summary>
    /// <param name="context">Of the device.</param>
    /// <param name="ordinal">The device.</param>
    /// <param name="bytes">At least 0.</param>
    public DeviceRange(CudaContext context, int ordinal, long bytes)
        : base(context)
    {
        Bytes = bytes;
        _memory = new CUmemAllocationProp { type = CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED, location = OnDevice(ordinal) };
        Driver.cuMemGetAllocationGranularity(
            out nuint granularity, _memory, CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED).ThrowIfFailed();
        _reserved = ((nuint)Math.Max(1, bytes) + granularity - 1) / granularity * granularity;
        Driver.cuMemAddressReserve(out nuint pointer, _reserved, 0, 0, 0).ThrowIfFailed($"{_reserved} bytes");
        Own((nint)pointer);
    }

    public long Bytes { get; }

    public nuint Pointer => (nuint)Value;

    /// <summary>Whether memory is mapped to the addresses.</summary>
    public bool IsMapped { get; private set; }

    /// <summary>Allocates the memory. Its contents are undefined.</summary>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory.</exception>
    public void Map()
    {
        Driver.cuMemCreate(out ulong memory, _reserved, _memory, 0).ThrowIfFailed($"{_reserved} bytes");
        try
        {
            Driver.cuMemMap(Pointer, _reserved, 0, memory, 0).ThrowIfFailed($"{_reserved} bytes");
            IsMapped = true;
        }
        finally
        {
            Driver.cuMemRelease(memory).ThrowIfFailed(); // the mapping keeps it
        }

        CUmemAccessDesc access = new() { location = _memory.location, flags = CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
        CUresult result = Driver.cuMemSetAccess(Pointer, _reserved, access, 1);
        if (result != CUresult.CUDA_SUCCESS)
        {
            Unmap();
            result.ThrowIfFailed($"{_reserved} bytes", nameof(Driver.cuMemSetAccess));
        }
    }

    /// <summary>Frees the memory. No queued work may use it.</summary>
    public void Unmap()
    {
        Driver.cuMemUnmap(Pointer, _reserved).ThrowIfFailed($"{_reserved} bytes");
        IsMapped = false;
    }

    protected override CUresult Destroy(nint value)
    {
        CUresult unmapped = IsMapped ? Driver.cuMemUnmap((nuint)value, _reserved) : CUresult.CUDA_SUCCESS;
        CUresult freed = Driver.cuMemAddressFree((nuint)value, _reserved);
        return unmapped != CUresult.CUDA_SUCCESS ? unmapped : freed;
    }

    private static CUmemLocation OnDevice(int ordinal) => new() { type = CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, id = ordinal };
}
