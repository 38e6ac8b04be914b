using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>
/// No device can be used, or a call to one of NVIDIA's libraries failed: then the message has the call, its arguments and its result.
/// </summary>
public sealed class CudaException : Exception
{
    internal CudaException(string message)
        : base(message)
    {
    }

    /// <param name="call">The call's text, from which its name is taken.</param>
    /// <param name="answer">What the library said.</param>
    /// <param name="asked">The arguments that matter: "8192 bytes", say.</param>
    internal CudaException(string call, string answer, string? asked)
        : base(asked is null ? $"{NameOf(call)}: {answer}" : $"{NameOf(call)} ({asked}): {answer}")
    {
    }

    /// <summary>"cuMemAlloc_v2" of "Driver.cuMemAlloc_v2(out pointer, bytes)".</summary>
    private static string NameOf(string call)
    {
        string name = call.Split('(', 2)[0];
        return name[(name.LastIndexOf('.') + 1)..];
    }
}

/// <summary>Results of the driver and of NCCL.</summary>
internal static unsafe class CudaResults
{
    /// <param name="result">What the call returned.</param>
    /// <param name="asked">The arguments that matter: "8192 bytes", say.</param>
    /// <param name="call">The call's text; its name is taken from it.</param>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory.</exception>
    /// <exception cref="CudaException">Any other failure.</exception>
    public static void ThrowIfFailed(
        this CUresult result, string? asked = null, [CallerArgumentExpression(nameof(result))] string call = "")
    {
        if (result == CUresult.CUDA_SUCCESS)
            return;
        CudaException error = new(call, Describe(result), asked);
        throw result == CUresult.CUDA_ERROR_OUT_OF_MEMORY ? new OutOfMemoryException(error.Message, error) : error;
    }

    /// <summary>As above, for calls of every step: the text is made only on failure.</summary>
    public static void ThrowIfFailed(this CUresult result, long bytes, [CallerArgumentExpression(nameof(result))] string call = "")
    {
        if (result != CUresult.CUDA_SUCCESS)
            result.ThrowIfFailed($"{bytes} bytes", call);
    }

    /// <inheritdoc cref="ThrowIfFailed(CUresult, string?, string)"/>
    public static void ThrowIfFailed(
        this ncclResult result, string? asked = null, [CallerArgumentExpression(nameof(result))] string call = "")
    {
        if (result != ncclResult.ncclSuccess)
            throw new CudaException(call, Text(Nccl.ncclGetErrorString(result)) ?? $"error {(int)result}", asked);
    }

    private static string Describe(CUresult result)
    {
        string name = Driver.cuGetErrorName(result, out byte* n) == CUresult.CUDA_SUCCESS ? Text(n) ?? "" : $"error {(int)result}";
        return Driver.cuGetErrorString(result, out byte* t) == CUresult.CUDA_SUCCESS ? $"{name}, {Text(t)}" : name;
    }

    private static string? Text(byte* utf8) => Marshal.PtrToStringUTF8((nint)utf8);
}
