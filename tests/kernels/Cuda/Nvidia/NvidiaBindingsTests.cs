using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>All functions, structs, enums and constants of the bindings against NVIDIA's libraries and headers.</summary>
public sealed class NvidiaBindingsTests
{
    public static TheoryData<string> Libraries => [.. Bindings.Libraries.Keys];

    [Theory, MemberData(nameof(Libraries))]
    public void Every_function_is_exported_by_the_library(string library)
    {
        string file = Bindings.Libraries[library];
        HashSet<string> exports = SharedLibrary.Exports(Path.Combine(NvidiaFiles.Require(file), file));
        string[] bound = [.. Bindings.Functions.Where(function => function.Library == library).Select(function => function.Method.Name)];
        Assert.NotEmpty(bound);
        string[] missing = [.. bound.Except(exports)];
        Assert.True(missing.Length == 0, $"{file} does not export {string.Join(", ", missing)}");
    }

    [Fact]
    public async Task Everything_is_as_the_headers_say()
    {
        string folder = NvidiaFiles.Require("include/cuda.h", "include/cublasLt.h", "include/nvrtc.h", "headers/nccl.h", "headers/nv");
        await HoldAgainst(Path.Combine(folder, "include"), Path.Combine(folder, "headers"));
    }

    /// <summary>Those of a toolkit of this machine, where a variable names them: CUDA 13's, say.</summary>
    [Fact]
    public async Task Everything_is_as_the_headers_of_another_toolkit_say()
    {
        string? include = Environment.GetEnvironmentVariable(NvidiaFiles.IncludeVariable);
        Assert.SkipWhen(string.IsNullOrEmpty(include), $"{NvidiaFiles.IncludeVariable} names no folder with a toolkit's headers");
        await HoldAgainst(include!, Path.Combine(NvidiaFiles.Require("headers/nccl.h"), "headers"));
    }

    private static async Task HoldAgainst(params string[] includes)
    {
        string[] paths = Environment.GetEnvironmentVariable("PATH")!.Split(':');
        Assert.SkipUnless(paths.Any(path => File.Exists(Path.Combine(path, "g++"))), "there is no g++, which reads the headers");
        Assert.NotEmpty(Bindings.Enums);
        Assert.NotEmpty(Bindings.Structs);
        Assert.NotEmpty(Bindings.Constants);
        string[] differences = [.. (await HeaderProgram.Run(includes)).Differences()];
        Assert.True(differences.Length == 0, string.Join('\n', differences));
    }
}
