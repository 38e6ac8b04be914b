using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>The run-time compiler, with the names of its manual.</summary>
internal static unsafe partial class Nvrtc
{
    static Nvrtc() => CudaLibraries.ResolveFor(typeof(Nvrtc).Assembly);

    [LibraryImport(CudaLibraries.Nvrtc)]
    public static partial nvrtcResult nvrtcVersion(out int major, out int minor);

    [LibraryImport(CudaLibraries.Nvrtc)]
    public static partial byte* nvrtcGetErrorString(nvrtcResult result);

    [LibraryImport(CudaLibraries.Nvrtc, StringMarshalling = StringMarshalling.Utf8)]
    public static partial nvrtcResult nvrtcCreateProgram(
        out nint program, string source, string name, int headerCount, string[] headers, string[] includeNames);

    [LibraryImport(CudaLibraries.Nvrtc)]
    public static partial nvrtcResult nvrtcDestroyProgram(ref nint program);

    [LibraryImport(CudaLibraries.Nvrtc, StringMarshalling = StringMarshalling.Utf8)]
    public static partial nvrtcResult nvrtcCompileProgram(nint program, int optionCount, string[] options);

    [LibraryImport(CudaLibraries.Nvrtc)]
    public static partial nvrtcResult nvrtcGetProgramLogSize(nint program, out nuint bytes);

    [LibraryImport(CudaLibraries.Nvrtc)]
    public static partial nvrtcResult nvrtcGetProgramLog(nint program, byte* log);

    [LibraryImport(CudaLibraries.Nvrtc)]
    public static partial nvrtcResult nvrtcGetCUBINSize(nint program, out nuint bytes);

    [LibraryImport(CudaLibraries.Nvrtc)]
    public static partial nvrtcResult nvrtcGetCUBIN(nint program, byte* cubin);
}

internal enum nvrtcResult
{
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_COMPILATION = 6,
}
