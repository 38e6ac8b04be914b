using System.Diagnostics;
using System.Globalization;
using Rollout.Kernels.Cuda;

namespace Rollout.Gpu;

/// <summary>A part of a stage that runs in its own process, so that a failing device or library does not end other parts.</summary>
/// <param name="Name">Unique within the stage.</param>
/// <param name="Seconds">Time limit; rows written before it stay.</param>
/// <param name="RunAsync">Measures and writes rows.</param>
internal sealed record Part(string Name, int Seconds, Func<Stage, Task> RunAsync);

/// <summary>Where a part writes its rows, and the size of its work.</summary>
internal sealed class Stage
{
    public const string Table = "Stages";

    /// <summary>Exit code of a part's process that has already reported its failure.</summary>
    public const int Failed = 3;

    private const string SimulatedDevice = "simulated device"; // tests/cuda-sim

    private Stage(int number, string output, bool isSmall)
    {
        Number = number;
        Output = output;
        IsSmall = isSmall;
    }

    public int Number { get; }

    /// <summary>The folder for rows and logs.</summary>
    public string Output { get; }

    /// <summary>On the simulated device: tiny shapes and few steps. Every line runs, but the numbers are meaningless.</summary>
    public bool IsSmall { get; }

    /// <summary>The unpacked archive, which has the other programs.</summary>
    public static string Root { get; } = Path.GetFullPath(Path.Combine(AppContext.BaseDirectory, ".."));

    /// <summary>Factor on the time limits.</summary>
    public static int Patience { get; }
        = int.Parse(Environment.GetEnvironmentVariable("ROLLOUT_GPU_PATIENCE") ?? "1", CultureInfo.InvariantCulture);

    public static Stage Open(int number, string output)
    {
        if (CudaBackend.DeviceCount == 0) return new Stage(number, output, isSmall: false); // the parts say what is missing
        using CudaDevice device = new(0);
        return new Stage(number, output, device.Name == SimulatedDevice);
    }

    /// <summary>Runs the parts in turn; one that fails or exceeds its time becomes a row.</summary>
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

    /// <summary>Runs one part in this process.</summary>
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
            : row with { Text = "-" }); // on the simulated device a copy takes no time
    }

    public void Write(string table, string name, string column, string text)
        => RowFile.Append(Output, new Row(Number, table, name, column) { Text = text });

    /// <summary>Writes a failure: its beginning as a row, all of it to the log.</summary>
    public void Fail(string table, string name, string error, string details = "")
    {
        const int Most = 400;
        Console.Error.WriteLine($"{table}, {name}: {error}\n{details}");
        string line = error.ReplaceLineEndings(" ");
        RowFile.Append(Output, new Row(Number, table, name, "result") { Error = line.Length > Most ? line[..Most] : line });
    }

    private void Fail(string table, string name, Exception e) => Fail(table, name, $"{e.GetType().Name}: {e.Message}", $"{e}");

    /// <summary>Runs a measurement; a failure becomes a row, and the next measurement follows.</summary>
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
