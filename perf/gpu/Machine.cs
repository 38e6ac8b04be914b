using System.Diagnostics;
using System.Globalization;
using System.Runtime.InteropServices;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Native;

namespace Rollout.Gpu;

/// <summary>Stage 1: a description of the machine, whether it compiles every kernel, and its peak rates of copying and matmul.</summary>
internal static class Machine
{
    private const string Facts = "Machine", Kernels = "Kernels", Ceilings = "Ceilings";

    private static readonly WeightFormat[] s_formats = [WeightFormat.BFloat16, WeightFormat.Float32];

    public static IReadOnlyList<Part> Parts { get; } =
        [new("facts", 15, Describe), new("kernels", 90, CompileAsync), new("ceilings", 30, Measure)];

    private static Task Describe(Stage stage)
    {
        stage.Write(Facts, "host", "", $"{RuntimeInformation.OSDescription}, {Environment.ProcessorCount} cores, "
            + $"{GC.GetGCMemoryInfo().TotalAvailableMemoryBytes / 1e9:F0} GB, .NET {Environment.Version}");
        string commit = Path.Combine(Stage.Root, "commit");
        if (File.Exists(commit)) stage.Write(Facts, "commit", "", File.ReadAllText(commit).Trim());
        foreach (string library in (string[])[CudaLibraries.Driver, CudaLibraries.Nvrtc, CudaLibraries.CublasLt, CudaLibraries.Nccl])
        {
            string? missing = CudaLibraries.Missing(library);
            stage.Write(Facts, $"lib{library}", "", missing is null ? Resolved(CudaLibraries.PathOf(library)) : "missing");
        }

        stage.Try(Facts, "versions", () =>
        {
            Driver.cuDriverGetVersion(out int driver).ThrowIfFailed();
            Nvrtc.nvrtcVersion(out int major, out int minor).ThrowIfFailed();
            stage.Write(Facts, "versions", "", string.Create(CultureInfo.InvariantCulture,
                $"driver API {driver / 1000}.{driver % 1000 / 10}, NVRTC {major}.{minor}, cuBLASLt {CublasLt.cublasLtGetVersion()}"));
        });
        stage.Try(Facts, "device", () =>
        {
            using CudaDevice device = new(0);
            stage.Write(Facts, "device", "", $"{device.Name}, {device.Architecture}, {device.FreeBytes / 1e9:F1} GB free");
        });
        stage.Try(Facts, "nvidia-smi", () =>
        {
            if (stage.IsSmall || Programs.Find("nvidia-smi") is null) return;
            const string Asked = "driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu";
            ProcessStartInfo info = new("nvidia-smi", [$"--query-gpu={Asked}", "--format=csv,noheader"]) { RedirectStandardOutput = true };
            using Process process = Process.Start(info)!;
            stage.Write(Facts, "nvidia-smi", "", $"{process.StandardOutput.ReadToEnd().Trim()} ({Asked})");
        });
        return Task.CompletedTask;

        static string Resolved(string path)
        {
            FileSystemInfo? target = Path.IsPathRooted(path) ? File.ResolveLinkTarget(path, returnFinalTarget: true) : null;
            return target is null ? path : $"{path} ({target.Name})";
        }
    }

    /// <summary>
    /// Compiles all at the same time, each in its own process, since the compiler handles one source at a time. Kernels that an earlier run
    /// compiled come from its cache: then this is the time to load them.
    /// </summary>
    private static async Task CompileAsync(Stage stage)
    {
        int[] headDims = stage.IsSmall ? [16, 32] : [16, 32, 64, 128]; // the golden models', and those that are measured
        foreach (int[] some in (int[][])[[0], headDims]) // first what all models need
            await Task.WhenAll(some.SelectMany(headDim => s_formats.Select(format => CompileAsync(stage, format, headDim))));
    }

    private static async Task CompileAsync(Stage stage, WeightFormat format, int headDim)
    {
        string name = WeightFormats.NameOf(format);
        string[] arguments = [.. Stage.Self, "compile", $"{stage.Number}", name, $"{headDim}", "--out", stage.Output];
        using Process process = Process.Start(new ProcessStartInfo(Environment.ProcessPath!, arguments))!;
        await process.WaitForExitAsync();
        if (process.ExitCode != 0) stage.Fail(Kernels, name, $"head {headDim}: ended with {process.ExitCode}");
    }

    /// <summary>The kernels of one format: those that all models need, or of attention for one size of a head.</summary>
    public static void Compile(Stage stage, WeightFormat format, int headDim) => stage.Try(Kernels, WeightFormats.NameOf(format), () =>
    {
        long start = Stopwatch.GetTimestamp();
        using CudaBackend backend = new(0, format);
        if (headDim > 0)
        {
            start = Stopwatch.GetTimestamp();
            using KvCache cache = backend.AllocateKvCache(1, new KvLayout(1, headDim, headDim));
        }

        string column = headDim == 0 ? "start, s" : $"attention, head {headDim}, s";
        stage.Write(Kernels, WeightFormats.NameOf(format), column, Stopwatch.GetElapsedTime(start).TotalSeconds);
    });

    private static Task Measure(Stage stage)
    {
        using CudaBackend backend = new();
        stage.Try(Ceilings, "copy on the device", () => stage.Write(Ceilings, "copy on the device", "GB/s, read and written",
            DeviceClock.CopyRate(backend.Device, stage.IsSmall ? 1 << 20 : 4L << 30) / 1e9));
        stage.Try(Ceilings, "matmul, bf16 to fp32", () =>
        {
            int size = stage.IsSmall ? 64 : 8192;
            using RandomWeights random = new(backend, stage.IsSmall);
            using Weight weight = backend.AllocateWeight(size, size), ones = backend.AllocateWeight(1, size);
            using Tensor input = backend.AllocateTensor(size, size), output = backend.AllocateTensor(size, size);
            using Tensor normed = backend.AllocateTensor(size, size, rounded: true);
            random.Fill(weight);
            random.FillOnes(ones);
            float[] row = [.. Enumerable.Range(0, size).Select(i => MathF.Sin(i))];
            float[] values = new float[size * size];
            for (int i = 0; i < size; i++) row.CopyTo(values, i * size);
            input.Write(size, values);
            backend.RmsNorm(input, ones, 1e-6f, normed, size); // in bf16
            double seconds = DeviceClock.Seconds(backend.Device, 5, 10, () => backend.MatMul(normed, weight, null, output, size));
            double flops = 2.0 * size * size * size;
            stage.Write(Ceilings, $"matmul of {size} x {size} x {size}, bf16 to fp32", "TFLOP/s", flops / seconds / 1e12);
        });
        return Task.CompletedTask;
    }
}
