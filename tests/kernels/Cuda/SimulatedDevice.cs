using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// The device that the tests of the CUDA backend run on: the simulated one of tests/cuda-sim, built and selected once a test run, or with
/// ROLLOUT_TEST_CUDA=real this machine's GPU. Tests skip where g++ is missing; those that inspect the simulated device skip on a real one.
/// </summary>
internal static class SimulatedDevice
{
    private static readonly Lazy<string?> s_missing = new(Build);

    private static bool IsReal => Environment.GetEnvironmentVariable("ROLLOUT_TEST_CUDA") == "real";

    /// <summary>Skips the test, visibly, where there is no device.</summary>
    public static void Require() => Assert.SkipWhen(s_missing.Value is not null, s_missing.Value ?? "");

    /// <summary>For tests of the simulated device itself, or of its counters.</summary>
    public static void RequireSimulated()
    {
        Assert.SkipWhen(IsReal, "the device is a real one");
        Require();
    }

    /// <summary>The device's counters since the process began.</summary>
    public static unsafe Counters Count()
    {
        delegate* unmanaged<Counters*, void> count = (delegate* unmanaged<Counters*, void>)Export("cuSimCounters");
        Counters counters;
        count(&counters);
        return counters;
    }

    /// <summary>
    /// Whether submitted work is skipped from now on, for tests of the host's part alone. Every step then answers token 0.
    /// </summary>
    public static unsafe void Idle(bool idle)
    {
        ((delegate* unmanaged<int, void>)Export("cuSimIdle"))(idle ? 1 : 0);
    }

    /// <summary>Sets the device's memory until disposed. Untouched pages cost nothing.</summary>
    public static IDisposable WithBytes(long bytes)
    {
        SetBytes(bytes);
        return new UsualBytes();
    }

    private static unsafe void SetBytes(long bytes) => ((delegate* unmanaged<long, void>)Export("cuSimBytes"))(bytes);

    /// <summary>
    /// Sets the proposals of cuBLASLt's heuristic for this thread, until disposed: see candidates() in tests/cuda-sim/cublaslt.cpp.
    /// </summary>
    public static IDisposable Propose(string candidates)
    {
        SetCandidates(candidates);
        return new Usual();
    }

    private static unsafe void SetCandidates(string candidates)
    {
        delegate* unmanaged<byte*, void> set = (delegate* unmanaged<byte*, void>)Export("cuSimMatMul");
        fixed (byte* text = System.Text.Encoding.ASCII.GetBytes(candidates + '\0'))
            set(text);
    }

    /// <summary>Host memory that this process has pinned, in whole pages.</summary>
    public static unsafe long PinnedBytes => (long)((delegate* unmanaged<nuint>)Export("cuSimPinnedBytes"))();

    /// <summary>Communicators of this process that were created and not freed.</summary>
    public static unsafe int Communicators => ((delegate* unmanaged<int>)Export("cuSimCommunicators"))();

    private sealed class Usual : IDisposable
    {
        public void Dispose() => SetCandidates("");
    }

    private sealed class UsualBytes : IDisposable
    {
        public void Dispose() => SetBytes(0);
    }

    private static nint Export(string name) => NativeLibrary.GetExport(
        NativeLibrary.Load(Path.Combine(Environment.GetEnvironmentVariable("ROLLOUT_CUDA_PATH")!, "libcuda.so.1")), name);

    /// <summary>As in sim.h.</summary>
    public readonly record struct Counters(
        long Launches, long HostToDeviceBytes, long DeviceToHostBytes, long Synchronisations, long Allocations, long MatMulWeightBytes,
        long StagedBytes, long Graphs, long EarlyLaunches, long ReadBytes, long Mapped)
    {
        public static Counters operator -(Counters a, Counters b) => new(
            a.Launches - b.Launches, a.HostToDeviceBytes - b.HostToDeviceBytes, a.DeviceToHostBytes - b.DeviceToHostBytes,
            a.Synchronisations - b.Synchronisations, a.Allocations - b.Allocations, a.MatMulWeightBytes - b.MatMulWeightBytes,
            a.StagedBytes - b.StagedBytes, a.Graphs - b.Graphs, a.EarlyLaunches - b.EarlyLaunches,
            a.ReadBytes - b.ReadBytes, a.Mapped - b.Mapped);
    }

    private static string? Build()
    {
        if (IsReal)
            return null;
        string script = Path.Combine(Root(), "tests", "cuda-sim", "build.sh");
        using Process build = Process.Start(
            new ProcessStartInfo("sh", [script]) { RedirectStandardOutput = true, RedirectStandardError = true })!;
        Task<string> errors = build.StandardError.ReadToEndAsync();
        string folder = build.StandardOutput.ReadToEnd().Trim();
        build.WaitForExit();
        if (build.ExitCode != 0)
        {
            return errors.Result.Contains("needs g++", StringComparison.Ordinal)
                ? errors.Result.Trim()
                : throw new InvalidOperationException(errors.Result);
        }
        Environment.SetEnvironmentVariable("ROLLOUT_CUDA_PATH", folder);
        Environment.SetEnvironmentVariable("XDG_CACHE_HOME", Path.Combine(folder, "cache")); // not the user's
        return null;
    }

    private static string Root([CallerFilePath] string here = "") =>
        Path.GetFullPath(Path.Combine(Path.GetDirectoryName(here)!, "..", "..", ".."));
}
