using System.Buffers.Binary;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// NVIDIA's own compiler takes every kernel: what g++ makes of the sources for the simulated device says nothing of inline PTX. No GPU is needed, only
/// libnvrtc; .ci/run fetches it.
/// </summary>
public sealed class NvidiaCompilerTests
{
    private const string FolderVariable = "ROLLOUT_TEST_NVRTC";

    public static TheoryData<string, bool> Targets => new() { { "sm_80", false }, { "sm_90", false }, { "sm_90", true } };

    [Theory, MemberData(nameof(Targets))]
    public async Task Every_kernel_compiles(string architecture, bool fp32)
    {
        string? folder = Environment.GetEnvironmentVariable(FolderVariable);
        Assert.SkipWhen(string.IsNullOrEmpty(folder), $"{FolderVariable} names no folder with NVIDIA's libnvrtc");
        string cache = Directory.CreateTempSubdirectory("rollout-nvrtc-").FullName; // so that nothing was compiled before
        try
        {
            using OtherProcess process = OtherProcess.Run($"{nameof(NvidiaCompilerTests)}.{nameof(Compiles)}",
                (CudaLibraries.PathVariable, folder), ("XDG_CACHE_HOME", cache), ("LD_LIBRARY_PATH", folder), ("ROLLOUT_TEST_TARGET", $"{architecture} {fp32}"));
            await process.Succeeded();
        }
        finally
        {
            Directory.Delete(cache, recursive: true);
        }
    }

    [Fact(Explicit = true)]
    public void Compiles()
    {
        string[] target = Environment.GetEnvironmentVariable("ROLLOUT_TEST_TARGET")!.Split(' ');
        bool fp32 = bool.Parse(target[1]);
        Assert.StartsWith(Environment.GetEnvironmentVariable(FolderVariable)!, CudaLibraries.PathOf(CudaLibraries.Nvrtc), StringComparison.Ordinal);
        foreach (string file in (string[])["step.cu", "sampling.cu", "weights.cu", "digest.cu"])
            IsCode(CudaKernels.Compile(target[0], fp32, file));
        foreach (int headDim in (int[])[64, 128, 256])
        {
            foreach (int rowTiles in (int[])[1, AttentionKernel.MostRowTiles(headDim)])
                IsCode(CudaKernels.Compile(target[0], fp32, "attention.cu", CudaKernels.AttentionDefinitions(headDim, rowTiles, fp32)));
        }
    }

    private static void IsCode(byte[] cubin)
    {
        const int Cuda = 190; // EM_CUDA
        Assert.Equal(0x7F454C46u, BinaryPrimitives.ReadUInt32BigEndian(cubin));
        Assert.Equal(Cuda, BinaryPrimitives.ReadUInt16LittleEndian(cubin.AsSpan(18)));
    }
}
