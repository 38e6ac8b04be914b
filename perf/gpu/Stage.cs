using System.Diagnostics;
using System.Globalization;
using Rollout.Kernels.Cuda;

namespace Rollout.Gpu;

/// <summary>
/// A piece of a stage that runs in a process of its own, so that a device or a library that fails takes nothing else along.
/// </summary>
/// <param name="Name">Unique within the stage.</param>
/// <param name="Seconds">After which it is ended; what it has measured by then stays.</param>
/// <param name="RunAsync">Measures and writes rows.</param>
internal sealed record Part(string Name, int Seconds, Func<Stage, Task> RunAsync);

/// <summary>What a part writes to, and how large its work is.</summary>
internal sealed class Stage
{
    public const string Table = "Stages";

    /// <summary>What the process of a part ends with after it has written why.</summary>
    public const int Failed = 3;

    private const string SimulatedDevice = "simulated device"; // tests/cuda-sim

    private Stage(int number, string output, bool isSmall)
    {
        Number = number;
        Output = output;
        IsSmall = isSmall;
    }

    public int Number { get; }

    /// <summary>The folder that takes rows and logs.</summary>
    public string Output { get; }

    /// <summary>On the simulated device: tiny shapes and few steps, so that every line runs and no number means anything.</summary>
    public bool IsSmall { get; }

    /// <summary>The unpacked archive, which has the other programs.</summary>
    public static string Root { get; } = Path.GetFullPath(Path.Combine(AppContext.BaseDirectory, ".."));

    /// <summary>Limits are this many times as long.</summary>
    public static int Patience { get; }
        = int.Parse(Environment.GetEnvironmentVariable("ROLLOUT_GPU_PATIENCE") ?? "1", CultureInfo.InvariantCulture);

    public static Stage Open(int number, string output)
    {
        if (CudaBackend.DeviceCount == 0) return new Stage(number, output, isSmall: false); // the parts say what is missing
        using CudaDevice device = new(0);
        return new Stage(number, output, device.Name == SimulatedDevice);
    }

    /// <summary>Every part in turn; one that fails, or is not done in time, is a row.</summary>
    public static async Task RunAllAsync(int number, string output, IReadOnlyList<Part> parts)
    {
        foreach (Part part in parts)
        {
            long start = Stopwatch.GetTimestamp();
            ProcessStartInfo info = new(Environment.ProcessPath!, [.. Self, "part", $"{number}", part.Name, "--out", output]);
            using Process process = Process.Start(info)!;
            using CancellationTokenSource limit = new(TimeSpan.FromSeconds(part.Seconds * Patience));
            string? error = null;
            try
            {
                await process.WaitForExitAsync(limit.Token);
                if (process.ExitCode is not (0 or Failed)) error = $"ended with {process.ExitCode}";
            }
            catch (OperationCanceledException)
            {
                process.Kill(entireProcessTree: true);
                await process.WaitForExitAsync(CancellationToken.None);
                error = $"not done within {part.Seconds * Patience} s";
            }

            string name = $"{number}, {part.Name}";
            RowFile.Append(output, new Row(number, Table, name, "seconds") { Value = Stopwatch.GetElapsedTime(start).TotalSeconds });
            if (error is not null) RowFile.Append(output, new Row(number, Table, name, "result") { Error = error });
        }
    }

    /// <summary>This program's file, where it was started by `dotnet FILE`.</summary>
    public static string[] Self { get; } = Path.GetFileNameWithoutExtension(Environment.ProcessPath) == "dotnet"
        ? [Path.Combine(AppContext.BaseDirectory, "Rollout.Gpu.dll")]
        : [];

    /// <summary>One part, in this process.</summary>
    public async Task<int> RunAsync(Part part)
    {
        try
        {
            await part.RunAsync(this);
            Write(Table, $"{Number}, {part.Name}", "result", "done");
            return 0;
        }
        catch (Exception e)
        {
            Fail(Table, $"{Number}, {part.Name}", e);
            return Failed;
        }
    }

    public void Write(string table, string name, string column, double value, double? target = null, bool atLeast = false)
    {
        Row row = new(Number, table, name, column);
        RowFile.Append(Output, double.IsFinite(value)
            ? row with { Value = value, Target = IsSmall ? null : target, AtLeast = atLeast }
            : row with { Text = "-" }); // the simulated device takes no time for a copy
    }

    public void Write(string table, string name, string column, string text)
        => RowFile.Append(Output, new Row(Number, table, name, column) { Text = text });

    /// <summary>The row has the beginning of what went wrong, the log all of it.</summary>
    public void Fail(string table, string name, string error, string details = "")
    {
        const int Most = 400;
        Console.Error.WriteLine($"{table}, {name}: {error}\n{details}");
        string line = error.ReplaceLineEndings(" ");
        RowFile.Append(Output, new Row(Number, table, name, "result") { Error = line.Length > Most ? line[..Most] : line });
    }

    private void Fail(string table, string name, Exception e) => Fail(table, name, $"{e.GetType().Name}: {e.Message}", $"{e}");

    /// <summary>A failure is a row, and the next measurement follows.</summary>
    public async Task TryAsync(string table, string name, Func<Task> measure)
    {
        try
        {
            await measure();
        }
        catch (Exception e)
        {
            Fail(table, name, e);
        }
    }

    /// <inheritdoc cref="TryAsync"/>
    public void Try(string table, string name, Action measure)
    {
        try
        {
            measure();
        }
        catch (Exception e)
        {
            Fail(table, name, e);
        }
    }
}
