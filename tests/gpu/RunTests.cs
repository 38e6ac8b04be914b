using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Text.Json;
using Rollout.Kernels.Tests.Cuda;

namespace Rollout.Gpu.Tests;

/// <summary>
/// perf/gpu as it is used: the archive of pack.sh, in its own folder, with no .NET on the PATH and another home; on the simulated device,
/// where shapes are tiny.
/// </summary>
public sealed class RunTests : IDisposable
{
    private const string OnlyRelease = "pack.sh takes Release";

    private readonly string _folder = Directory.CreateTempSubdirectory("rollout-gpu-").FullName;

    private static string Root { get; } = FindRoot();

    private static string Simulated => Path.Combine(Root, "tests", "cuda-sim", "obj");

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public async Task Ceilings_and_rates_are_measured_to_their_end()
    {
        SimulatedDevice.Require();
        Assert.SkipUnless(AppContext.BaseDirectory.Contains("Release", StringComparison.Ordinal), OnlyRelease);
        await PackAsync();
        string[] compiled = ["--cache", Directory.CreateDirectory(Path.Combine(Simulated, "cache")).FullName];
        await RunAsync(["--out", "results", "--stage", "1", "--patience", "5", .. compiled]);
        await RunAsync(["--out", "results", "--stage", "5", "--patience", "5", .. compiled]);
        string report = await RunAsync(["--out", "results", "--stage", "4", "--patience", "5", .. compiled]);

        Row[] rows = [.. File.ReadLines(Path.Combine(_folder, "results", "rows.jsonl"))
            .Select(line => JsonSerializer.Deserialize<Row>(line, JsonSerializerOptions.Web)!)];
        Assert.Equal([], rows.Where(row => row.Error is not null).Select(row => $"{row.Table}, {row.Name}: {row.Error}"));
        Assert.All(rows, row => Assert.True(row.Value is not null || row.Text is { Length: > 0 }, $"{row}"));
        foreach (string model in (string[])["Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.1-8B", "Qwen3-8B"])
        {
            foreach (string table in (string[])["Decode", "Prefill", "Time by kernel"])
                Assert.Contains($"**{table}, {model}**", report, StringComparison.Ordinal);
        }

        Assert.Contains("| Qwen2.5-0.5B, GRPO 64 x 16, run 2, through gRPC |", report, StringComparison.Ordinal);
        foreach (string mode in (string[])["staged", "in place"])
        {
            Assert.Contains($"| CUDA IPC, {mode}, push to first token |", report, StringComparison.Ordinal);
            Row counts = Assert.Single(rows, row => row.Name == $"CUDA IPC, {mode}" && row.Column == "of a push after the first");
            Assert.Matches("Messages = 3, Buckets = 1, HandlesOpened = 0, Launches = 1, DeviceAllocations = 0, GraphsCaptured = 0, "
                + "DeviceBytes = [0-9]+, HostBytes = 0 ", counts.Text!);
        }

        Assert.Contains("0 failures.", report, StringComparison.Ordinal);
        string[] files = [.. Directory.EnumerateFiles(Path.Combine(_folder, "results")).Select(Path.GetFileName).Order()!];
        Assert.Equal(["cache.tar", "log.txt", "results.md", "rows.jsonl"], files);
    }

    /// <summary>A failure becomes a row that says why, and does not stop what comes after it.</summary>
    [Fact]
    public async Task Without_a_device_every_part_says_so()
    {
        SimulatedDevice.Require();
        Assert.SkipUnless(AppContext.BaseDirectory.Contains("Release", StringComparison.Ordinal), OnlyRelease);
        await PackAsync();
        string report = await RunAsync(devices: 0, "--out", "results", "--stage", "1");
        foreach (string row in (string[])["Machine, device", "Kernels, bf16", "Kernels, fp32", "Stages, 1, ceilings"])
        {
            const string Why = "**failed**: CudaException: This machine has no CUDA device.";
            Assert.Contains($"- {row}: {Why}", report, StringComparison.Ordinal);
        }

        Assert.Contains("| 1, kernels | done |", report, StringComparison.Ordinal);
    }

    /// <summary>
    /// A repeated measurement replaces the earlier one; the incomplete line of a killed process, and the rows that it did not reach, do no
    /// harm.
    /// </summary>
    [Fact]
    public async Task The_report_says_what_is_missed_and_what_failed()
    {
        Assert.SkipUnless(AppContext.BaseDirectory.Contains("Release", StringComparison.Ordinal), OnlyRelease);
        await PackAsync();
        Directory.CreateDirectory(Path.Combine(_folder, "results"));
        File.WriteAllLines(Path.Combine(_folder, "results", "rows.jsonl"),
        [
            """{"stage":1,"table":"Machine","name":"device","column":"","text":"NVIDIA H200, sm_90, 140.1 GB free"}""",
            """{"stage":4,"table":"Decode, M","name":"1 x 128","column":"ms a step","value":7}""",
            """{"stage":4,"table":"Decode, M","name":"1 x 128","column":"ms a step","value":0.61,"target":0.55}""",
            """{"stage":4,"table":"Decode, M","name":"1 x 128","column":"tokens/s","value":1639,"target":1000,"atLeast":true}""",
            """{"stage":4,"table":"Decode, M","name":"8 x 128","column":"result","error":"CudaException: a | b"}""",
            """{"stage":6,"table":"Decode, M","name":"1 x 128","column":"transformers, ms a step","value":21.25}""",
            """{"stage":4,"table":"Decode, M","na""",
        ]);
        string report = await RunAsync("--report", "results");
        Assert.Contains("the CUDA backend on NVIDIA H200, sm_90, 140.1 GB free (`perf/gpu`)", report, StringComparison.Ordinal);
        Assert.Contains("1 of 2 targets met, 1 failures.", report, StringComparison.Ordinal);
        Assert.Contains("- Decode, M, 1 x 128, ms a step: 0.61, target <= 0.55, **missed**", report, StringComparison.Ordinal);
        Assert.Contains("""
            | | ms a step | tokens/s | result | transformers, ms a step |
            |---|--:|--:|---|--:|
            | 1 x 128 | 0.61 (<= 0.55, **missed**) | 1639 (>= 1000, met) |  | 21.2 |
            | 8 x 128 |  |  | **failed**: CudaException: a \| b |  |
            """, report, StringComparison.Ordinal);
    }

    private sealed record Row(int Stage, string Table, string Name, string Column, double? Value, string? Text, string? Error);

    private Task<string> PackAsync()
        => StartAsync(new ProcessStartInfo(Path.Combine(Root, "perf", "gpu", "pack.sh"), ["--no-build", Path.Combine(_folder, "archive")]));

    /// <summary>run.sh with nothing of this process's environment.</summary>
    private Task<string> RunAsync(params string[] arguments) => RunAsync(devices: 1, arguments);

    /// <inheritdoc cref="RunAsync(string[])"/>
    private Task<string> RunAsync(int devices, params string[] arguments)
    {
        ProcessStartInfo info = new(Path.Combine(_folder, "archive", "run.sh"), arguments) { WorkingDirectory = _folder };
        info.Environment.Clear();
        info.Environment["HOME"] = Directory.CreateDirectory(Path.Combine(_folder, "home")).FullName;
        info.Environment["PATH"] = "/usr/bin:/bin";
        info.Environment["ROLLOUT_CUDA_PATH"] = Simulated;
        info.Environment["ROLLOUT_SIM_DEVICES"] = $"{devices}";
        return StartAsync(info);
    }

    private static async Task<string> StartAsync(ProcessStartInfo info)
    {
        info.RedirectStandardOutput = info.RedirectStandardError = true;
        using Process process = Process.Start(info)!;
        Task<string> errors = process.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        string output = await process.StandardOutput.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.True(process.ExitCode == 0, $"{info.FileName} ended with {process.ExitCode}: {output}{await errors}");
        return output;
    }

    private static string FindRoot([CallerFilePath] string here = "")
        => Path.GetFullPath(Path.Combine(Path.GetDirectoryName(here)!, "..", ".."));
}
