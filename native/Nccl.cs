using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>The part of NCCL that an update uses, with the names of its manual.</summary>
internal static unsafe partial class Nccl
{
    public const uint NCCL_API_MAGIC = 0xcafebeef;

    /// <summary>NCCL_VERSION(2, 14, 0), the first with a config.</summary>
    public const uint ConfigVersion = 21400;

    static Nccl() => CudaLibraries.ResolveFor(typeof(Nccl).Assembly);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial byte* ncclGetErrorString(ncclResult result);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclGetUniqueId(out ncclUniqueId id);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclCommInitRankConfig(
        ref nint communicator, int ranks, ncclUniqueId id, int rank, in ncclConfig config);

    /// <summary>Frees it, and ends calls that wait in it, from any thread. Unlike ncclCommDestroy it waits for no other rank.</summary>
    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclCommAbort(nint communicator);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclCommGetAsyncError(nint communicator, out ncclResult error);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclBroadcast(
        nuint source, nuint destination, nuint count, ncclDataType type, int root, nint communicator, nint stream);
}

internal enum ncclResult
{
    ncclSuccess = 0,
    ncclInProgress = 7,
}

internal enum ncclDataType
{
    ncclUint8 = 1,
}

/// <summary>128 bytes that the ranks of one communicator share.</summary>
[StructLayout(LayoutKind.Sequential, Size = 128)]
internal unsafe struct ncclUniqueId
{
    public fixed byte Internal[128];
}

/// <summary>
/// The layout of NCCL 2.14, the first that has it; later versions read as much as the size says, and use defaults for the rest.
/// </summary>
[StructLayout(LayoutKind.Sequential)]
internal struct ncclConfig
{
    public nuint Size;
    public uint Magic;
    public uint Version;
    public int Blocking;

    /// <summary>Calls return at once and the communicator is polled until they are done, so that every wait can have a deadline.</summary>
    public static unsafe ncclConfig NonBlocking =>
        new() { Size = (nuint)sizeof(ncclConfig), Magic = Nccl.NCCL_API_MAGIC, Version = Nccl.ConfigVersion, Blocking = 0 };
}
