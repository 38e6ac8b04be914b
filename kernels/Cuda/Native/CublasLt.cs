using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>The part of cuBLASLt that a matmul uses, with the names of its manual.</summary>
internal static unsafe partial class CublasLt
{
    public const int CUBLAS_OP_T = 1;
    public const int CUBLASLT_EPILOGUE_DEFAULT = 1;
    public const int CUBLASLT_EPILOGUE_BIAS = 4;

    static CublasLt() => CudaLibraries.ResolveFor(typeof(CublasLt).Assembly);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial nuint cublasLtGetVersion();

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial byte* cublasLtGetStatusString(cublasStatus status);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtCreate(out nint handle);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtDestroy(nint handle);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulDescCreate(out nint description, cublasComputeType compute, cudaDataType scale);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulDescDestroy(nint description);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulDescSetAttribute(
        nint description, cublasLtMatmulDescAttributes attribute, void* value, nuint bytes);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatrixLayoutCreate(
        out nint layout, cudaDataType type, ulong rows, ulong columns, long leadingDimension);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatrixLayoutSetAttribute(
        nint layout, cublasLtMatrixLayoutAttribute attribute, void* value, nuint bytes);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatrixLayoutDestroy(nint layout);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulPreferenceCreate(out nint preference);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulPreferenceDestroy(nint preference);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulPreferenceSetAttribute(
        nint preference, cublasLtMatmulPreferenceAttributes attribute, void* value, nuint bytes);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulAlgoGetHeuristic(
        nint handle, nint description, nint a, nint b, nint c, nint d, nint preference, int wanted,
        cublasLtMatmulHeuristicResult* results, out int found);

    /// <summary>Whether an algorithm that was found for other sizes supports these too, and with how much workspace.</summary>
    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulAlgoCheck(
        nint handle, nint description, nint a, nint b, nint c, nint d, cublasLtMatmulAlgo* algorithm,
        out cublasLtMatmulHeuristicResult result);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmulAlgoConfigGetAttribute(
        cublasLtMatmulAlgo* algorithm, cublasLtMatmulAlgoConfigAttributes attribute, void* value, nuint bytes, out nuint written);

    [LibraryImport(CudaLibraries.CublasLt)]
    public static partial cublasStatus cublasLtMatmul(
        nint handle, nint description, void* alpha, nuint a, nint aLayout, nuint b, nint bLayout, void* beta, nuint c, nint cLayout,
        nuint d, nint dLayout, cublasLtMatmulAlgo* algorithm, nuint workspace, nuint workspaceBytes, nint stream);
}

internal enum cublasStatus
{
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
}

internal enum cublasComputeType
{
    CUBLAS_COMPUTE_32F = 68,
}

internal enum cudaDataType
{
    CUDA_R_32F = 0,
    CUDA_R_16BF = 14,
}

internal enum cublasLtMatmulDescAttributes
{
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
}

internal enum cublasLtMatrixLayoutAttribute
{
    CUBLASLT_MATRIX_LAYOUT_COLS = 3,
}

internal enum cublasLtMatmulPreferenceAttributes
{
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
}

internal enum cublasLtMatmulAlgoConfigAttributes
{
    CUBLASLT_ALGO_CONFIG_ID = 0,
    CUBLASLT_ALGO_CONFIG_TILE_ID = 1,
    CUBLASLT_ALGO_CONFIG_SPLITK_NUM = 2,
    CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME = 3,
    CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING = 4,
    CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION = 5,
    CUBLASLT_ALGO_CONFIG_STAGES_ID = 6,

    /// <summary>16 bits, like the next one; those above have 32.</summary>
    CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID = 7,
    CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID = 8,
}

/// <summary>An algorithm and all its settings, valid for one version of the library on one kind of device.</summary>
[StructLayout(LayoutKind.Sequential, Size = 64)]
internal unsafe struct cublasLtMatmulAlgo
{
    public fixed ulong Data[8];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct cublasLtMatmulHeuristicResult
{
    public cublasLtMatmulAlgo Algorithm;
    public nuint WorkspaceBytes;
    public cublasStatus State;
    public float WavesCount;
    public fixed int Reserved[4];
}
