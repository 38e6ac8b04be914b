using System.Diagnostics;

namespace Rollout.Server.Tests;

/// <summary>The simulated device of tests/cuda-sim, for processes that a test starts.</summary>
internal static class SimulatedCuda
{
    /// <summary>Builds it, and returns the environment that selects it. Skips the test where g++ is missing.</summary>
    public static async Task<(string Name, string Value)[]> RequireAsync()
    {
        string folder = Path.GetFullPath(Path.Combine(Golden.Folder("qwen3"), "..", "..", "cuda-sim"));
        ProcessStartInfo script = new("sh", [Path.Combine(folder, "build.sh")])
        {
            RedirectStandardError = true,
            RedirectStandardOutput = true,
        };
        using Process build = Process.Start(script)!;
        await build.StandardError.ReadToEndAsync();
        await build.WaitForExitAsync();
        Assert.SkipWhen(build.ExitCode != 0, "the simulated CUDA device needs g++");
        return [("ROLLOUT_CUDA_PATH", Path.Combine(folder, "obj")), ("XDG_CACHE_HOME", Path.Combine(folder, "obj", "cache"))];
    }
}
