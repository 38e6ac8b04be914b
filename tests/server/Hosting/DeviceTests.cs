using Rollout.Kernels.Tests.Cuda;

namespace Rollout.Server.Tests;

/// <summary>
/// Messages where NVIDIA's libraries are installed but there is no device: the real libraries, on a machine without a GPU.
/// </summary>
public sealed class DeviceTests
{
    private const string Answer = "cuInit: CUDA_ERROR_NO_DEVICE, no CUDA-capable device is detected";

    [Fact]
    public async Task A_GPU_that_is_asked_for_and_not_there_is_told_in_one_sentence()
    {
        Cli.Result result = await Generate("cuda");
        Assert.Equal(2, result.ExitCode);
        Assert.Equal("", result.Output);
        Assert.Equal($"rollout: {Answer}\n", result.Errors);
    }

    [Fact]
    public async Task Auto_falls_back_to_the_CPU_with_a_sentence()
    {
        Cli.Result result = await Generate("auto"), cpu = await Generate("cpu");
        Assert.True(result.ExitCode == 0, result.Errors);
        Assert.Equal($"rollout: the CPU computes, since no GPU can be used: {Answer}\n", result.Errors);
        Assert.Equal((cpu.Output, ""), (result.Output, cpu.Errors));
    }

    /// <summary>The simulated device, with hardly any memory.</summary>
    [Theory]
    [InlineData("100000")]    // not enough to begin with
    [InlineData("20000000")] // enough for all but keys and values
    public async Task A_device_that_has_too_little_memory_is_told_in_one_sentence(string bytes)
    {
        Cli.Result result = await Cli.RunAsync(
            [.. await SimulatedCuda.RequireAsync(), ("ROLLOUT_SIM_BYTES", bytes)],
            ["generate", "--model", Golden.Folder("qwen3"), "--ids", "5,6", "--max-tokens", "4", "--device", "cuda"]);
        Assert.Equal(1, result.ExitCode);
        Assert.Matches(
            "^rollout: not enough memory: cuMem[A-Za-z_0-9]+ \\([0-9]+ bytes\\): CUDA_ERROR_OUT_OF_MEMORY, out of memory\n$",
            result.Errors);
    }

    private static Task<Cli.Result> Generate(string device)
    {
        string folder = NvidiaFiles.Require("lib/libcuda.so.1", "lib/libnvrtc.so.12", "lib/libcublasLt.so.12");
        Assert.SkipWhen(Directory.Exists("/proc/driver/nvidia"), "this machine has a GPU");
        string[] request = ["--model", Golden.Folder("qwen3"), "--ids", "5,6", "--max-tokens", "4", "--temperature", "0"];
        return Cli.RunAsync([("ROLLOUT_CUDA_PATH", folder)], ["generate", .. request, "--json", "--device", device]);
    }
}
