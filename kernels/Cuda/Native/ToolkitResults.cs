using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>Answers of the toolkit's libraries; those of the driver and of NCCL are <see cref="CudaResults"/>'.</summary>
internal static unsafe class ToolkitResults
{
    /// <inheritdoc cref="CudaResults.ThrowIfFailed(CUresult, string?, string)"/>
    public static void ThrowIfFailed(
        this nvrtcResult result, string? asked = null, [CallerArgumentExpression(nameof(result))] string call = "")
    {
        if (result != nvrtcResult.NVRTC_SUCCESS)
            throw new CudaException(call, result.Name(), asked);
    }

    /// <inheritdoc cref="CudaResults.ThrowIfFailed(CUresult, string?, string)"/>
    public static void ThrowIfFailed(
        this cublasStatus result, string? asked = null, [CallerArgumentExpression(nameof(result))] string call = "")
    {
        if (result != cublasStatus.CUBLAS_STATUS_SUCCESS)
            throw new CudaException(call, result.Name(), asked);
    }

    /// <summary>"CUBLAS_STATUS_NOT_SUPPORTED".</summary>
    public static string Name(this cublasStatus status) => Text(CublasLt.cublasLtGetStatusString(status)) ?? $"error {(int)status}";

    /// <summary>"NVRTC_ERROR_COMPILATION".</summary>
    public static string Name(this nvrtcResult result) => Text(Nvrtc.nvrtcGetErrorString(result)) ?? $"error {(int)result}";

    private static string? Text(byte* utf8) => Marshal.PtrToStringUTF8((nint)utf8);
}
