using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>What an update takes of NCCL, by the names that its manual has.</summary>
internal static unsafe partial class Nccl
{
    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclGetVersion(out int version);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial byte* ncclGetErrorString(ncclResult result);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclGetUniqueId(out ncclUniqueId id);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclCommInitRank(out nint communicator, int ranks, ncclUniqueId id, int rank);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclCommDestroy(nint communicator);

    /// <summary>Ends what others wait in, from any thread.</summary>
    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclCommAbort(nint communicator);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclCommGetAsyncError(nint communicator, out ncclResult error);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclBroadcast(
        nuint source, nuint destination, nuint count, ncclDataType type, int root, nint communicator, nint stream);

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclGroupStart();

    [LibraryImport(CudaLibraries.Nccl)]
    public static partial ncclResult ncclGroupEnd();
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
