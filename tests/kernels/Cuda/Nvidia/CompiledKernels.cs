using System.Collections.Concurrent;
using System.Globalization;
using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;
using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Every kernel as a device gets it, compiled by NVIDIA's NVRTC: in another process, because this one has loaded the simulated device's;
/// with the library's full path and without LD_LIBRARY_PATH, as on a user's machine.
/// </summary>
public sealed class CompiledKernels
{
    private const string TargetVariable = "ROLLOUT_TEST_TARGET";
    private const string OutputVariable = "ROLLOUT_TEST_OUTPUT";
    private const string VersionFile = "version"; // written next to the code, which is missing when the architecture is not known

    private static readonly int[] s_headDims = [64, 96, 128, 256];
    private static readonly ConcurrentDictionary<(string Architecture, bool Fp32), Lazy<Task<CompiledKernels>>> s_compiled = new();

    /// <summary>Of NVRTC: "12.4".</summary>
    internal string Version { get; private init; } = "";

    /// <summary>By name: "step", "attention HEAD_DIM=64 ROW_TILES=1".</summary>
    internal SortedDictionary<string, byte[]> Code { get; private init; } = [];

    /// <summary>Compiles them once a test run. The test skips where NVRTC is missing or does not know the architecture.</summary>
    internal static async Task<CompiledKernels> Of(string architecture, bool fp32)
    {
        string folder = NvidiaFiles.Require("lib/libnvrtc.so.12");
        Lazy<Task<CompiledKernels>> compiling =
            s_compiled.GetOrAdd((architecture, fp32), _ => new(() => Compile(folder, architecture, fp32)));
        CompiledKernels compiled = await compiling.Value;
        Assert.SkipWhen(compiled.Code.Count == 0, $"NVRTC {compiled.Version} does not know {architecture}");
        return compiled;
    }

    /// <summary>What the method above runs in a process of its own.</summary>
    [Fact(Explicit = true)]
    public void Compiles()
    {
        string[] target = Environment.GetEnvironmentVariable(TargetVariable)!.Split(' ');
        (string architecture, bool fp32) = (target[0], bool.Parse(target[1]));
        string output = Environment.GetEnvironmentVariable(OutputVariable)!, library = CudaLibraries.PathOf(CudaLibraries.Nvrtc);
        Assert.StartsWith(Environment.GetEnvironmentVariable(CudaLibraries.PathVariable)!, library, StringComparison.Ordinal);
        Assert.Equal(nvrtcResult.NVRTC_SUCCESS, Nvrtc.nvrtcVersion(out int major, out int minor));
        File.WriteAllText(Path.Combine(output, VersionFile), $"{major}.{minor}");
        if (!Architectures(library).Contains(int.Parse(architecture.AsSpan(3).TrimEnd('a'), CultureInfo.InvariantCulture)))
            return;

        string[] sources = typeof(CudaKernels).Assembly.GetManifestResourceNames();
        foreach (string file in sources.Where(source => source.EndsWith(".cu", StringComparison.Ordinal)))
        {
            string name = Path.GetFileNameWithoutExtension(file);
            if (name != "attention")
            {
                Keep(name, CudaKernels.Compile(architecture, fp32, file));
                continue;
            }

            foreach (int headDim in s_headDims)
            {
                foreach (int rowTiles in (int[])[1, AttentionKernel.MostRowTiles(headDim)])
                {
                    Keep($"{name} HEAD_DIM={headDim} ROW_TILES={rowTiles}",
                        CudaKernels.Compile(architecture, fp32, file, CudaKernels.AttentionDefinitions(headDim, rowTiles, fp32)));
                }
            }
        }

        void Keep(string name, byte[] cubin) => File.WriteAllBytes(Path.Combine(output, name), cubin);
    }

    private static unsafe int[] Architectures(string library)
    {
        nint nvrtc = NativeLibrary.Load(library);
        int count;
        Assert.Equal(0, ((delegate* unmanaged<int*, int>)NativeLibrary.GetExport(nvrtc, "nvrtcGetNumSupportedArchs"))(&count));
        int[] known = new int[count];
        fixed (int* destination = known)
            Assert.Equal(0, ((delegate* unmanaged<int*, int>)NativeLibrary.GetExport(nvrtc, "nvrtcGetSupportedArchs"))(destination));
        return known;
    }

    private static async Task<CompiledKernels> Compile(string folder, string architecture, bool fp32)
    {
        string output = Directory.CreateTempSubdirectory("rollout-nvrtc-").FullName;
        string cache = Path.Combine(output, "cache"); // so that nothing is cached
        try
        {
            using OtherProcess process = OtherProcess.Run($"{nameof(CompiledKernels)}.{nameof(Compiles)}",
                (CudaLibraries.PathVariable, folder), ("XDG_CACHE_HOME", cache), ("LD_LIBRARY_PATH", null),
                (TargetVariable, $"{architecture} {fp32}"), (OutputVariable, output));
            await process.Succeeded();
            SortedDictionary<string, byte[]> code = new(StringComparer.Ordinal);
            foreach (string file in Directory.EnumerateFiles(output).Where(file => Path.GetFileName(file) != VersionFile))
                code[Path.GetFileName(file)] = await File.ReadAllBytesAsync(file);
            return new CompiledKernels { Version = await File.ReadAllTextAsync(Path.Combine(output, VersionFile)), Code = code };
        }
        finally
        {
            Directory.Delete(output, recursive: true);
        }
    }
}
