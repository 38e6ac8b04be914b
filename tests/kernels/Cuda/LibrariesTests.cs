using System.Diagnostics;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// How NVIDIA's libraries are loaded: by full path, from the folder that has them, which the system's loader need not know.
/// </summary>
public sealed class LibrariesTests : IDisposable
{
    /// <summary>A compiler that, as NVRTC, opens its builtins by name when it compiles.</summary>
    private const string Compiler = """
        #include <dlfcn.h>
        #include <string.h>
        static const char log[] = "nvrtc: error: failed to open libnvrtc-builtins.so.12.4.";
        extern "C" {
        int nvrtcVersion(int* major, int* minor) { *major = 12; *minor = 4; return 0; }
        const char* nvrtcGetErrorString(int result) { return result == 7 ? "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE" : "NVRTC_SUCCESS"; }
        int nvrtcCreateProgram(void** program, const char*, const char*, int, const char**, const char**) { *program = program; return 0; }
        int nvrtcDestroyProgram(void**) { return 0; }
        int nvrtcCompileProgram(void*, int, const char**) { return dlopen("libnvrtc-builtins.so.12.4", RTLD_NOW) ? 0 : 7; }
        int nvrtcGetProgramLogSize(void*, unsigned long* bytes) { *bytes = sizeof log; return 0; }
        int nvrtcGetProgramLog(void*, char* to) { strcpy(to, log); return 0; }
        int nvrtcGetCUBINSize(void*, unsigned long* bytes) { *bytes = 4; return 0; }
        int nvrtcGetCUBIN(void*, char* to) { memcpy(to, "code", 4); return 0; }
        }
        """;

    private readonly string _folder = Directory.CreateTempSubdirectory("rollout-libraries-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public async Task The_compilers_builtins_are_found_in_its_folder()
    {
        Build("libnvrtc.so.12", Compiler);
        Build("libnvrtc-builtins.so.12.4", "int builtins;");
        using OtherProcess process = Run(nameof(Compiles));
        await process.Succeeded();
    }

    [Fact]
    public async Task Whatever_the_compiler_fails_with_its_log_is_shown()
    {
        Build("libnvrtc.so.12", Compiler);
        using OtherProcess process = Run(nameof(Compiles));
        string output = await process.Ended();
        Assert.Contains("nvrtcCompileProgram (x.cu): NVRTC_ERROR_BUILTIN_OPERATION_FAILURE", output, StringComparison.Ordinal);
        Assert.Contains("nvrtc: error: failed to open libnvrtc-builtins.so.12.4.", output, StringComparison.Ordinal);
    }

    [Fact(Explicit = true)]
    public void Compiles()
    {
        Assert.Null(CudaLibraries.Missing(CudaLibraries.Nvrtc));
        Assert.Equal("code"u8, CudaCompiler.Compile("x.cu", "", new Dictionary<string, string>(), []));
    }

    [Fact]
    public async Task A_binding_that_is_the_first_call_finds_its_library()
    {
        Build("libcuda.so.1", """extern "C" int cuInit(unsigned) { return 0; }""");
        Build("libnccl.so.2", """extern "C" int ncclCommAbort(void*) { return 0; }""");
        Build("libnvrtc.so.12", Compiler);
        Build("libcublasLt.so.12", """extern "C" unsigned long cublasLtGetVersion() { return 7; }""");
        using OtherProcess process = Run(nameof(CallsAtOnce));
        await process.Succeeded();
    }

    [Fact(Explicit = true)]
    public void CallsAtOnce()
    {
        Assert.Equal(CUresult.CUDA_SUCCESS, Driver.cuInit(0));
        Assert.Equal(ncclResult.ncclSuccess, Nccl.ncclCommAbort(0));
        Assert.Equal(nvrtcResult.NVRTC_SUCCESS, Nvrtc.nvrtcVersion(out _, out _));
        Assert.Equal(7u, CublasLt.cublasLtGetVersion());
    }

    [Theory]
    [InlineData("/usr/local/nvidia/lib64")] // where containers get it from their host
    [InlineData("/usr/lib/wsl/lib")]
    [InlineData("/usr/lib/x86_64-linux-gnu")]
    public void The_driver_is_looked_for_where_it_is_put_and_nothing_else_is(string folder)
    {
        Assert.Contains(folder, CudaLibraries.Candidates(CudaLibraries.Driver).Select(Path.GetDirectoryName));
        Assert.DoesNotContain(folder, CudaLibraries.Candidates(CudaLibraries.Nvrtc).Select(Path.GetDirectoryName));
        Assert.Equal("libcuda.so.1", CudaLibraries.Candidates(CudaLibraries.Driver).First(file => Path.GetDirectoryName(file) is ""));
    }

    /// <summary>Compiles with the folder's libraries, in another process: a process keeps a library once loaded.</summary>
    private OtherProcess Run(string test) => OtherProcess.Run(
        $"{nameof(LibrariesTests)}.{test}", (CudaLibraries.PathVariable, _folder), ("XDG_CACHE_HOME", Path.Combine(_folder, "cache")));

    private void Build(string name, string source)
    {
        string file = Path.Combine(_folder, "source.cpp");
        File.WriteAllText(file, source);
        Process compiler;
        try
        {
            compiler = Process.Start("g++", ["-shared", "-fPIC", $"-Wl,-soname,{name}", "-o", Path.Combine(_folder, name), file, "-ldl"])!;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            Assert.Skip("g++ makes the libraries that this test loads");
            return;
        }

        compiler.WaitForExit();
        Assert.Equal(0, compiler.ExitCode);
    }
}
